"""The arm `stock` is vLLM's own code, and what is taken out for it comes back."""

from types import SimpleNamespace

import pytest
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from adaptive_head.vllm.runner_v1 import AdaptiveRunnerV1, AdaptiveSamplerV1
from adaptive_head.vllm.runner_v2 import AdaptiveRunnerV2
from benchmarks.stock import is_v2, put_back, take_out


def make_worker(mixin, stock, **attributes):
    """A worker whose runner has the classes that `AdaptiveWorker` gives it, and no engine."""
    ours = type(mixin.__name__, (mixin, stock), {})
    runner = ours.__new__(ours)
    vars(runner).update(attributes)
    return SimpleNamespace(model_runner=runner), ours


def test_v1_gets_its_runner_and_its_sampler_back():
    sampler = AdaptiveSamplerV1(Sampler("processed_logprobs", True), selector=None)
    worker, ours = make_worker(AdaptiveRunnerV1, RunnerV1, sampler=sampler)
    runner = worker.model_runner
    take_out(worker)
    assert type(runner) is RunnerV1
    assert type(runner.sampler) is Sampler
    assert runner.sampler.logprobs_mode == "processed_logprobs"
    assert runner.sampler.use_fp64_gumbel
    assert not is_v2(runner)
    put_back(worker)
    assert type(runner) is ours
    assert runner.sampler is sampler
    assert not is_v2(runner)


@pytest.mark.parametrize("samples", [True, False])
def test_v2_gets_its_runner_back_and_loses_our_processor(samples):
    adaptive = object() if samples else None
    processors = ["bias", "penalties", *([adaptive] if samples else [])]
    sampler = SimpleNamespace(logits_processors=processors) if samples else None
    worker, ours = make_worker(AdaptiveRunnerV2, RunnerV2, sampler=sampler)
    runner = worker.model_runner
    if samples:
        runner.adaptive = adaptive
    for _ in range(2):
        take_out(worker)
        assert type(runner) is RunnerV2
        assert is_v2(runner)
        assert not samples or sampler.logits_processors == ["bias", "penalties"]
        put_back(worker)
        assert type(runner) is ours
        assert runner.sampler is sampler
        assert is_v2(runner)
        assert not samples or sampler.logits_processors[-1] is adaptive
