import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_head.head import AdaptiveHead
from adaptive_head.options import Options
from adaptive_head.selector import TemperatureSelector
from adaptive_head.slots import ORDINARY, PolicyIndex, to_micro
from tests.selection import (
    CPU,
    FIXED,
    HEADS,
    LEVELLED,
    MARKER,
    START,
    VOCABULARY,
    WIDTH,
    Request,
    Row,
    Simulation,
    add,
    approximately,
    check_broken_states,
    generate,
    is_thinking_over,
    make_constant_head,
    make_head,
    make_options,
    make_step,
    select,
    slow_temperature,
)


@pytest.mark.parametrize("seed", range(10))
def test_random_batches_agree_with_the_reference(seed):
    simulation = Simulation(seed)
    for _ in range(80):
        simulation.step()
    assert len(simulation.free) + len(simulation.running) == 16


@pytest.fixture
def selector() -> TemperatureSelector:
    return TemperatureSelector(HEADS, 8, CPU)


def test_a_broken_hidden_state_still_chooses_a_temperature_of_the_head():
    check_broken_states(TemperatureSelector)


def test_a_mean_of_nothing_but_zero_is_greedy():
    head = make_constant_head(1.0)
    with torch.no_grad():
        head.layers[-1].bias.neg_()
    selector = TemperatureSelector({"h": head}, 1, CPU)
    row = add(selector, 0, make_options("head", "h", select="mean"))
    assert select(selector, row) == [0.0]


def test_an_ordinary_batch_returns_nothing(selector):
    rows = [add(selector, slot, None) for slot in (0, 3)]
    assert selector.select(make_step(rows)) is None
    assert selector.find_present(np.array([0, 3, 5])) == [ORDINARY]


def test_a_selector_without_heads_serves_the_policies():
    selector = TemperatureSelector({}, 2, CPU)
    assert select(selector, add(selector, 1, make_options())) == approximately([0.7])


def test_a_replaced_head_serves_those_that_have_it_beside_its_successor():
    selector = TemperatureSelector({"h": make_constant_head(0.1)}, 4, CPU)
    old, seeded = (add(selector, slot, make_options("head", "h")) for slot in (0, 1))
    selector.add_head("h", 1, make_constant_head(0.9))
    new = add(selector, 2, make_options("head", "h", generation=1))
    assert select(selector, old, new, seeded) == approximately([0.1, 0.9, 0.1])
    again = add(selector, 3, make_options("head", "h"))
    assert select(selector, again, new) == approximately([0.1, 0.9])


def test_a_removed_head_takes_no_requests_and_disturbs_none():
    selector = TemperatureSelector({"h": make_constant_head(0.1)}, 3, CPU)
    selector.add_head("h", 1, make_constant_head(0.9))
    aborted = add(selector, 0, make_options("head", "h"))
    other = add(selector, 1, make_options("head", "h", generation=1))
    selector.remove_head("h", 0)
    assert not selector.can_serve(make_options("head", "h"))
    assert selector.can_serve(make_options("head", "h", generation=1))
    # A step that was under way when its request was aborted must not raise in a worker.
    assert select(selector, aborted, other)[1] == pytest.approx(0.9)
    selector.add_head("h", 2, make_constant_head(0.5))
    assert select(selector, other) == approximately([0.9])
    selector.remove_head("h", 0)
    selector.remove_head("unknown", 3)


def test_a_head_that_is_not_loaded_cannot_be_added(selector):
    with pytest.raises(KeyError):
        selector.add(0, make_options("head", "third"), 0)


