"""vLLM's own code in an engine of ours: what the plugin has put in is taken out for a while.

`take_out` and `put_back` are called in every worker, through vLLM's `collective_rpc`, between two
steps. The heads stay in memory.
"""

from typing import Any


def take_out(worker: Any) -> None:
    """Exchange the model runner and the sampler for vLLM's."""
    runner = worker.model_runner
    ours, sampler = type(runner), runner.sampler
    runner.__class__ = ours.__bases__[1]
    runner.taken_out = ours, sampler
    if is_v2(runner):
        if sampler is not None:
            sampler.logits_processors.remove(runner.adaptive)
    else:
        stock = type(sampler).__bases__[0]
        runner.sampler = stock(sampler.logprobs_mode, sampler.use_fp64_gumbel)


def put_back(worker: Any) -> None:
    """Undo `take_out`."""
    runner = worker.model_runner
    runner.__class__, runner.sampler = runner.taken_out
    del runner.taken_out
    if is_v2(runner) and runner.sampler is not None:
        runner.sampler.logits_processors.append(runner.adaptive)


def is_v2(runner: Any) -> bool:
    """Whether this is vLLM's V2 model runner, ours or theirs."""
    return any(base.__module__.startswith("vllm.v1.worker.gpu.") for base in type(runner).__mro__)
