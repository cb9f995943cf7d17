"""The scheduler that lets the chosen temperatures through."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from adaptive_head.vllm.compat import refuse_unsupported


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """vLLM's own scheduler for this configuration, told to forward the mask channel.

    A function and not a subclass: vLLM has two schedulers, and a subclass of one would silently
    switch asynchronous scheduling on or off.

    Raises:
        UnsupportedError: the configuration cannot be served.
    """
    refuse_unsupported(vllm_config)
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler = (AsyncScheduler if is_async else Scheduler)(vllm_config=vllm_config, **kwargs)
    scheduler.return_sampling_mask = True
    return scheduler