def test_a_head_runs_on_its_own_rows_only():
    """Else a batch with a head for every request would take their number squared."""
    heads = {"a": make_constant_head(0.1), "b": make_constant_head(0.9)}
    num_rows = {"a": [], "b": []}
    for name, head in heads.items():
        head.register_forward_pre_hook(
            lambda _, hidden, name=name: num_rows[name].append(len(hidden[0]))
        )
    selector = TemperatureSelector(heads, 4, CPU)
    names = ["b", "a", None, "b"]
    rows = [
        add(selector, slot, name and make_options("head", name)) for slot, name in enumerate(names)
    ]
    assert select(selector, *rows) == approximately([0.9, 0.1, math.nan, 0.9])
    assert num_rows == {"a": [1], "b": [2]}


def test_ordinary_rows_are_nan_and_may_share_a_slot(selector):
    ordinary, adaptive = add(selector, 0, None), add(selector, 1, make_options())
    chosen = select(selector, ordinary, adaptive, ordinary)
    assert chosen == approximately([math.nan, 0.7, math.nan])
    assert selector.find_present(np.array([0, 1])) == [ORDINARY, PolicyIndex.CONSTANT]


def test_an_ordinary_request_in_a_recycled_slot_stays_ordinary(selector):
    add(selector, 0, make_options("constant", level="sequence"))
    recycled, adaptive = add(selector, 0, None), add(selector, 1, make_options())
    assert select(selector, recycled, adaptive) == approximately([math.nan, 0.7])
    assert not selector.is_adaptive(0)


@pytest.mark.parametrize("options", [make_options(), make_options("head", "first")])
def test_a_batch_of_one_policy_needs_no_other(selector, options):
    row = add(selector, 2, options)
    assert select(selector, row) == approximately([slow_temperature(row)])


@pytest.mark.parametrize("is_first_adaptive", [True, False])
def test_the_last_request_staged_in_a_slot_is_the_one_that_counts(selector, is_first_adaptive):
    first, last = make_options(parameters=(0.1,)), make_options(parameters=(0.9,))
    selector.add(0, first if is_first_adaptive else None, 0)
    assert select(selector, add(selector, 0, last)) == approximately([0.9])
    selector.add(0, last, 0)
    assert selector.select(make_step([add(selector, 0, None)])) is None


def test_staging_one_slot_leaves_the_others_alone(selector):
    whole = make_options("head", "first", level="sequence")
    row = add(selector, 0, whole)
    row.hidden = np.linspace(-3, 3, WIDTH, dtype=np.float32)
    (chosen,) = select(selector, row)
    selector.add(1, make_options(), 0)
    assert select(selector, generate(row, 4)) == [chosen]
    selector.flush()
    assert select(selector, generate(row, 4)) == [chosen]


def test_temperature_0_is_exactly_0(selector):
    row = add(selector, 0, make_options(parameters=(0.0,), scale=3.0))
    assert select(selector, row) == [0.0]


def test_min_lifts_temperature_0(selector):
    row = add(selector, 0, make_options(parameters=(0.0,), min=0.25))
    assert select(selector, row) == [0.25]


def test_scale_comes_before_min_and_max(selector):
    changes = [{"scale": 2.0}, {"scale": 2.0, "max": 1.0}, {"scale": 0.1, "min": 0.5}]
    rows = [add(selector, slot, make_options(**change)) for slot, change in enumerate(changes)]
    assert select(selector, *rows) == approximately([1.4, 1.0, 0.5])


@pytest.mark.parametrize(
    ("temperature", "micro"),
    [(1 / 3, 333_333), (2 / 3, 666_667), (1e-7, 0), (9.9999999, 10_000_000), (7.654321, 7_654_321)],
)
def test_temperatures_are_whole_millionths(selector, temperature, micro):
    row = add(selector, 0, make_options(parameters=(temperature,)))
    temperatures = selector.select(make_step([row]))
    assert temperatures.tolist() == [np.float32(micro / 1e6)]
    assert to_micro(temperatures).tolist() == [micro]


def test_every_millionth_survives_float32():
    micro = torch.arange(0, 10_000_001, 37, dtype=torch.int32)
    assert torch.equal(to_micro((micro / 1_000_000).float()), micro)


