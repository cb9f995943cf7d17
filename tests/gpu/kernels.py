"""The kernels against torch: what chooses temperatures, and what applies them."""

import math
from typing import Any

import torch

from adaptive_head import policies
from adaptive_head.decision import MILLION
from adaptive_head.slots import ORDINARY, SlotTable
from adaptive_head.vllm.kernels import Choices, choose_by_entropy, scale_logits
from adaptive_head.vllm.kernels.batch import PENDING
from tests.gpu.steps import Place, Record, Walk, can_capture, make_selector, run_step
from tests.gpu.texts import (
    PROMPT_LEN,
    find_tolerances,
    list_options,
    make_heads,
    make_options,
    make_texts,
    pick_sizes,
    run_plain,
    split_steps,
)


def compare_selectors(device: str, dtype: str) -> dict[str, Any]:
    """Every policy, level, selection and kind of bounds, with drafts and without, in batches of
    changing composition, on the device and in torch. Heads run with graphs and without."""
    where = torch.device(device)
    sizes = pick_sizes(where)
    heads = make_heads(sizes)
    texts = make_texts(heads, list_options(heads, sizes), sizes, getattr(torch, dtype), where)
    expected, expected_counts = run_plain(texts, heads)
    figures: dict[str, Any] = {"requests": texts.num_requests, "margin": texts.min_margin}
    record = Record(expected, find_tolerances(texts.options, dtype == "bfloat16"))
    for has_graphs in (True, False) if can_capture(where) else (False,):
        for has_drafts in (False, True):
            selector = make_selector(texts, has_graphs, 6 * texts.num_requests)
            walk = Walk(texts, selector)
            walk.admit(range(texts.num_requests))
            if not has_drafts:
                _feed_prompts(walk)
            while walk.unfinished:
                _walk_on(walk, has_drafts, record)
            assert selector.count_choices() == expected_counts, "choices are counted wrongly"
    return figures | record.compare()


def _feed_prompts(walk: Walk) -> None:
    """A part of each prompt, which samples nothing and must leave no trace."""
    places = [
        Place(request, slot, PROMPT_LEN - 2, is_sampled=False)
        for request, slot in walk.slots.items()
    ]
    run_step(walk.selector, walk.prepare(places))


def _walk_on(walk: Walk, has_drafts: bool, record: Record) -> None:
    """A few steps of each kind; then some requests are preempted."""
    for requests in split_steps(walk.rng, walk.unfinished, walk.texts):
        requests = [request for request in requests if request in walk.unfinished]
        if requests:
            places = [walk.place(request, has_drafts) for request in requests]
            step = walk.prepare(places, has_drafts)
            record.add(step, run_step(walk.selector, step))
    for request in walk.unfinished:
        if walk.rng.random() < 0.2:
            walk.move(request)


def compare_logits(device: str) -> dict[str, Any]:
    """The division by temperatures, and the entropy of logits, against torch."""
    where = torch.device(device)
    vocab_size = pick_sizes(where).vocab_size
    micros = torch.tensor(
        [ORDINARY, 0, 300_000, MILLION, 1, 10_000_000, 700_000, 0], dtype=torch.int32, device=where
    )
    generator = torch.Generator(where).manual_seed(1)
    shape = (len(micros), vocab_size)
    # A slice of wider rows, as the logits of a padded vocabulary are.
    padded = torch.randn(len(micros), vocab_size + 64, generator=generator, device=where) * 9
    is_masked = torch.rand(shape, generator=generator, device=where) < 0.3
    padded[:, :vocab_size][is_masked] = -math.inf
    # Of equal maxima the first counts.
    padded[1, [3, vocab_size // 2, vocab_size - 1]] = 99.0
    before = padded.clone()
    logits = padded[:, :vocab_size]
    scale_logits(logits, micros, 0)
    assert torch.equal(padded[:, vocab_size:], before[:, vocab_size:]), "the padding was written"
    largest = 0.0
    for row, micro in enumerate(micros.tolist()):
        found, original = logits[row], before[row, :vocab_size]
        if micro == ORDINARY:
            assert torch.equal(found.view(torch.int32), original.view(torch.int32))
        elif micro == 0:
            best = int(original.argmax())
            if row == 1:
                best = 3
            assert found.isfinite().nonzero().tolist() == [[best]], "not the first maximum alone"
            assert found[best] == original[best]
        else:
            expected = original.double() / (micro / MILLION)
            assert torch.equal(found.isinf(), expected.isinf())
            is_there = expected.isfinite()
            error = (found.double() - expected)[is_there] / expected[is_there].abs().clamp_min(1e-9)
            largest = max(largest, error.abs().max().item())
    assert largest < 1e-6, f"a scaled logit is off by {largest:.1e} of itself"
    return {"scale_error": largest, **_compare_entropy(before[:, :vocab_size], where)}


def _compare_entropy(logits: torch.Tensor, where: torch.device) -> dict[str, float]:
    table = SlotTable({}, 2, where)
    for slot, theta in enumerate((0.5, 3.0)):
        table.add(slot, make_options("entropy", parameters=(1.2, theta)), seed=0)
    table.flush()
    num_rows = len(logits)
    row_slots = torch.arange(num_rows, device=where) % 2
    choices = Choices.make(num_rows, where)
    choices.micros.fill_(PENDING)
    logits = torch.cat([logits[:-1], torch.full_like(logits[:1], -math.inf)])
    choose_by_entropy(choices, row_slots, table, logits, 0)
    thetas = torch.tensor([0.5, 3.0], dtype=torch.float64, device=where)[row_slots]
    exact = policies.entropy_temperature(
        logits.double(), torch.full_like(thetas, 1.2), thetas
    ).nan_to_num(0.0)
    difference = (choices.micros.double() / MILLION - exact).abs()
    assert (difference <= 2e-5 + 2e-4 * exact).all(), "an entropy temperature differs from torch's"
    return {"entropy_error": difference.max().item()}
