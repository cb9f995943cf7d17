"""What the worker and the scheduler assume of vLLM. No engine is started.

Where an assumption can be tried on a real object it is; the rest is read off vLLM's source. A
failure after an upgrade says which line of `docs/vllm-coupling.md` is no longer true.
"""

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


# --- the version and the configuration ----------------------------------------------------------


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


# --- the worker and the runners -----------------------------------------------------------------


def test_the_worker_is_the_platforms_own_with_two_methods_more():
    assert f"{AdaptiveWorker.__module__}.{AdaptiveWorker.__name__}" == WORKER_CLS
    assert issubclass(AdaptiveWorker, CPUWorker) and issubclass(CPUWorker, Worker)
    ours = {name for name in vars(AdaptiveWorker) if not name.startswith("__")}
    assert ours == {"init_device", "load_model"}
    assert_parameters(CPUWorker.init_device, "self")
    assert_parameters(CPUWorker.load_model, "self", "load_dummy_weights")


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
    (AdaptiveRunnerV2, v2.GPUModelRunner, {"add_requests", "finish_requests", "sample"}),
]


@pytest.mark.parametrize(("mixin", "stock", "names"), OVERRIDDEN)
def test_everything_that_a_runner_overrides_exists(mixin, stock, names):
    """A method that vLLM renames would never be called again, and nobody would notice. One that
    vLLM adds under a name of ours would be replaced."""
    of_stock = {name for parent in stock.__mro__ for name in vars(parent)}
    assert {name for name in vars(mixin) if name in of_stock and name[:2] != "__"} == names
    assert all(callable(getattr(stock, name)) for name in names)
    assert issubclass(CPUModelRunner, v1.GPUModelRunner)


# --- V2: where our stage stands and what it reads -----------------------------------------------


def test_v2_runs_its_stages_in_the_documented_order():
    """Penalties, then the head's temperature, then min-p, then top-k and top-p."""
    assert_in_order(
        SamplerV2.__init__,
        "logits_processors: list[LogitsProcessor] = [",
        "logit_bias_state,",
        "self.penalties_state,",
        "bad_words_state,",
        "*custom_logits_processors,",
        "]",
    )
    assert_in_order(
        SamplerV2.apply_sampling_params,
        "needs_logits_processing",
        "dtype=torch.float32",
        "for processor in self.logits_processors:",
        "processor.apply(logits, ctx)",
        "self.thinking_budget_state.apply(",
        "self.sampling_states.apply_temperature(",
        "self.sampling_states.apply_min_p(",
        "self.sampling_states.apply_top_k_top_p(",
    )
    assert_in_order(v2.GPUModelRunner.sample, "apply_grammar_bitmask(", "self.sampler(logits")


def test_v2_asks_every_processor_whether_a_request_needs_it():
    """Without our yes the sampler would skip all processing for a batch at temperature 1."""
    assert_in_order(
        SamplerV2.add_request,
        "for processor in self.logits_processors:",
        "needs_processing |= processor.add_request(req_idx, sampling_params)",
    )
    assert_in_order(SamplerV2.apply_staged_writes, "processor.apply_staged_writes()")


def test_v2_leaves_rows_at_temperature_1_and_0_alone():
    """Adaptive requests travel at 1: else vLLM would divide what we have divided."""
    assert_in_order(SamplingStates.apply_temperature, "(temp_np == 0.0) | (temp_np == 1.0)")
    # The kernel itself, which other requests of the batch may call for.
    assert_in_order(
        gumbel,
        "def _temperature_kernel(",
        "if temperature == 0.0 or temperature == 1.0:",
        "return",
        "def apply_temperature(",
    )


def test_v2_logits_processors_have_the_interface_that_ours_implements():
    assert issubclass(AdaptiveTemperature, LogitsProcessor)
    assert LogitsProcessor.__abstractmethods__ == {"apply"}
    fields = {field.name for field in dataclasses.fields(LogitsContext)}
    assert {"expanded_idx_mapping", "idx_mapping_np", "input_ids", "pos"} <= fields