def test_an_ordinary_row_is_minus_one_millionth():
    assert to_micro(torch.tensor([0.5, math.nan])).tolist() == [500_000, -1]
    assert to_micro(torch.tensor([math.nan])).dtype == torch.int32


def show(row: Row, rng_seed: int) -> Row:
    row.hidden = np.random.default_rng(rng_seed).normal(size=WIDTH).astype(np.float32) * 3
    return row


def different_choices() -> tuple[int, int]:
    """Seeds of two hidden states for which the first head chooses different temperatures."""
    selector = TemperatureSelector(HEADS, 1, CPU)
    row = add(selector, 0, make_options("head", "first"))
    (first,) = select(selector, show(row, 0))
    return 0, next(seed for seed in range(1, 50) if select(selector, show(row, seed)) != [first])


def test_a_token_level_request_chooses_anew_for_every_token(selector):
    row = add(selector, 0, make_options("head", "first"))
    chosen = [select(selector, show(row, seed)) for seed in different_choices()]
    assert chosen[0] != chosen[1]


def test_a_sequence_level_request_keeps_its_first_choice(selector):
    first, other = different_choices()
    row = show(add(selector, 0, make_options("head", "first", level="sequence")), first)
    chosen = select(selector, row)
    assert chosen == approximately([slow_temperature(row)])
    assert select(selector, show(generate(row, 4), other)) == chosen


def test_where_all_have_chosen_no_head_runs(selector, monkeypatch):
    forward, calls = AdaptiveHead.forward, []
    monkeypatch.setattr(
        AdaptiveHead, "forward", lambda self, x: calls.append(len(x)) or forward(self, x)
    )
    whole = make_options("head", "first", level="sequence")
    rows = [add(selector, 0, whole), add(selector, 1, None)]
    chosen = select(selector, *rows)
    later = [generate(row, 4) for row in rows]
    assert select(selector, *later) == approximately(chosen)
    assert calls == [1]
    # One that is new, or chooses at every token, and the heads run again.
    assert len(select(selector, *later, add(selector, 2, whole))) == 3
    assert len(calls) == 2
    assert len(select(selector, *later, add(selector, 3, make_options("head", "first")))) == 3
    assert len(calls) == 3


def test_an_unfinished_prefill_makes_no_sequence_choice(selector):
    first, other = different_choices()
    row = show(add(selector, 0, make_options("head", "first", level="sequence")), first)
    row.is_ready = False
    unfinished = select(selector, row)
    row.is_ready = True
    assert select(selector, show(row, other)) != unfinished


def test_a_recycled_slot_forgets_the_sequence_choice(selector):
    first, other = different_choices()
    whole = make_options("head", "first", level="sequence")
    earlier = select(selector, show(add(selector, 0, whole), first))
    assert select(selector, show(add(selector, 0, whole), other)) != earlier


def test_a_preempted_request_finds_its_choice_again_in_another_slot(selector):
    first, other = different_choices()
    whole = make_options("head", "first", level="sequence")
    row = show(add(selector, 0, whole), first)
    chosen = select(selector, row)
    parked = selector.park(0)
    add(selector, 0, make_options(parameters=(1.9,), level="sequence"))
    resumed = show(add(selector, 5, whole), other)
    selector.restore(5, parked)
    assert select(selector, resumed) == chosen


def test_what_is_parked_does_not_change_with_its_slot(selector):
    row = add(selector, 0, make_options(level="sequence"))
    select(selector, row)
    parked = selector.park(0)
    select(selector, add(selector, 0, make_options(parameters=(1.9,), level="sequence")))
    assert parked.chosen.item() == pytest.approx(0.7)


def test_a_request_preempted_before_its_choice_has_none_to_restore(selector):
    whole = make_options(level="sequence")
    add(selector, 0, whole)
    parked = selector.park(0)
    assert parked.chosen.isnan()
    resumed = add(selector, 1, whole)
    selector.restore(1, parked)
    assert select(selector, resumed) == approximately([0.7])


