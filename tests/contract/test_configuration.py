"""Which vLLM and which configurations are served, and that vLLM builds our classes. No engine."""

from types import SimpleNamespace

import pytest
from vllm import __version_tuple__
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.config.scheduler import SchedulerConfig
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker import gpu_model_runner as v1
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu_worker import Worker

from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS, scheduler
from adaptive_head.vllm.compat import (
    SUPPORTED_MINORS,
    UnsupportedError,
    check_parameters,
    check_version,
    refuse_unsupported,
)
from adaptive_head.vllm.runner_v1 import AdaptiveRunnerV1
from adaptive_head.vllm.runner_v2 import AdaptiveRunnerV2
from adaptive_head.vllm.worker import AdaptiveWorker
from tests.contract.helpers import assert_in_order, assert_parameters, source

# --- the version and the configuration -----------------------------------------------------------


@pytest.mark.parametrize(
    "version", [(0, 31, 0), (0, 34, 0), (1, 0, 0), (1, 32, 0), (0, 0, "dev"), ("0", 32)]
)
def test_another_minor_of_vllm_is_refused(version):
    with pytest.raises(UnsupportedError, match=r"needs vLLM 0\.32 or 0\.33, found vLLM \d"):
        check_version(version)


@pytest.mark.parametrize("version", [(0, 32, 0), (0, 32, 7, "dev1"), (0, 33, 0), (0, 33, 1)])
def test_every_release_of_a_supported_minor_is_accepted(version):
    check_version(version)


def test_the_installed_vllm_is_of_a_supported_minor():
    assert __version_tuple__[:2] in SUPPORTED_MINORS


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
        use_v2_model_runner=False,
        watermark_config=None,
    )


def speculation(is_adaptive: bool = False, method: str = "standard") -> SimpleNamespace:
    return SimpleNamespace(enable_adaptive_verification=is_adaptive, rejection_sample_method=method)