def test_v2_slots_and_batches_have_the_fields_that_we_read():
    init = source(v2_states.RequestState.__init__)
    for name in ("req_id_to_index", "max_num_reqs", "device", "prompt_len", "prefill_len"):
        assert f"self.{name}" in init, name
    assert "logits_indices" in {field.name for field in dataclasses.fields(InputBatch)}
    assert "self.req_states" in source(v2.GPUModelRunner.__init__)
    assert "self.sampler:Sampler|None=None" in source(v2.GPUModelRunner.__init__)


def test_v2_positions_are_64_bits_wide():
    """`gumbel_noise` multiplies them by a constant of 64 bits."""
    buffers = InputBuffers(max_num_reqs=2, max_num_tokens=4, device=CPU)
    assert buffers.positions.dtype == torch.int64
    assert not buffers.input_ids.is_floating_point()


def test_v2_exchanges_the_device_view_of_its_buffers():
    """So `.gpu` must be read anew in every step, never kept."""
    assert_in_order(UvaBackedTensor.copy_to_uva, "self.gpu = ")
    lens = UvaBackedTensor(2, torch.int32)
    lens.np[:] = (3, 5)
    lens.copy_to_uva()
    assert lens.gpu[torch.tensor([1, 0], dtype=torch.int32)].tolist() == [5, 3]


def test_v2_makes_the_sampler_in_load_model_on_the_last_pipeline_rank_only():
    """`load_heads` runs after `load_model`; a rank without a sampler has no choices to make."""
    assert_in_order(
        v2.GPUModelRunner.load_model,
        "if self.is_last_pp_rank and not self.is_pooling_model:",
        "self.sampler = Sampler(",
    )


def test_v2_gives_up_slots_before_it_hands_out_new_ones():
    """A request that is preempted and resumed in one step is parked before it is restored."""
    assert_in_order(
        v2.GPUModelRunner.execute_model,
        "self.finish_requests(scheduler_output)",
        "self.add_requests(scheduler_output)",
    )
    assert_in_order(v2.GPUModelRunner.finish_requests, "scheduler_output.preempted_req_ids")
    assert_in_order(
        v2.GPUModelRunner.add_requests,
        "self._remove_request(req_id)",
        "self.sampler.add_request(",
        "self.sampler.apply_staged_writes()",
    )


def test_v2_resumed_requests_come_as_new_ones_with_their_output():
    """V1 sends them among the cached requests, so that there they keep their slot."""
    assert_in_order(
        Scheduler.schedule,
        "if self.use_v2_model_runner:",
        "scheduled_new_reqs.extend(scheduled_resumed_reqs)",
        "req._all_token_ids",
    )
    fields = {field.name for field in dataclasses.fields(NewRequestData)}
    assert {"req_id", "sampling_params", "prompt_token_ids", "prefill_token_ids"} <= fields


def test_the_scheduler_tells_the_worker_who_left():
    fields = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert {"scheduled_new_reqs", "finished_req_ids", "preempted_req_ids"} <= fields
    assert dataclasses.is_dataclass(GrammarOutput)
    # An abort while a request is preempted is reported like any other end.
    assert_in_order(Scheduler._free_request, "self.finished_req_ids.add(")
    assert_in_order(Scheduler._preempt_request, "self.reset_preempted_req_ids.add(")


def test_v2_dummy_batches_do_not_sample():
    """A rank of a data-parallel engine without requests must not wait in our broadcast."""
    assert "self.sample(" not in source(v2.GPUModelRunner._dummy_run)
    assert "self.sample(" not in source(v2.GPUModelRunner._dummy_sampler_run)


def test_the_broadcast_goes_to_all_ranks_that_sample():
    assert_parameters(GroupCoordinator.broadcast, "self", "input_", "src")
    assert "returninput_" in source(GroupCoordinator.broadcast)
    assert "self.world_size" in source(GroupCoordinator.__init__)


# --- V2: our stage, run on its own --------------------------------------------------------------


def scale_slowly(logits: list[list[float]], temperatures: list[float]) -> list[list[float]]:
    scaled = []
    for row, temperature in zip(logits, temperatures, strict=True):
        if math.isnan(temperature):
            scaled.append(list(row))
        elif temperature == 0:
            best = row.index(max(row))
            scaled.append([x if i == best else -INF for i, x in enumerate(row)])
        else:
            scaled.append([float(np.float32(x) / np.float32(temperature)) for x in row])
    return scaled