def test_thinking_ends_with_the_marker_and_begins_again_with_the_start(selector):
    row = add(selector, 0, make_options("two_phase"))
    chosen = select(selector, row)
    for token in (4, MARKER, 4, 4, START, 4, MARKER):
        row = generate(row, token)
        chosen += select(selector, row)
    assert chosen == approximately([1.0, 1.0, 0.3, 0.3, 0.3, 1.0, 1.0, 0.3])


@pytest.mark.parametrize(
    ("prompt", "temperature"),
    [
        ([1, 2, 3], 1.0),
        ([MARKER], 0.3),
        ([START], 1.0),
        ([START, 1, MARKER, 2], 0.3),
        ([START, 1, MARKER, 2, 3, START], 1.0),
        ([START, 1, MARKER, 2, 3, START, MARKER], 0.3),
        ([MARKER, 1, MARKER, 2, START, 1], 1.0),
        ([], 1.0),
    ],
)
def test_the_prompt_s_last_marker_says_which_phase_begins(selector, prompt, temperature):
    # One more token, so that the prompt is told by `start_phase` alone.
    row = add(selector, 0, make_options("two_phase"), tokens=[*prompt, 4])
    assert select(selector, row) == approximately([temperature])


@pytest.mark.parametrize(
    ("num_written", "chosen"),
    [(0, [1.0, 1.0]), (1, [1.0, 0.3]), (2, [1.0, 0.3]), (5, [1.0, 0.3]), (6, [0.3, 0.3])],
)
def test_a_marker_counts_where_it_is_written_and_not_in_an_example(selector, num_written, chosen):
    # An example's marker of two tokens, and at the end of the prompt the first half of another.
    options = make_options("two_phase", marker_token_ids=(1, MARKER), num_written=num_written)
    row = add(selector, 0, options, tokens=[4, 1, MARKER, 4, 4, 4, 1])
    found = select(selector, row)
    assert found + select(selector, generate(row, MARKER)) == approximately(chosen)


def test_without_a_start_token_an_answer_stays_an_answer(selector):
    options = make_options("two_phase", start_token_ids=())
    row = add(selector, 0, options, tokens=[START, MARKER, START, 4])
    assert select(selector, row) == approximately([0.3])
    assert select(selector, generate(row, START)) == approximately([0.3])


def test_a_marker_inside_an_unfinished_prefill_is_read_from_the_prompt_only(selector):
    # The prompt thinks again after its marker, which a chunk of the prefill happens to end with.
    row = add(selector, 0, make_options("two_phase"), tokens=[1, MARKER, START, 4])
    chunk = Row(row.request, 0, position=1, is_ready=False)
    select(selector, chunk)
    assert select(selector, row) == approximately([1.0])


def test_another_slot_s_marker_is_not_mine(selector):
    mine = add(selector, 0, make_options("two_phase"))
    other = add(selector, 1, make_options("two_phase"), tokens=[1, MARKER])
    assert select(selector, mine, other) == approximately([1.0, 0.3])
    assert select(selector, generate(mine, 4), generate(other, 4)) == approximately([1.0, 0.3])


def test_a_recycled_slot_thinks_anew(selector):
    add(selector, 0, make_options("two_phase"), tokens=[1, MARKER])
    selector.add(0, make_options("two_phase"), 0)
    selector.flush()
    assert select(selector, Row(Request(None, 0, [1], 1), 0, 0)) == approximately([1.0])


