"""The device's selector against the one in plain torch, and both against the slow reference.

Kernels run under Triton's interpreter; see tests/conftest.py.
"""

import math

import numpy as np
import pytest
import torch

from adaptive_head.decision import MILLION
from adaptive_head.head import AdaptiveHead
from adaptive_head.options import Options
from adaptive_head.selector import TemperatureSelector
from adaptive_head.slots import ORDINARY, PolicyIndex, to_micro
from adaptive_head.vllm.head_runner import HiddenRows
from adaptive_head.vllm.kernels import Batch
from adaptive_head.vllm.selector_v2 import DeviceSelector
from tests import selection as plain
from tests.selection import CPU, HEADS, VOCABULARY, WIDTH, make_options

# A float32 product may be rounded in another place: a millionth, at most two where it is scaled.
TOLERANCE = 2e-6


def make_rows(num_slots: int) -> HiddenRows:
    return HiddenRows(WIDTH, num_slots, torch.float32, CPU, has_graphs=False)


class OneRowSelector(DeviceSelector):
    """A `DeviceSelector` with the interface of `TemperatureSelector`: a row a request."""

    def __init__(self, heads, num_slots: int, device: torch.device, is_replicated=False) -> None:
        super().__init__(heads, num_slots, make_rows(num_slots), is_replicated)

    def select(self, step: plain.Step) -> torch.Tensor | None:
        num_rows, num_slots = len(step.slots), len(self.policies)
        rows = torch.arange(num_rows)
        prompt_lens = torch.zeros(num_slots, dtype=torch.int32)
        prefill_lens = torch.zeros(num_slots, dtype=torch.int32)
        prompt_lens[step.slots] = step.prompt_lens.int()
        # A row is ready where its position is the last to be fed.
        prefill_lens[step.slots] = (step.positions + 2 - step.is_ready.long()).int()
        batch = Batch(
            slots=step.slots,
            slots_np=step.slots_np,
            row_slots=step.slots,
            starts=torch.arange(num_rows + 1, dtype=torch.int32),
            starts_np=None,
            logits_indices=rows,
            input_ids=step.input_ids,
            positions=step.positions,
            prompt_lens=prompt_lens,
            prefill_lens=prefill_lens,
        )
        self.found = found = self.begin(step.hidden, batch)
        if found is None:
            return None
        found.join()
        found.choose_by_logits(step.logits, 0)
        found.end(step.is_ready.int())
        temperatures = (found.micros / MILLION).float()
        return temperatures.masked_fill(found.micros == ORDINARY, math.nan)

    def find_abstained(self, _step: plain.Step) -> torch.Tensor | None:
        return self.found.find_abstained()


@pytest.fixture
def on_device(monkeypatch):
    """Lets the simulation of tests/test_selector.py drive the device's selector."""
    monkeypatch.setattr(plain, "TemperatureSelector", OneRowSelector)


@pytest.mark.parametrize("seed", range(4))
def test_random_batches_agree_with_the_reference(on_device, seed):
    simulation = plain.Simulation(seed)
    assert isinstance(simulation.selector, OneRowSelector)
    for _ in range(40):
        simulation.step()