def test_scale_logits_against_a_slow_reference():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(60, 37, generator=generator) * 9
    logits[torch.rand(60, 37, generator=generator) < 0.3] = -INF
    logits[:, 5] = 1.25  # no row is masked entirely
    temperatures = torch.tensor([NAN, 0.0, 0.3, 1.0, 1e-6, 10.0] * 10)
    expected = scale_slowly(logits.tolist(), temperatures.tolist())
    result = scale_logits(logits, temperatures)
    assert result is logits, "in place"
    assert result.tolist() == expected


def test_scale_logits_leaves_ordinary_rows_bit_for_bit():
    rows = torch.tensor([[0.1, -0.0, INF, -INF, 1e-45, 3.4e38]])
    result = scale_logits(rows.clone(), torch.tensor([NAN]))
    assert torch.equal(result.view(torch.int32), rows.view(torch.int32))


def test_scale_logits_takes_the_first_of_equal_maxima():
    logits = torch.tensor([[1.0, 4.0, 4.0, -INF], [-2.0, -2.0, -INF, -3.0]])
    result = scale_logits(logits, torch.zeros(2)).tolist()
    assert result == [[-INF, 4.0, -INF, -INF], [-2.0, -INF, -INF, -INF]]


@pytest.fixture
def single_rank(monkeypatch):
    monkeypatch.setattr(processor_v2, "get_tp_group", lambda: SimpleNamespace(world_size=1))


def make_stage(num_slots: int = 4) -> AdaptiveTemperature:
    lens = [SimpleNamespace(gpu=torch.full((num_slots,), 3, dtype=torch.int32)) for _ in range(2)]
    slots = SimpleNamespace(
        max_num_reqs=num_slots, device=CPU, prompt_len=lens[0], prefill_len=lens[1]
    )
    return AdaptiveTemperature(slots, {})


def context_of(slots: list[int], pos: int = 2) -> LogitsContext:
    mapping = torch.tensor(slots, dtype=torch.int32)
    return LogitsContext(
        expanded_idx_mapping=mapping,
        idx_mapping=mapping,
        idx_mapping_np=np.array(slots),
        expanded_local_pos=torch.zeros_like(mapping),
        input_ids=torch.zeros_like(mapping),
        pos=torch.full((len(slots),), pos),
        seq_lens_upper_bound_np=np.full(len(slots), pos + 1),
    )


def apply(stage: AdaptiveTemperature, logits: torch.Tensor, slots: list[int]) -> list[int] | None:
    """Run one step. Returns what left as choices, in millionths."""
    with stage.reading(torch.zeros(len(slots), 8), torch.arange(len(slots))):
        stage.apply(logits, context_of(slots))
        choices = stage.take_choices()
    return None if choices is None else choices.micros.tolist()


def test_v2_stage_scales_adaptive_rows_and_says_how(single_rank):
    stage = make_stage()
    assert stage.add_request(2, params_of(constant(0.5)))
    assert not stage.add_request(0, params_of(None, temperature=0.7))
    stage.apply_staged_writes()
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert apply(stage, logits, [2, 0]) == [500_000, ORDINARY]
    assert logits.tolist() == [[2.0, 4.0], [1.0, 2.0]]
    assert apply(stage, logits, [0]) is None


def test_v2_stage_does_nothing_in_warm_up_and_profiling():
    """vLLM runs its sampler on dummy batches, whose slots may belong to real requests."""
    stage = make_stage()
    stage.add_request(0, params_of(constant(0.5)))
    stage.apply_staged_writes()
    logits = torch.ones(1, 2)
    assert stage.apply(logits, context_of([0])) is logits
    assert logits.tolist() == [[1.0, 1.0]] and stage.take_choices() is None