def test_several_slots_have_markers_of_their_own(selector):
    markers = [(MARKER,), (1, MARKER), (1, 1, MARKER), (MARKER, MARKER), ()]
    rows = [
        add(selector, slot, make_options("two_phase", marker_token_ids=marker), tokens=[1])
        for slot, marker in enumerate(markers)
    ]
    rows.append(add(selector, 6, make_options(), tokens=[1]))
    select(selector, *rows)
    chosen = []
    for token in (MARKER, MARKER, START, 1, 1, MARKER):
        rows = [generate(row, token) for row in rows]
        chosen.append(select(selector, *rows))
    assert chosen == [
        approximately([0.3, 0.3, 1.0, 1.0, 1.0, 0.7]),
        approximately([0.3, 0.3, 1.0, 0.3, 1.0, 0.7]),
        *[approximately([1.0, 1.0, 1.0, 1.0, 1.0, 0.7])] * 3,
        approximately([0.3, 0.3, 0.3, 1.0, 1.0, 0.7]),
    ]


def keep(_selector: TemperatureSelector, row: Row) -> Row:
    return row


def recompute(selector: TemperatureSelector, row: Row) -> Row:
    """Preempt a request the way of the V1 runner: it keeps its slot and is prefilled anew."""
    for position in range(row.position):
        select(selector, replace(row, position=position, is_ready=False))
    return row


def resume(selector: TemperatureSelector, row: Row) -> Row:
    """Preempt a request the way of the V2 runner: it comes back, all prompt, to another slot."""
    request = row.request
    moved = add(
        selector,
        row.slot + 1,
        request.options,
        tokens=request.tokens,
        prompt_len=request.prompt_len,
    )
    add(selector, row.slot, make_options("two_phase", marker_token_ids=(1,)), tokens=[1])
    return recompute(selector, moved)


INTERRUPTIONS = [keep, recompute, resume]


def assert_phases(options: Options, tokens: list[int], prompt_len: int, interruptions) -> None:
    """Compare with the reference, where interruption i comes before generated token i + 1."""
    selector = TemperatureSelector({}, len(tokens) + 1, CPU)
    row = add(selector, 0, options, tokens=tokens[:prompt_len])
    chosen = select(selector, row)
    for token, interrupt in zip(tokens[prompt_len:], interruptions, strict=True):
        row = interrupt(selector, generate(row, token))
        chosen += select(selector, row)
    first = max(0, prompt_len - options.num_written)
    texts = [tokens[first:length] for length in range(prompt_len, len(tokens) + 1)]
    over = [options.parameters[is_thinking_over(text, options)] for text in texts]
    assert chosen == approximately(over)


A, B, C, D = 1, 2, 3, 4


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
@pytest.mark.parametrize(
    ("end", "start", "tokens", "num_over"),
    [
        ((A, A, B), (), [A, A, A, B, C], 2),
        ((A, A, A), (), [A, A, B, A, A, A, A], 2),
        ((A, B, A, B, C), (), [A, B, A, B, A, B, C, D], 2),
        ((A, B, C), (), [A, B, D, C, A, C, B, C], 0),
        ((A, B, C), (D, B, C), [D, B, C, A, B, C, D, B, C, A, B, C, A], 5),
        ((A, B), (B, A), [C, A, B, A, B, A, C], 2),
        ((A, B, C), (B,), [A, B, C, B, A, B, C, D], 3),
        ((C,), (A, B), [A, C, B, A, B, C], 4),
        ((A, B, C, D, D, C, B, A), (D, D), [A, A, B, C, D, D, C, B, A, B, D], 3),
        ((), (A,), [A, B, C], 0),
        # Identifiers that a float32 does not tell apart.
        ((1 << 24, (1 << 31) - 1), (), [(1 << 24) + 1, (1 << 31) - 1, 1 << 24, (1 << 31) - 1], 1),
        # Both end at the same token: an unknown word, to a tokenizer that knows neither.
        ((A, B), (B,), [A, B, C, B, C], 2),
        ((A,), (A,), [B, A, B], 2),
    ],
)
def test_a_marker_is_found_wherever_the_prompt_ends(interrupt, end, start, tokens, num_over):
    options = make_options("two_phase", marker_token_ids=end, start_token_ids=start)
    lengths = range(1, len(tokens) + 1)
    assert sum(is_thinking_over(tokens[:length], options) for length in lengths) == num_over
    for prompt_len in lengths:
        for num_written in range(prompt_len + 1):
            one = replace(options, num_written=num_written)
            assert_phases(one, tokens, prompt_len, [interrupt] * (len(tokens) - prompt_len))


