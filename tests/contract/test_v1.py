"""What the V1 runner and its sampler assume of vLLM. No engine is started."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as SamplerV1
from vllm.v1.worker import gpu_model_runner as v1
from vllm.v1.worker.gpu_input_batch import InputBatch as InputBatchV1

from adaptive_head.selector import ORDINARY, TemperatureSelector, to_micro
from adaptive_head.vllm.compat import UnsupportedError, refuse_v1
from adaptive_head.vllm.runner_v1 import AdaptiveRunnerV1, AdaptiveSamplerV1
from tests.contract.helpers import CPU, assert_in_order, constant, params_of, source


def test_v1_is_refused_on_a_gpu_and_in_parallel():
    refuse_v1("cpu", 1)
    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        refuse_v1("cuda", 1)
    with pytest.raises(UnsupportedError, match="--tensor-parallel-size"):
        refuse_v1("cpu", 2)


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


def test_v1_hears_of_the_end_of_a_request_before_its_namesake_begins():
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
        req_id=req_id,
        sampling_params=params_of(options, **fields),
        prompt_token_ids=[1, 2, 3],
        prompt_len=3,
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
    assert set(runner._slots) == {"c"} and not runner.selector.is_adaptive(slot)
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


def make_step(num_rows):
    """What the runner tells the sampler of rows whose slots are 0, 1, 2, …"""
    return {
        "slots": torch.arange(num_rows),
        "slots_np": np.arange(num_rows),
        "hidden": torch.zeros(num_rows, 8),
        "input_ids": torch.zeros(num_rows, dtype=torch.int64),
        "positions": torch.full((num_rows,), 2),
        "prompt_lens": torch.full((num_rows,), 3),
        "is_ready": torch.ones(num_rows, dtype=torch.bool),
    }


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
    ours.step = make_step(3)
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


@pytest.mark.parametrize("fixed", [0.0, 0.6])
def test_v1_greedy_rows_cost_a_pass_over_themselves_only(monkeypatch, fixed):
    """And come out as vLLM's: the first of equal maxima. 1e-6 is not 0, and all but greedy."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 20] = logits[1, 30] = 9.0
    selector = TemperatureSelector({}, 4, CPU)
    for slot, temperature in ((1, 0.0), (2, 1e-6)):
        selector.add(slot, constant(temperature), None)
    selector.flush()
    ours = AdaptiveSamplerV1(SamplerV1(), selector)
    num_rows = []

    def count_rows(rows):
        num_rows.append(len(rows))
        return SamplerV1.greedy_sample(rows)

    monkeypatch.setattr(ours, "greedy_sample", count_rows)
    for seed in range(5):
        ours.step = make_step(3)
        found = ours(logits.clone(), make_metadata([fixed, 1.0, 1.0], [seed])).sampled_token_ids
        stock = SamplerV1()(logits.clone(), make_metadata([fixed, 1.0, 1.0], [seed]))
        assert found[0] == stock.sampled_token_ids[0]
        assert found[1:, 0].tolist() == [20, logits[2].argmax()]
    assert num_rows == ([3, 1] if fixed == 0.0 else [1]) * 5


def test_v1_choices_leave_with_the_output_of_their_batch():
    runner = RunnerV1(3)
    runner.load_heads({})
    runner._update_states(step_of(new_request("b", constant(0.5)), new_request("a", None)))
    runner.execute_model_state = SimpleNamespace(sample_hidden_states=torch.zeros(3, 8))
    runner.metadata = make_metadata([0.7, 1.0, 0.0], [])
    choices = runner.sample_tokens(None).sampling_masks
    assert [choices.get(row, 1) for row in range(3)] == [None, [(500_000,)], None]
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
