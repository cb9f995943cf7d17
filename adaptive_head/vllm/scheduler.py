"""vLLM's schedulers, which let the decisions through."""

from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from adaptive_head.vllm.compat import check_parameters, refuse_unsupported
from adaptive_head.vllm.wire import DecisionLists, DecisionSender

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Stock
else:
    _Stock = object

check_parameters(Scheduler.update_from_output, "self", "scheduler_output", "model_runner_output")


class _SendsDecisions(_Stock):
    """Mixed into vLLM's scheduler: sends decisions through its channel for sampling masks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.return_sampling_mask = True
        self._sender = DecisionSender()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._sender.forget(scheduler_output.finished_req_ids)
        decisions: Any = model_runner_output.sampling_masks
        if isinstance(decisions, DecisionLists):
            masks: Any = self._sender.begin_step(decisions, model_runner_output.req_ids)
            model_runner_output.sampling_masks = masks
        return super().update_from_output(scheduler_output, model_runner_output)


class AdaptiveScheduler(_SendsDecisions, Scheduler):
    """For synchronous scheduling."""


class AdaptiveAsyncScheduler(_SendsDecisions, AsyncScheduler):
    """For asynchronous scheduling."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM itself would take for this configuration, and ours on top.

    A function and not a class: vLLM has two schedulers, and one of them for all would silently
    switch asynchronous scheduling on or off.

    Raises:
        UnsupportedError: the configuration cannot be served.
    """
    refuse_unsupported(vllm_config)
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler = AdaptiveAsyncScheduler if is_async else AdaptiveScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