@settings(max_examples=300, **FIXED)
@given(st.data())
def test_any_markers_are_found_through_any_interruptions(data):
    letters = st.integers(0, 1)
    options = make_options(
        "two_phase",
        marker_token_ids=tuple(data.draw(st.lists(letters, max_size=8))),
        start_token_ids=tuple(data.draw(st.lists(letters, max_size=8))),
        num_written=data.draw(st.integers(0, 12)),
    )
    pieces = st.lists(letters, max_size=3) | st.sampled_from(
        [list(options.marker_token_ids), list(options.start_token_ids)]
    )
    tokens = sum(data.draw(st.lists(pieces, max_size=6)), [0])
    prompt_len = data.draw(st.integers(1, len(tokens)))
    num_generated = len(tokens) - prompt_len
    interruptions = st.lists(
        st.sampled_from(INTERRUPTIONS), min_size=num_generated, max_size=num_generated
    )
    assert_phases(options, tokens, prompt_len, data.draw(interruptions))


def test_a_recycled_slot_forgets_half_a_marker(selector):
    options = make_options("two_phase", marker_token_ids=(1, MARKER))
    add(selector, 0, options, tokens=[1, 1])
    assert select(selector, add(selector, 0, options, tokens=[MARKER])) == approximately([1.0])
    add(selector, 0, options, tokens=[1, 1])
    selector.add(0, options, 0)
    selector.flush()
    assert select(selector, Row(Request(None, 0, [MARKER], 1), 0, 0)) == approximately([1.0])


def test_growing_keeps_half_a_marker(selector):
    options = make_options("two_phase", marker_token_ids=(1, 2, MARKER))
    row = add(selector, 3, options, tokens=[1])
    select(selector, row)
    select(selector, row := generate(row, 2))
    selector.grow()
    added = add(selector, 12, options, tokens=[1, 2, MARKER])
    assert select(selector, generate(row, MARKER), added) == approximately([0.3, 0.3])


def test_nothing_waits_for_the_device(monkeypatch):
    # A tensor without data: whatever the host would read of it raises.
    meta = torch.device("meta")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    selector = TemperatureSelector({"first": make_head((0.0, 1.0), seed=1)}, 2, meta)
    batch = [make_options("two_phase"), make_options("head", "first", select="sample")]
    rows = [add(selector, slot, options) for slot, options in enumerate(batch)]
    selector.grow()
    step = make_step([*rows, add(selector, 2, None)])
    tensors = {k: v.to(meta) for k, v in vars(step).items() if isinstance(v, torch.Tensor)}
    assert selector.select(replace(step, **tensors)).shape == (3,)


def test_start_phase_means_nothing_to_other_requests(selector):
    rows = [add(selector, 0, make_options(), tokens=[MARKER]), add(selector, 1, None)]
    selector.start_phase(1, [MARKER], 1)
    assert select(selector, *rows) == approximately([0.7, math.nan])


def test_the_schedule_starts_with_the_first_generated_token(selector):
    row = add(selector, 0, make_options("schedule", parameters=(1.0, 0.0, 4.0)), tokens=[1] * 9)
    chosen = select(selector, row)
    for _ in range(6):
        row = generate(row, 4)
        chosen += select(selector, row)
    assert chosen == approximately([1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0])


def sampled(selector: TemperatureSelector, slot: int, seed: int | None) -> list[float]:
    selector.add(slot, make_options("head", "first", select="sample"), seed)
    selector.flush()
    request = Request(None, 0, [1] * 40, prompt_len=1)
    return [select(selector, Row(request, slot, position))[0] for position in range(40)]


