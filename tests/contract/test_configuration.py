"""Which vLLM and which configurations are served, and that vLLM builds our classes. No engine."""

import dataclasses
import logging
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.config.scheduler import SchedulerConfig
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.outputs import CompletionOutput, RequestOutput, SamplingMask
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.outputs import ModelRunnerOutput, SamplingMaskLists
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as SamplerV1
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker import gpu_model_runner as v1
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu import states as v2_states
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.output import SamplerOutput, SamplingMaskTensors
from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu_input_batch import InputBatch as InputBatchV1
from vllm.v1.worker.gpu_worker import Worker

from adaptive_head.options import AdaptiveRequest, Options, resolve_options
from adaptive_head.selector import ORDINARY, TemperatureSelector, to_micro
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS, processor_v2, scheduler
from adaptive_head.vllm.choices import ChoiceLists, ChoiceTensors, take_choices
from adaptive_head.vllm.compat import (
    SUPPORTED_MINOR,
    UnsupportedError,
    check_parameters,
    check_version,
    refuse_unsupported,
)
from adaptive_head.vllm.heads import read_options
from adaptive_head.vllm.processor_v2 import AdaptiveTemperature, scale_logits
from adaptive_head.vllm.runner_v1 import AdaptiveRunnerV1, AdaptiveSamplerV1
from adaptive_head.vllm.runner_v2 import AdaptiveRunnerV2
from adaptive_head.vllm.worker import AdaptiveWorker
from tests.contract.sources import assert_in_order, assert_parameters, source

CPU = torch.device("cpu")
NAN = math.nan
INF = math.inf


def options_of(**fields) -> Options:
    return resolve_options(AdaptiveRequest(**fields), {}, None)


def constant(temperature: float) -> Options:
    return options_of(policy="constant", constant={"temperature": temperature})


def params_of(options: Options | None, **fields) -> SamplingParams:
    extra_args = None if options is None else options.to_extra_args()
    return SamplingParams(**{"temperature": 1.0, "extra_args": extra_args} | fields)


# --- the version and the configuration -----------------------------------------------------------


@pytest.mark.parametrize(
    "version", [(0, 31, 0), (0, 33, 0), (1, 0, 0), (1, 32, 0), (0, 0, "dev"), ("0", 32)]
)
def test_another_minor_of_vllm_is_refused(version):
    with pytest.raises(UnsupportedError, match=r"needs vLLM 0\.32\.x, found vLLM \d"):
        check_version(version)


def test_the_installed_vllm_is_the_supported_minor():
    from vllm import __version_tuple__

    assert __version_tuple__[:2] == SUPPORTED_MINOR
    check_version(__version_tuple__)
    check_version((0, 32, 7, "dev1"))


def test_check_parameters_names_both_sides():
    check_parameters(lambda self, a: None, "self", "a")
    with pytest.raises(UnsupportedError, match=r"takes \('self', 'b'\), this release expects"):
        check_parameters(lambda self, b: None, "self", "a")


def plain_config() -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            return_sampling_mask=False, runner_type="generate", is_diffusion=False
        ),
        parallel_config=SimpleNamespace(
            enable_batch_sharded_sampling=False, distributed_executor_backend="mp"
        ),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        speculative_config=None,
        watermark_config=None,
    )


REFUSED = {
    "--speculative-config": ("speculative_config", object()),
    "--enable-batch-sharded-sampling": ("parallel_config.enable_batch_sharded_sampling", True),
    "--return-sampling-mask": ("model_config.return_sampling_mask", True),
    "--watermark-config": ("watermark_config", object()),
    "external_launcher": ("parallel_config.distributed_executor_backend", "external_launcher"),
    "--runner pooling": ("model_config.runner_type", "pooling"),
    "a diffusion model": ("model_config.is_diffusion", True),
}


def set_path(thing, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        thing = getattr(thing, parent)
    setattr(thing, name, value)


def test_a_plain_configuration_is_served(monkeypatch):
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    refuse_unsupported(plain_config())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    refuse_unsupported(plain_config())


@pytest.mark.parametrize("option", REFUSED)
def test_every_refusal_names_its_option(option):
    config = plain_config()
    set_path(config, *REFUSED[option])
    with pytest.raises(UnsupportedError, match=option) as refusal:
        refuse_unsupported(config)
    assert not any(other in str(refusal.value) for other in REFUSED if other != option)


def test_all_refusals_come_in_one_sentence(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    config = plain_config()
    for path, value in REFUSED.values():
        set_path(config, path, value)
    with pytest.raises(UnsupportedError) as refusal:
        refuse_unsupported(config)
    assert all(option in str(refusal.value) for option in [*REFUSED, "VLLM_USE_RUST_FRONTEND"])


def test_the_refused_options_are_where_refuse_unsupported_looks():
    """An option that moved would be read from a place that is always empty, or not at all."""
    assert {"speculative_config", "watermark_config"} <= VllmConfig.__dataclass_fields__.keys()
    assert "return_sampling_mask" in ModelConfig.__dataclass_fields__
    assert "self.runner_type = ".replace(" ", "") in source(ModelConfig)
    assert hasattr(ModelConfig, "is_diffusion")
    assert "enable_batch_sharded_sampling" in ParallelConfig.__dataclass_fields__
    assert "external_launcher" in source(ParallelConfig)


# --- the scheduler -------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_async", "wanted"), [(True, "AsyncScheduler"), (False, "Scheduler")])
def test_make_scheduler_takes_vllms_own_and_sets_the_flag(is_async, wanted, monkeypatch):
    """A scheduler of the wrong kind would run, at half the speed or with wrong counters."""

    class Fake:
        def __init__(self, **kwargs):
            self.kwargs = kwargs
            self.return_sampling_mask = False

    for name in ("Scheduler", "AsyncScheduler"):
        monkeypatch.setattr(scheduler, name, type(name, (Fake,), {}))
    config = plain_config()
    config.scheduler_config.async_scheduling = is_async
    made = scheduler.make_scheduler(config, log_stats=True)
    assert type(made).__name__ == wanted and made.return_sampling_mask
    assert made.kwargs == {"vllm_config": config, "log_stats": True}


def test_make_scheduler_refuses_what_cannot_be_served():
    config = plain_config()
    config.speculative_config = object()
    with pytest.raises(UnsupportedError, match="--speculative-config"):
        scheduler.make_scheduler(config)


def test_vllm_calls_whatever_scheduler_cls_names_with_keywords():
    config = SchedulerConfig.default_factory(max_model_len=8, scheduler_cls=SCHEDULER_CLS)
    assert config.get_scheduler_cls() is scheduler.make_scheduler
    assert_in_order(
        EngineCore.__init__, "get_scheduler_cls()", "= Scheduler(vllm_config=vllm_config,"
    )
    assert_in_order(
        SchedulerConfig.get_scheduler_cls, "if self.async_scheduling:", "AsyncScheduler"
    )