def test_two_selectors_agree_to_the_millionth():
    """Not the reference, which is in float64, but torch, row for row and step for step."""
    rng = np.random.default_rng(3)
    selectors = [TemperatureSelector(HEADS, 32, CPU), OneRowSelector(HEADS, 32, CPU)]
    simulation = plain.Simulation(9)
    everything = [plain.random_options(simulation.rng) for _ in range(32)]
    tokens = [rng.integers(1, VOCABULARY, size=5).tolist() for _ in everything]
    rows = [
        [
            plain.add(selector, slot, options, tokens=list(tokens[slot]), seed=slot)
            for slot, options in enumerate(everything)
        ]
        for selector in selectors
    ]
    for _ in range(6):
        hidden = rng.normal(size=(32, WIDTH)).astype(np.float32) * 3
        logits = rng.normal(size=(32, VOCABULARY)).astype(np.float32) * 4
        next_tokens = rng.integers(1, VOCABULARY, size=32).tolist()
        chosen = []
        for index, selector in enumerate(selectors):
            for row, h, line in zip(rows[index], hidden, logits, strict=True):
                row.hidden, row.logits = h, line
            chosen.append(to_micro(selector.select(plain.make_step(rows[index]))))
            rows[index] = [
                plain.generate(row, token)
                for row, token in zip(rows[index], next_tokens, strict=True)
            ]
        assert (chosen[0] - chosen[1]).abs().max() <= 20
        exact = [
            o is None or (o.policy in ("head", "constant", "two_phase") and o.select != "mean")
            for o in everything
        ]
        assert torch.equal(chosen[0][exact], chosen[1][exact])
    torch_counts, device_counts = (selector.count_choices() for selector in selectors)
    assert torch_counts == device_counts
    assert any(sum(head.counts.values()) for head in device_counts)


def test_a_batch_of_one_head_needs_no_other_kernel(monkeypatch, on_device):
    monkeypatch.setattr("adaptive_head.vllm.selector_v2.choose_by_policy", None)
    selector = OneRowSelector(HEADS, 2, CPU)
    rows = [plain.add(selector, slot, make_options("head", "first")) for slot in (0, 1)]
    expected = [plain.slow_temperature(row) for row in rows]
    assert plain.select(selector, *rows) == pytest.approx(expected, abs=TOLERANCE)


def test_an_ordinary_batch_launches_nothing(monkeypatch):
    selector = OneRowSelector(HEADS, 2, CPU)
    rows = [plain.add(selector, slot, None) for slot in (0, 1)]
    for name in ("choose_by_policy", "choose_by_head", "commit"):
        monkeypatch.setattr(f"adaptive_head.vllm.selector_v2.{name}", None)
    assert selector.select(plain.make_step(rows)) is None


def test_a_removed_head_takes_no_requests_and_disturbs_none():
    selector = OneRowSelector({"h": plain.make_constant_head(0.1)}, 3, CPU)
    selector.add_head("h", 1, plain.make_constant_head(0.9))
    aborted = plain.add(selector, 0, make_options("head", "h"))
    other = plain.add(selector, 1, make_options("head", "h", generation=1))
    selector.remove_head("h", 0)
    assert plain.select(selector, aborted, other) == pytest.approx([1.0, 0.9])
    # And where nothing else is in the batch.
    assert plain.select(selector, aborted) == [1.0]


def test_a_broken_hidden_state_still_chooses_a_temperature_of_the_head():
    plain.check_broken_states(OneRowSelector)


def test_heads_beyond_the_first_tables_are_counted():
    heads = {f"h{index}": plain.make_constant_head(0.25 + index) for index in range(9)}
    selector = OneRowSelector(heads, 9, CPU)
    rows = [
        plain.add(selector, slot, make_options("head", name)) for slot, name in enumerate(heads)
    ]
    expected = [0.25 + index for index in range(9)]
    assert plain.select(selector, *rows) == pytest.approx(expected, abs=TOLERANCE)
    for index, head in enumerate(selector.count_choices()):
        assert (head.name, head.counts) == (f"h{index}", {0.0: 0, 0.25 + index: 1})


def test_warming_up_leaves_no_trace():
    selector = OneRowSelector(HEADS, 4, CPU)
    selector.warm_up(VOCABULARY)
    assert (selector.policies == ORDINARY).all() and selector.chosen.isnan().all()
    assert not selector.counts.any() and (selector.phases.recent == -1).all()


# --- drafts --------------------------------------------------------------------------------------