def test_the_same_seed_draws_the_same_in_any_slot(selector):
    draws = sampled(selector, 0, seed=11)
    assert sampled(selector, 6, seed=11) == draws
    assert sampled(selector, 0, seed=12) != draws
    assert len(set(draws)) > 2


def test_requests_without_a_seed_draw_differently(selector):
    assert sampled(selector, 0, seed=None) != sampled(selector, 0, seed=None)


def test_growing_keeps_what_the_slots_hold(selector):
    first, other = different_choices()
    whole = show(add(selector, 0, make_options("head", "first", level="sequence")), first)
    phase = add(selector, 7, make_options("two_phase"), tokens=[MARKER])
    chosen = select(selector, whole, phase)
    selector.add(1, make_options(parameters=(0.9,)), 0)  # Still staged while the table grows.
    assert selector.grow() == range(8, 16)
    selector.flush()
    staged = Row(Request(None, 0, [1], 1), slot=1, position=0)
    added = add(selector, 15, make_options(parameters=(0.1,)))
    rows = [show(generate(whole, 4), other), generate(phase, 4), staged, added]
    assert select(selector, *rows) == approximately([*chosen, 0.9, 0.1])
    assert not selector.is_adaptive(14)


temperatures = st.floats(0.0, 10.0)


@st.composite
def any_options(draw) -> Options | None:
    policy = draw(st.sampled_from(["ordinary", "head", "entropy", "schedule", "two_phase"]))
    if policy == "ordinary":
        return None
    parameters = {
        "head": (),
        "entropy": (draw(temperatures), draw(st.floats(0, 100))),
        "schedule": (draw(temperatures), draw(temperatures), float(draw(st.integers(1, 10**7)))),
        "two_phase": (draw(temperatures), draw(temperatures)),
    }
    low, high = sorted([draw(temperatures), draw(temperatures)])
    return make_options(
        policy,
        draw(st.sampled_from(list(HEADS))) if policy == "head" else None,
        select=draw(st.sampled_from(["argmax", "sample", "mean"])),
        level=draw(st.sampled_from(["token", "sequence"] if policy in LEVELLED else ["token"])),
        scale=draw(st.floats(1e-6, 10.0)),
        min=low,
        max=high,
        parameters=parameters[policy],
    )


@settings(max_examples=150, **FIXED)
@given(st.lists(any_options(), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_any_row_is_within_its_bounds_and_independent_of_its_batch(batch, seed):
    numbers = np.random.default_rng(seed)
    together, apart = (TemperatureSelector(HEADS, 8, CPU) for _ in range(2))
    rows = []
    for slot, options in enumerate(batch):
        tokens = numbers.integers(1, VOCABULARY, size=5).tolist()
        row = show(add(together, slot, options, tokens=tokens, seed=seed + slot), seed + slot)
        row.logits = (numbers.normal(size=VOCABULARY) * 5).astype(np.float32)
        rows.append(row)
    chosen = together.select(make_step(rows))
    if chosen is None:
        assert not any(batch)
        return
    assert torch.equal(chosen.isnan(), torch.tensor([options is None for options in batch]))
    micros = to_micro(chosen)
    for options, row, micro in zip(batch, rows, micros.tolist(), strict=True):
        if options is not None:
            assert options.min - 2e-6 <= micro / 1e6 <= options.max + 2e-6
            add(apart, 0, options, tokens=row.request.tokens, seed=row.request.seed)
            alone = Row(row.request, 0, row.position, True, row.hidden, row.logits)
            assert to_micro(apart.select(make_step([alone]))).tolist() == [
                pytest.approx(micro, abs=1)
            ]


def test_a_seed_beyond_int64_wraps_around(selector):
    """vLLM gives the n-th choice of a request its seed plus n."""
    options = make_options("constant", select="sample")
    for seed in (1 << 63, -(1 << 63) - 1, (1 << 63) - 1):
        selector.add(0, options, seed)
    selector.flush()