def test_v2_choice_of_a_sequence_survives_another_tenant_of_its_slot(single_rank):
    """Slots are recycled; a request that is preempted comes back in another one."""
    entropy = options_of(policy="entropy", level="sequence")
    sharp, flat = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    stage = make_stage()
    stage.add_request(1, params_of(entropy))
    stage.apply_staged_writes()
    stage.resume("a", 1, [7, 7, 7])
    (first,) = apply(stage, sharp.clone(), [1])
    assert apply(stage, flat.clone(), [1]) == [first]

    stage.park("a", 1)
    stage.add_request(1, params_of(entropy))
    stage.apply_staged_writes()
    stage.resume("b", 1, [7, 7, 7])
    (second,) = apply(stage, flat.clone(), [1])
    assert second != first

    stage.add_request(3, params_of(entropy))
    stage.apply_staged_writes()
    stage.resume("a", 3, [7, 7, 7, 8])
    assert apply(stage, flat.clone(), [3]) == [first]
    assert apply(stage, sharp.clone(), [1]) == [second]


def test_v2_parked_choices_go_with_their_requests():
    """An abort while a request is preempted must not leak, nor reach a later namesake."""
    stage = make_stage()
    stage.add_request(1, params_of(options_of(policy="entropy", level="sequence")))
    stage.apply_staged_writes()
    stage.park("a", 1)
    stage.park("unknown", None)
    stage.forget("a")
    stage.forget("never seen")
    assert not stage._parked


def test_v2_runner_parks_before_vllm_frees_the_slot_and_resumes_after_it_gives_one():
    """In one step: "a" and "b" are preempted, "b" has been aborted, and "a" resumes."""
    log = []
    slots = SimpleNamespace(req_id_to_index={"a": 1, "b": 2})

    class Stock:
        def finish_requests(self, scheduler_output):
            log.append("freed")
            slots.req_id_to_index.clear()

        def add_requests(self, scheduler_output):
            log.append("added")
            slots.req_id_to_index["a"] = 3

    runner = type("Runner", (AdaptiveRunnerV2, Stock), {})()
    runner.req_states = slots
    runner.adaptive = SimpleNamespace(
        park=lambda *args: log.append(("park", *args)),
        forget=lambda *args: log.append(("forget", *args)),
        resume=lambda *args: log.append(("resume", *args)),
    )
    new = SimpleNamespace(req_id="a", prefill_token_ids=[5, 6])
    step = SimpleNamespace(
        preempted_req_ids=["a", "b"], finished_req_ids=["b"], scheduled_new_reqs=[new]
    )
    runner.finish_requests(step)
    runner.add_requests(step)
    assert log == [
        ("park", "a", 1),
        ("park", "b", 2),
        ("forget", "b"),
        "freed",
        "added",
        ("resume", "a", 3, [5, 6]),
    ]


def test_v2_runner_without_a_sampler_is_vllms_own():
    class Stock:
        sampler = None

        def sample(self, *args):
            return args

        def add_requests(self, scheduler_output):
            pass

        finish_requests = add_requests

    runner = type("Runner", (AdaptiveRunnerV2, Stock), {})()
    runner.load_heads({})
    assert runner.adaptive is None and runner.sample(1, 2, 3) == (1, 2, 3)
    runner.add_requests(None)
    runner.finish_requests(None)


@pytest.mark.parametrize("mixin", [AdaptiveRunnerV1, AdaptiveRunnerV2])
def test_a_sampler_that_is_not_vllms_own_is_refused(mixin):
    runner = type("Runner", (mixin,), {"device": CPU, "sampler": object()})()
    with pytest.raises(UnsupportedError, match="vLLM's own sampler"):
        runner.load_heads({})


# --- V1 -----------------------------------------------------------------------------------------


def test_v1_is_refused_on_a_gpu():
    runner = type("Runner", (AdaptiveRunnerV1,), {"device": torch.device("cuda")})()
    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        runner.load_heads({})


def test_v1_schedules_synchronously_on_a_cpu():
    """With asynchronous scheduling `sample_tokens` returns a wrapper of the output, whose
    `sampling_masks` nobody reads, and the batch holds -1 in the place of tokens."""
    assert_in_order(CpuPlatform.check_and_update_config, "async_scheduling = False")
    assert_in_order(
        v1.GPUModelRunner.sample_tokens,
        "output = ModelRunnerOutput(",
        "if not self.use_async_scheduling:",
        "return output",
    )