def make_draft_batch(
    selector: DeviceSelector, requests: list[tuple[int, list[int], int]], prompt_len: int
) -> Batch:
    """A step in which each (slot, tokens, position of the first) has a row a token."""
    counts = [len(tokens) for _, tokens, _ in requests]
    slots = torch.tensor([slot for slot, _, _ in requests])
    starts = np.cumsum([0, *counts]).astype(np.int32)
    lens = torch.full((len(selector.policies),), prompt_len, dtype=torch.int32)
    positions = [first + i for _, tokens, first in requests for i in range(len(tokens))]
    return Batch(
        slots=slots,
        slots_np=slots.numpy(),
        row_slots=slots.repeat_interleave(torch.tensor(counts)),
        starts=torch.from_numpy(starts),
        starts_np=starts,
        logits_indices=torch.arange(int(starts[-1])),
        input_ids=torch.tensor([t for _, tokens, _ in requests for t in tokens]),
        positions=torch.tensor(positions),
        prompt_lens=lens,
        prefill_lens=lens,
    )


def step_with_drafts(selector, requests, prompt_len, hidden, num_sampled) -> list[float]:
    found = selector.begin(hidden, make_draft_batch(selector, requests, prompt_len))
    found.join()
    found.end(torch.tensor(num_sampled, dtype=torch.int32))
    return (found.micros / MILLION).tolist()


def test_requests_with_and_without_drafts_share_a_step():
    selector = OneRowSelector(HEADS, 3, CPU)
    plain.add(selector, 0, make_options("schedule", parameters=(1.0, 0.0, 4.0)), tokens=[1])
    plain.add(selector, 1, None)
    plain.add(selector, 2, make_options())
    requests = [(2, [3], 1), (0, [1, 2, 3], 1), (1, [4, 4], 1)]
    chosen = step_with_drafts(selector, requests, 1, torch.zeros(6, WIDTH), [1, 2, 1])
    assert chosen == pytest.approx([0.7, 0.75, 0.5, 0.25, -1e-6, -1e-6])


def test_an_unfinished_prefill_commits_nothing():
    selector = OneRowSelector(HEADS, 1, CPU)
    plain.add(selector, 0, make_options(level="sequence"), tokens=[1, 2])
    step_with_drafts(selector, [(0, [1], 0)], 2, torch.zeros(1, WIDTH), [0])
    assert selector.chosen.isnan().all()


# --- ranks ---------------------------------------------------------------------------------------


def test_where_ranks_are_replicated_slots_move_on_by_what_was_broadcast():
    """Rank 1 draws by a seed of its own; what counts for its next token is rank 0's choice."""
    options = make_options("head", "first", level="sequence", select="sample")
    ranks = [OneRowSelector(HEADS, 1, CPU, is_replicated=True) for _ in range(2)]
    micros = []
    for seed in range(40):
        steps = []
        for rank, selector in enumerate(ranks):
            row = plain.add(selector, 0, options, seed=1000 * rank + seed)
            step = plain.make_step([row])
            batch = make_draft_batch(selector, [(0, [3], 2)], 3)
            steps.append(selector.begin(step.hidden, batch))
        micros.append(tuple(step.micros.item() for step in steps))
        steps[1].micros.copy_(steps[0].micros)
        for step in steps:
            step.end(torch.ones(1, dtype=torch.int32))
        assert torch.equal(ranks[0].chosen, ranks[1].chosen)
    assert any(first != second for first, second in micros)


def test_the_network_is_copied():
    head: AdaptiveHead = HEADS["first"]
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    selector = OneRowSelector({"h": head}, 1, CPU)
    for parameter in selector._runners[PolicyIndex.FIRST_HEAD]._network.parameters():
        parameter.data.zero_()
    assert all(torch.equal(head.state_dict()[name], before[name]) for name in before)


def test_options_of_every_kind_fit_the_tables():
    selector = OneRowSelector(HEADS, 1, CPU)
    assert selector.can_serve(make_options("head", "second"))
    assert not selector.can_serve(Options("head", "third", "token", "argmax", 1.0, 0.0, 10.0))
