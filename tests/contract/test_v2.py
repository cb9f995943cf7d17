"""What the V2 runner and its temperature stage assume of vLLM. No engine is started.

Where an assumption can be tried on a real object it is; the rest is read off vLLM's source. A
failure after an upgrade says which line of `docs/vllm-coupling.md` is no longer true.
"""

import dataclasses
import logging
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.utils import mem_utils
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu import states as v2_states
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    _iter_request_chunks,
)
from vllm.v1.worker.gpu_worker import Worker

from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.options import Options
from adaptive_head.selector import TemperatureSelector
from adaptive_head.slots import ORDINARY
from adaptive_head.vllm import processor_v2
from adaptive_head.vllm.compat import UnsupportedError
from adaptive_head.vllm.head_runner import HiddenRows
from adaptive_head.vllm.heads import read_options
from adaptive_head.vllm.processor_v2 import AdaptiveTemperature
from adaptive_head.vllm.runner_v1 import AdaptiveRunnerV1
from adaptive_head.vllm.runner_v2 import AdaptiveRunnerV2
from adaptive_head.vllm.selector_v2 import DeviceSelector
from tests.contract.helpers import (
    CPU,
    assert_in_order,
    constant,
    options_of,
    params_of,
    source,
)

SELECTOR = TemperatureSelector({}, 1, CPU)


# --- where our stage stands and what it reads ----------------------------------------------------


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
    assert_in_order(UvaBackedTensor.copy_to_uva, "self.gpu = self.pool.copy_to_uva(")
    assert_in_order(v2_states.RequestState.apply_staged_writes, "self.prompt_len.copy_to_uva()")
    assert_in_order(v2_states.RequestState.__init__, "self.prefill_len = UvaBackedTensor(")


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


def test_v2_verifies_drafts_with_the_samplers_own_stages_and_whole_requests_at_a_time():
    """Our stage is told which requests a part of the rows belongs to, and drafts keep the slot's
    temperature: 1, at which they were drawn."""
    assert_in_order(
        RejectionSampler._verify,
        "processed_logits = self.sampler.apply_sampling_params(logits, expanded_idx_mapping,",
        "idx_mapping_np,",
        "rejection_sample(processed_logits, draft_logits,",
        "self.sampler.sampling_states.temperature.gpu,",
    )
    assert_in_order(
        RejectionSampler._verify_in_chunks,
        "for start, end in request_chunks:",
        "lo = int(cu_num_logits_np[start])",
        "input_batch.idx_mapping_np[start:end]",
    )
    starts = np.array([0, 4, 5, 9, 13], dtype=np.int32)
    assert list(_iter_request_chunks(starts, 5)) == [(0, 2), (2, 3), (3, 4)]
    assert_in_order(
        v2.GPUModelRunner.load_model, "self.rejection_sampler = ", "RejectionSampler(self.sampler,"
    )
    assert_in_order(
        v2.GPUModelRunner.sample,
        "input_batch.num_draft_tokens == 0 or self.rejection_sampler is None",
        "self.sampler(logits, input_batch)",
        "self.rejection_sampler(",
    )


def test_v2_rows_without_anything_to_process_are_not_shown():
    assert_in_order(
        SamplerV2.apply_sampling_params,
        "if not np.any(self.needs_logits_processing[idx_mapping_np]): return logits",
        "for processor in self.logits_processors:",
    )