REFUSED = {
    "--speculative-config": ("speculative_config", speculation()),
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


def test_speculation_is_served_by_the_v2_model_runner_but_not_where_its_length_is_the_devices():
    """With adaptive verification the host does not know how many rows a request has."""
    config = plain_config()
    config.use_v2_model_runner = True
    config.speculative_config = speculation()
    refuse_unsupported(config)
    config.speculative_config = speculation(is_adaptive=True)
    with pytest.raises(UnsupportedError, match="enable_adaptive_verification"):
        refuse_unsupported(config)
    config.speculative_config = speculation(method="block")
    refuse_unsupported(config)
    assert isinstance(VllmConfig.use_v2_model_runner, property)
    assert "enable_adaptive_verification" in SpeculativeConfig.__dataclass_fields__


def test_drafts_are_not_accepted_by_another_law_than_the_temperature_s():
    """0.33's FLy accepts a draft where the tokens behind it agree, though it would be rejected."""
    config = plain_config()
    config.use_v2_model_runner = True
    config.speculative_config = speculation(method="fly")
    with pytest.raises(UnsupportedError, match='rejection_sample_method "fly"'):
        refuse_unsupported(config)
    assert "rejection_sample_method" in SpeculativeConfig.__dataclass_fields__


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

    def initialise(self, **kwargs):
        self.kwargs = kwargs
        self.return_sampling_mask = False

    monkeypatch.setattr(scheduler.Scheduler, "__init__", initialise)
    monkeypatch.setattr(scheduler.AsyncScheduler, "__init__", initialise)
    config = plain_config()
    config.scheduler_config.async_scheduling = is_async
    made = scheduler.make_scheduler(config, log_stats=True)
    _, _, vllms, *_ = type(made).__mro__
    assert vllms.__name__ == wanted and made.return_sampling_mask
    assert made.kwargs == {"vllm_config": config, "log_stats": True}


def test_make_scheduler_refuses_what_cannot_be_served():
    config = plain_config()
    config.speculative_config = speculation()
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


# --- the worker and the runners ------------------------------------------------------------------


def test_the_worker_is_the_platforms_own_with_two_methods_changed_and_three_more():
    assert f"{AdaptiveWorker.__module__}.{AdaptiveWorker.__name__}" == WORKER_CLS
    assert issubclass(AdaptiveWorker, CPUWorker) and issubclass(CPUWorker, Worker)
    ours = {name for name in vars(AdaptiveWorker) if not name.startswith("__")}
    changed = {name for name in ours if hasattr(CPUWorker, name) or hasattr(Worker, name)}
    assert changed == {"init_device", "load_model"}
    assert {name for name in ours - changed if not name.startswith("_")} == {
        "add_head",
        "count_choices",
        "remove_head",
    }
    assert_parameters(CPUWorker.init_device, "self")
    assert_parameters(CPUWorker.load_model, "self", "load_dummy_weights")


def test_a_call_to_all_engines_reaches_every_worker_by_the_name_of_its_method():
    """`HeadControl` calls `add_head` and `remove_head` so, and adds up what they return."""
    assert_parameters(AsyncMPClient.call_utility_all_async, "self", "method", "args")
    assert issubclass(DPLBAsyncMPClient, AsyncMPClient)
    assert_parameters(EngineCore.collective_rpc, "self", "method", "timeout", "args", "kwargs")
    assert "engine_core" in source(AsyncLLM.__init__)
    assert "_api_process_count" in ParallelConfig.__annotations__
    # Messages to an engine keep their order: an abort arrives before the head is forgotten.
    assert_in_order(AsyncMPClient.abort_requests_async, "_send_input(")
    assert_in_order(AsyncMPClient._call_utility_async, "_send_input_message(")


def test_a_worker_that_raises_or_is_late_would_leave_replies_unread():
    """So ours return what is wrong, and are called without a timeout. Where vLLM mends it, they
    may raise."""
    assert_in_order(
        MultiprocExecutor.collective_rpc,
        "for mq in response_mqs",
        "mq.dequeue(",
        "raise TimeoutError(",
        "raise RuntimeError(",
        "responses.append(result)",
    )


def test_init_device_builds_the_runner_that_use_v2_model_runner_says():
    """Our runner is chosen by that flag and takes the place of an object that must exist."""
    assert "self.use_v2_model_runner=vllm_config.use_v2_model_runner" in source(Worker.__init__)
    assert_in_order(CPUWorker.init_device, "if self.use_v2_model_runner:", "CPUModelRunnerV2(")
    assert_in_order(Worker.init_device, "self._init_workspace_and_model_runner()")
    assert_in_order(Worker._init_workspace_and_model_runner, "self.model_runner")


def test_load_model_keeps_only_vllms_weights_in_the_pool_that_sleep_discards():
    """The heads are loaded after it returns; inside that pool they would be gone after sleep."""
    assert_in_order(Worker.load_model, 'tag="weights"', "self.model_runner.load_model(")


OVERRIDDEN = [
    (AdaptiveRunnerV1, v1.GPUModelRunner, {"_update_states", "sample_tokens"}),
    (
        AdaptiveRunnerV2,
        v2.GPUModelRunner,
        {"add_requests", "finish_requests", "profile_run", "sample"},
    ),
]


@pytest.mark.parametrize(("mixin", "stock", "names"), OVERRIDDEN)
def test_everything_that_a_runner_overrides_exists(mixin, stock, names):
    """A method that vLLM renames would never be called again, and nobody would notice. One that
    vLLM adds under a name of ours would be replaced."""
    of_stock = {name for parent in stock.__mro__ for name in vars(parent)}
    assert {name for name in vars(mixin) if name in of_stock and name[:2] != "__"} == names
    assert all(callable(getattr(stock, name)) for name in names)
    assert issubclass(CPUModelRunner, v1.GPUModelRunner)