def test_v1_runs_its_stages_in_the_documented_order():
    """Penalties, then the head's temperature, then min-p, then top-k and top-p."""
    assert_in_order(
        SamplerV1.apply_logits_processors,
        "sampling_metadata.allowed_token_ids_mask",
        "apply_bad_words(",
        "logitsprocs.non_argmax_invariant",
        "self.apply_penalties(",
        "holder.apply_to_logits(",
    )
    assert_in_order(
        SamplerV1.forward,
        "logits.to(torch.float32)",
        "self.apply_logits_processors(",
        "self.sample(logits, sampling_metadata)",
    )
    assert_in_order(
        SamplerV1.sample,
        "self.greedy_sample(logits)",
        "self.apply_temperature(",
        "logitsprocs.argmax_invariant",
        "self.topk_topp_sampler(",
        "sampling_metadata.temperature < _SAMPLING_EPS",
    )
    assert_in_order(v1.GPUModelRunner.sample_tokens, "apply_grammar_bitmask(", "self._sample(")


def test_v1_batch_has_the_fields_that_we_read():
    init = source(InputBatchV1)
    for name in ("generators", "num_tokens_no_spec", "num_prompt_tokens", "token_ids_cpu"):
        assert f"self.{name}" in init, name
    assert isinstance(InputBatchV1.req_ids, property)
    assert isinstance(InputBatchV1.num_reqs, property)
    assert "sample_hidden_states" in v1.ExecuteModelState._fields
    runner = source(v1.GPUModelRunner.__init__)
    for name in ("input_batch", "discard_request_mask", "execute_model_state", "sampler"):
        assert f"self.{name}" in runner, name


def test_v1_counts_the_sampled_token_after_sample_tokens_was_called():
    """So `num_tokens_no_spec - 1` is the position of the token that was fed in this step."""
    assert_in_order(v1.GPUModelRunner.sample_tokens, "self._sample(", "self._bookkeeping_sync(")
    assert_in_order(
        v1.GPUModelRunner._bookkeeping_sync, "self.input_batch.num_tokens_no_spec[req_idx] = "
    )
    assert_in_order(v1.GPUModelRunner._prepare_inputs, "self.discard_request_mask.np[:num_reqs] =")


def test_v1_keeps_preempted_requests_and_forgets_finished_ones():
    assert_in_order(
        v1.GPUModelRunner._update_states,
        "for req_id in scheduler_output.finished_req_ids:",
        "for new_req_data in scheduler_output.scheduled_new_reqs:",
    )