class FakeMemory:
    """A device of 100 bytes as `torch.accelerator` shows it; PyTorch holds what is not free."""

    def __init__(self, monkeypatch) -> None:
        self.allocated = self.peak = 0
        functions = {
            "memory_stats": lambda _device: {
                "allocated_bytes.all.peak": self.peak,
                "allocated_bytes.all.current": self.allocated,
            },
            "get_memory_info": lambda _device: (100 - self.allocated, 100),
            "memory_reserved": lambda _device: self.allocated,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": self.reset_peak,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.accelerator, name, function)
        monkeypatch.setattr(mem_utils.current_platform, "is_integrated_gpu", lambda _index: False)

    def allocate(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def reset_peak(self, _device) -> None:
        self.peak = self.allocated


def test_vllm_sizes_its_cache_by_the_memory_that_is_free_after_profiling(monkeypatch):
    """So what heads hold is counted because they are loaded before, whatever is said of them; and
    what they allocate in a step if it is held during the profile."""
    assert_in_order(
        Worker.determine_available_memory,
        "memory_profiling(",
        "self.model_runner.profile_run(",
        "self.requested_memory - profile_result.non_kv_cache_memory",
    )
    for weights_memory in (0, 30):
        memory = FakeMemory(monkeypatch)
        before = mem_utils.MemorySnapshot(device="cpu")
        memory.allocate(20)  # the model
        memory.allocate(7)  # the heads
        with mem_utils.memory_profiling(before, weights_memory) as result:
            memory.allocate(3)  # the reserve
            memory.allocate(10)
            memory.allocate(-13)
        assert result.non_kv_cache_memory == 20 + 7 + 3 + 10


def test_v2_holds_what_heads_allocate_in_a_step_while_vllm_profiles():
    reserves, is_held = [], []

    class Stock:
        def profile_run(self, randomize_inputs=False):
            is_held.extend(reserve() is not None for reserve in reserves)

    def reserve() -> torch.Tensor:
        made = torch.empty(3)
        reserves.append(weakref.ref(made))
        return made

    runner = type("Runner", (AdaptiveRunnerV2, Stock), {})()
    runner.profile_run()
    runner.adaptive = SimpleNamespace(selector=SimpleNamespace(reserve=reserve))
    runner.profile_run(randomize_inputs=True)
    assert is_held == [True] and reserves[0]() is None


def test_v2_reserves_for_the_largest_head_that_may_run_without_a_graph():
    rows = HiddenRows(8, 600, torch.float32, CPU, has_graphs=False)
    small, large = (AdaptiveHead(HeadConfig(8, (0.0, 1.0), (width,))) for width in (4, 16))
    selector = DeviceSelector({"small": small, "large": large}, 4, rows)
    assert selector.reserve().nbytes == 600 * 8 * (8 + 16 + 2)
    assert DeviceSelector({}, 4, rows).reserve().nbytes == 0


def test_v2_says_how_many_rows_a_step_can_have_and_whether_it_records_graphs():
    text = source(v2.GPUModelRunner)
    for name in ("max_num_reqs", "decode_query_len", "vocab_size", "dtype", "device"):
        assert f"self.{name}=" in text, name
    assert "self.compilation_config.cudagraph_mode" in text
    assert CUDAGraphMode.NONE.value == 0


# --- our stage, run on its own -------------------------------------------------------------------


@pytest.fixture
def single_rank(monkeypatch):
    monkeypatch.setattr(processor_v2, "adopt_choices", lambda micros: None)


def make_stage(num_slots: int = 4) -> AdaptiveTemperature:
    lens = [SimpleNamespace(gpu=torch.full((num_slots,), 3, dtype=torch.int32)) for _ in range(2)]
    slots = SimpleNamespace(prompt_len=lens[0], prefill_len=lens[1])
    seeds = SimpleNamespace(np=np.arange(num_slots, dtype=np.int64))
    rows = HiddenRows(8, num_slots, torch.float32, CPU, has_graphs=False)
    return AdaptiveTemperature(slots, seeds, DeviceSelector({}, num_slots, rows))


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


def batch_of(slots: list[int], pos: int = 2) -> SimpleNamespace:
    """What the stage reads of an `InputBatch` without drafts."""
    count = len(slots)
    mapping = torch.tensor(slots)
    return SimpleNamespace(
        idx_mapping=mapping,
        idx_mapping_np=np.array(slots),
        expanded_idx_mapping=mapping,
        cu_num_logits=torch.arange(count + 1, dtype=torch.int32),
        cu_num_logits_np=np.arange(count + 1),
        num_draft_tokens=0,
        logits_indices=torch.arange(count),
        input_ids=torch.zeros(count, dtype=torch.int32),
        positions=torch.full((count,), pos),
    )


def apply(stage: AdaptiveTemperature, logits: torch.Tensor, slots: list[int]) -> list[int] | None:
    """Run one step. Returns what left as choices, in millionths."""
    with stage.sampling(torch.zeros(len(slots), 8), batch_of(slots)):
        stage.apply(logits, context_of(slots))
        decisions = stage.take_decisions(torch.ones(len(slots), dtype=torch.int32))
    return None if decisions is None else decisions.decisions.flatten().tolist()


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
    assert logits.tolist() == [[1.0, 1.0]] and stage.take_decisions(torch.ones(1)) is None


def test_v2_stage_survives_requests_of_vllms_own_warm_up(single_rank):
    """They come before any step, in 0.33 in its memory profiling, too; later ones take their
    slots."""
    params = SamplingParams.for_sampler_warmup()
    stage = make_stage()
    assert not any(stage.add_request(slot, params) for slot in range(4))
    stage.apply_staged_writes()
    logits = torch.ones(4, 3)
    assert stage.apply(logits, context_of([0, 1, 2, 3])) is logits
    assert logits.tolist() == torch.ones(4, 3).tolist()
    stage.add_request(2, params_of(constant(0.5)))
    stage.apply_staged_writes()
    assert apply(stage, torch.ones(2, 3), [2, 0]) == [500_000, ORDINARY]


def test_v2_choice_of_a_sequence_survives_another_tenant_of_its_slot(single_rank):
    """Slots are recycled; a request that is preempted comes back in another one."""
    entropy = options_of(policy="entropy", level="sequence")
    sharp, flat = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    stage = make_stage()
    stage.add_request(1, params_of(entropy))
    stage.apply_staged_writes()
    stage.resume("a", 1, [7, 7, 7], 3)
    (first,) = apply(stage, sharp.clone(), [1])
    assert apply(stage, flat.clone(), [1]) == [first]

    stage.park("a", 1)
    stage.add_request(1, params_of(entropy))
    stage.apply_staged_writes()
    stage.resume("b", 1, [7, 7, 7], 3)
    (second,) = apply(stage, flat.clone(), [1])
    assert second != first

    stage.add_request(3, params_of(entropy))
    stage.apply_staged_writes()
    stage.resume("a", 3, [7, 7, 7, 8], 3)
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
    new = SimpleNamespace(req_id="a", prefill_token_ids=[5, 6], prompt_len=1)
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
        ("resume", "a", 3, [5, 6], 1),
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


# --- options that go around the front end --------------------------------------------------------


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
        assert read_options(params_of(constant(0.5), temperature=temperature), SELECTOR) is None
    assert f"its own temperature is {temperature:g}, not 1" in caplog.text
    assert read_options(params_of(constant(0.5)), SELECTOR) == constant(0.5)
    assert read_options(params_of(None, temperature=temperature), SELECTOR) is None


def test_options_for_an_unknown_head_or_of_another_make_are_ignored(caplog):
    head = dataclasses.replace(constant(0.5), policy="head", name="gone", parameters=())
    with caplog.at_level(logging.ERROR):
        assert read_options(params_of(head), SELECTOR) is None
        assert read_options(SamplingParams(extra_args={"adaptive": "token"}), SELECTOR) is None
    assert "no head 'gone'" in caplog.text