def test_v1_rewinds_generators_which_a_cpu_cannot():
    """The bug behind `_hold_unfinished_generators`. Where this fails the guard may go."""
    assert "gen.set_offset(gen.get_offset()-4)" in source(v1.GPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
        torch.Generator().get_offset()
    # The guard takes them out of the dictionary that vLLM draws from.
    assert "generators=self.generators" in source(InputBatchV1._make_sampling_metadata)


class StockRunnerV1:
    """As much of vLLM's V1 runner as ours calls."""

    device = CPU
    execute_model_state = None

    def __init__(self, num_rows=0):
        self.sampler = SamplerV1()
        self.discard_request_mask = SimpleNamespace(np=np.zeros(8, dtype=np.bool_))
        self.input_batch = SimpleNamespace(
            num_reqs=num_rows,
            req_ids=["a", "b", "c"][:num_rows],
            generators={},
            num_tokens_no_spec=np.full(8, 3, dtype=np.int32),
            token_ids_cpu=np.arange(24, dtype=np.int32).reshape(8, 3),
            num_prompt_tokens=np.full(8, 3, dtype=np.int32),
        )

    def _update_states(self, scheduler_output):
        return "stock"

    def sample_tokens(self, grammar_output):
        self.seen_generators = dict(self.input_batch.generators)
        num_rows = self.input_batch.num_reqs
        if self.execute_model_state is not None:
            self.sampler(torch.zeros(num_rows, 5), self.metadata)
        return ModelRunnerOutput(req_ids=self.input_batch.req_ids, req_id_to_index={})


RunnerV1 = type("RunnerV1", (AdaptiveRunnerV1, StockRunnerV1), {})


def test_v1_guard_holds_generators_of_unfinished_prefills_only():
    runner = RunnerV1(3)
    runner.load_heads({})
    runner.input_batch.generators |= {0: "a", 1: "b", 7: "c"}
    runner.discard_request_mask.np[:4] = (True, False, True, True)
    runner.sample_tokens(None)
    assert runner.seen_generators == {1: "b", 7: "c"}
    assert runner.input_batch.generators == {0: "a", 1: "b", 7: "c"}


def new_request(req_id, options, **fields):
    return SimpleNamespace(
        req_id=req_id, sampling_params=params_of(options, **fields), prompt_token_ids=[1, 2, 3]
    )


def step_of(*new, finished=()):
    return SimpleNamespace(scheduled_new_reqs=list(new), finished_req_ids=set(finished))


def test_v1_slots_follow_the_requests():
    """A slot is released by the end of a request or by its next turn, and by nothing else."""
    runner = RunnerV1()
    runner.load_heads({})
    assert runner._update_states(step_of(new_request("a", constant(0.5)))) == "stock"
    runner._update_states(step_of(new_request("b", None), new_request("c", constant(0.2))))
    assert set(runner._slots) == {"a", "c"} and 0 not in runner._slots.values()
    slot = runner._slots["a"]
    runner._update_states(step_of())
    assert runner._slots["a"] == slot
    runner._update_states(step_of(finished=["a", "b", "unknown"]))
    assert set(runner._slots) == {"c"} and not runner._selector.is_adaptive(slot)
    runner._update_states(step_of(new_request("c", None)))
    assert not runner._slots


def make_metadata(temperatures: list[float], seeds: list[int]) -> SamplingMetadata:
    nothing = torch.zeros(len(temperatures))
    generators = {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}
    is_greedy = [temperature == 0 for temperature in temperatures]
    return SamplingMetadata(
        temperature=None if all(is_greedy) else torch.tensor(temperatures),
        all_greedy=all(is_greedy),
        all_random=not any(is_greedy),
        top_p=None,
        top_k=None,
        generators=generators,
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[] for _ in temperatures],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def test_v1_sampler_draws_what_vllm_draws_at_the_chosen_temperatures():
    """Row 0 is ordinary; rows 1 and 2 are adaptive and travel at 1."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    seeds = [4, 5, 6]
    selector = TemperatureSelector({}, 4, CPU)
    for slot, temperature in ((1, 0.0), (2, 1.7)):
        selector.add(slot, constant(temperature), None)
    selector.flush()
    ours = AdaptiveSamplerV1(SamplerV1("processed_logprobs", False), selector)
    assert ours.logprobs_mode == "processed_logprobs"
    ours.step = {
        "slots": torch.tensor([0, 1, 2]),
        "slots_np": np.array([0, 1, 2]),
        "hidden": torch.zeros(3, 8),
        "input_ids": torch.zeros(3, dtype=torch.int64),
        "positions": torch.full((3,), 2),
        "prompt_lens": torch.full((3,), 3),
        "is_ready": torch.ones(3, dtype=torch.bool),
    }
    for _ in range(5):
        seeds = [seed + 3 for seed in seeds]
        metadata = make_metadata([0.6, 1.0, 1.0], seeds)
        found = ours(logits.clone(), metadata).sampled_token_ids
        expected = SamplerV1()(logits.clone(), make_metadata([0.6, 0.0, 1.7], seeds))
        assert found.tolist() == expected.sampled_token_ids.tolist()
        assert to_micro(ours.temperatures).tolist() == [ORDINARY, 0, 1_700_000]
        assert metadata.all_random and metadata.temperature.tolist() == [
            pytest.approx(0.6),
            1.0,
            1.0,
        ], "vLLM keeps its metadata from step to step"


def test_v1_choices_leave_with_the_output_of_their_batch():
    runner = RunnerV1(3)
    runner.load_heads({})
    runner._update_states(step_of(new_request("b", constant(0.5)), new_request("a", None)))
    runner.execute_model_state = SimpleNamespace(sample_hidden_states=torch.zeros(3, 8))
    runner.metadata = make_metadata([0.7, 1.0, 0.0], [])
    masks = runner.sample_tokens(None).sampling_masks
    assert [masks.slice_request(row, 1) is None for row in range(3)] == [True, False, True]
    assert masks.slice_request(1, 1).to_nested_list() == [[500_000]]
    assert runner.sampler.step is None and runner.sampler.temperatures is None

    runner.metadata = None  # vLLM's own step fails
    with pytest.raises(AttributeError):
        runner.sample_tokens(None)
    assert runner.sampler.step is None, "a failed step must not reach the next"


def test_v1_batch_without_adaptive_requests_carries_nothing():
    runner = RunnerV1(2)
    runner.load_heads({})
    runner._update_states(step_of(new_request("a", None), new_request("gone", constant(0.5))))
    runner.execute_model_state = SimpleNamespace(sample_hidden_states=torch.zeros(2, 8))
    runner.metadata = make_metadata([0.7, 0.0], [])
    assert runner.sample_tokens(None).sampling_masks is None
    # Nothing was executed: what comes back is an output that all such steps share.
    runner.execute_model_state = None
    assert runner.sample_tokens(None).sampling_masks is None


# --- options that go around the front end -------------------------------------------------------


def test_vllm_keeps_what_the_request_carries():
    params = params_of(constant(0.5), seed=7)
    assert Options.from_extra_args(params.clone().extra_args) == constant(0.5)
    assert (params.temperature, params.seed) == (1.0, 7)
    assert SamplingParams().extra_args is None


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_options_beside_another_temperature_than_1_are_ignored(temperature, caplog):
    """vLLM would apply its own as well, and V1 has no tensor to replace in a greedy batch: an
    assertion there ended the engine and every request in it."""
    with caplog.at_level(logging.ERROR):
        assert read_options(params_of(constant(0.5), temperature=temperature), {}) is None
    assert f"its own temperature is {temperature:g}, not 1" in caplog.text
    assert read_options(params_of(constant(0.5)), {}) == constant(0.5)
    assert read_options(params_of(None, temperature=temperature), {}) is None


def test_options_for_an_unknown_head_or_of_another_make_are_ignored(caplog):
    head = dataclasses.replace(constant(0.5), policy="head", name="gone", parameters=())
    with caplog.at_level(logging.ERROR):
        assert read_options(params_of(head), {}) is None
        assert read_options(SamplingParams(extra_args={"adaptive": "token"}), {}) is None
    assert "no head 'gone'" in caplog.text


# --- the channel --------------------------------------------------------------------------------


def test_v2_output_copies_and_converts_choices_like_masks():
    """`ChoiceTensors` is not of vLLM's type: these two calls are all that is made of it."""
    init, get = source(AsyncOutput.__init__), source(AsyncOutput.get_output)
    assert "sampler_output.sampling_mask_tensors.to_cpu_nonblocking()" in init
    assert "self.sampling_mask_tensors.tolists(self.num_sampled_tokens_np)" in get
    assert "self.model_runner_output.sampling_masks=" in get
    # The device tensor lives on another stream until the copy is done.
    assert "self.sampler_output=sampler_output" in init
    uses = (init + get).count("sampling_mask_tensors")
    assert uses == 6, "vLLM makes another use of the tensors"
    assert {"to_cpu_nonblocking", "tolists"} <= set(dir(SamplingMaskTensors))


def test_v2_sampler_output_has_a_place_for_choices():
    names = [field.name for field in dataclasses.fields(SamplerOutput)]
    assert "sampling_mask_tensors" in names
    assert not SamplerOutput.__dataclass_params__.frozen
    assert_in_order(v2.GPUModelRunner.sample, "return sampler_output, ")
    assert_in_order(
        v2.GPUModelRunner.sample_tokens,
        "= self.sample(",
        "AsyncOutput(",
        "sampler_output=sampler_output",
    )


def test_choices_go_through_v2s_conversion():
    choices = ChoiceTensors(torch.tensor([700_000, ORDINARY, 0], dtype=torch.int32))
    lists = choices.to_cpu_nonblocking().tolists(np.array([1, 1, 1]))
    assert isinstance(lists, ChoiceLists)
    assert lists.slice_request(0, 1).to_nested_list() == [[700_000]]
    assert lists.slice_request(1, 1) is None
    assert lists.slice_request(2, 1).to_nested_list() == [[0]]


def test_model_runner_output_has_a_place_for_choices():
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    assert output.sampling_masks is None
    output.sampling_masks = ChoiceLists(np.array([5], dtype=np.int32))
    copied = pickle.loads(pickle.dumps(output)).sampling_masks
    assert copied.slice_request(0, 1).to_nested_list() == [[5]], "workers send it by pickle"


def test_the_scheduler_slices_by_row_and_forwards_where_its_flag_says():
    """The flag is an attribute that nothing else of the scheduler's reads."""
    assert_in_order(
        Scheduler.update_from_output,
        "req_index = model_runner_output.req_id_to_index[req_id]",
        "if self.return_sampling_mask:",
        "if new_token_ids and sampling_masks is not None:",
        "sampling_masks.slice_request(req_index, len(new_token_ids))",
        "new_sampling_mask=new_sampling_mask",
    )
    assert source(Scheduler).count("self.return_sampling_mask") == 2
    assert "return_sampling_mask" not in source(AsyncScheduler)


def test_choices_cross_to_the_api_process_in_vllms_encoding():
    choices = ChoiceLists(np.array([ORDINARY, 1_234_567, 2_147_483_647, 0], dtype=np.int32))
    outputs = [
        EngineCoreOutput(
            request_id=str(row),
            new_token_ids=[row],
            new_sampling_mask=choices.slice_request(row, 1),
        )
        for row in range(4)
    ]
    frames = MsgpackEncoder().encode(EngineCoreOutputs(outputs=outputs))
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(frames)
    masks = [output.new_sampling_mask for output in decoded.outputs]
    assert masks[0] is None
    assert all(isinstance(mask, SamplingMaskLists) for mask in masks[1:])
    assert all(mask.token_ids.dtype == np.int32 for mask in masks[1:])
    assert [mask.to_nested_list() for mask in masks[1:]] == [
        [[1_234_567]],
        [[2_147_483_647]],
        [[0]],
    ]


def test_the_output_processor_hands_on_one_entry_a_token():
    assert_in_order(
        OutputProcessor.process_outputs,
        "req_state.sampling_mask_chunks.append(",
        "make_request_output(",
    )
    assert_in_order(
        RequestState._new_completion_output,
        "if (delta or finished) and self.sampling_mask_chunks:",
        "for chunk in self.sampling_mask_chunks",
        "for position in chunk.to_nested_list()",
        "self.sampling_mask_chunks.clear()",
        "sampling_mask=sampling_mask",
    )
    # Slicing at a stop string needs several tokens in a step, which only speculation makes.
    assert_in_order(OutputProcessor._trim_surplus_tokens, "if num_dropped <= 0:", "return")


def completion(token_ids, micros, index=0) -> CompletionOutput:
    mask = None if micros is None else SamplingMask([[micro] for micro in micros])
    return CompletionOutput(index, "", token_ids, None, None, sampling_mask=mask)


def request_output(*completions, finished=False) -> RequestOutput:
    return RequestOutput("r", None, [1], None, list(completions), finished)


def test_outputs_that_wait_for_a_reader_are_merged_with_their_choices():
    """A slow client gets several tokens in one output."""
    output = request_output(completion([4], [10]), completion([5], [11], index=1))
    output.add(request_output(completion([6], [12])), aggregate=True)
    output.add(request_output(completion([7], [13], index=1), finished=True), aggregate=True)
    assert [take_choices(answer) for answer in output.outputs] == [[10, 12], [11, 13]]
    assert [answer.sampling_mask for answer in output.outputs] == [None, None]
    assert take_choices(output.outputs[0]) is None
    assert output.finished


# --- the scheduler ------------------------------------------------------------------------------


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
