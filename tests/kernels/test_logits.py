"""Kernels over logits against slow references. They run under Triton's interpreter."""

import math

import numpy as np
import pytest
import torch

from adaptive_head.decision import MILLION
from adaptive_head.slots import ORDINARY, PolicyIndex
from adaptive_head.vllm.kernels import Choices, choose_by_entropy, entropy, scale, scale_logits
from adaptive_head.vllm.kernels.batch import PENDING
from tests import reference
from tests.kernels.test_selector_v2 import OneRowSelector, make_rows
from tests.selection import CPU, make_options

INF = math.inf


@pytest.fixture(params=[8, 64, 8192])
def block(request, monkeypatch):
    """Rows of many blocks, of some that the vocabulary does not fill, and of one."""
    monkeypatch.setattr(scale, "_BLOCK", request.param)
    monkeypatch.setattr(entropy, "_BLOCK", request.param)
    return request.param


def scale_slowly(logits: list[list[float]], micros: list[int]) -> list[list[float]]:
    scaled = []
    for row, micro in zip(logits, micros, strict=True):
        if micro == ORDINARY:
            scaled.append(list(row))
        elif micro == 0:
            best = row.index(max(row))
            scaled.append([x if i == best else -INF for i, x in enumerate(row)])
        else:
            temperature = np.float32(micro / MILLION)
            scaled.append([float(np.float32(x) / temperature) for x in row])
    return scaled


def test_scale_logits_against_a_slow_reference(block):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 100, generator=generator) * 9
    logits[torch.rand(24, 100, generator=generator) < 0.3] = -INF
    logits[:, 5] = 1.25  # no row is masked entirely
    micros = torch.tensor([ORDINARY, 0, 300_000, MILLION, 1, 10_000_000] * 4, dtype=torch.int32)
    expected = scale_slowly(logits.tolist(), micros.tolist())
    scale_logits(logits, micros, 0)
    assert logits.tolist() == expected


def test_scale_logits_leaves_ordinary_rows_bit_for_bit():
    rows = torch.tensor([[0.1, -0.0, INF, -INF, 1e-45, 3.4e38]])
    result = rows.clone()
    scale_logits(result, torch.tensor([ORDINARY], dtype=torch.int32), 0)
    assert torch.equal(result.view(torch.int32), rows.view(torch.int32))


def test_scale_logits_takes_the_first_of_equal_maxima(block):
    logits = torch.full((2, 70), -3.0)
    logits[0, [9, 20, 66]] = 4.0
    logits[1, :8] = -INF
    scale_logits(logits, torch.zeros(2, dtype=torch.int32), 0)
    assert logits.isfinite().nonzero().tolist() == [[0, 9], [1, 8]]
    assert logits[0, 9] == 4.0 and logits[1, 8] == -3.0


def test_a_row_that_is_broken_or_masked_as_a_whole_stays_within_bounds(block):
    logits = torch.stack([torch.full((70,), math.nan), torch.full((70,), -INF)])
    scale_logits(logits, torch.zeros(2, dtype=torch.int32), 0)
    assert not logits.isfinite().any()


def test_parts_of_a_step_are_scaled_with_their_own_temperatures():
    """As vLLM verifies the drafts of large batches."""
    micros = torch.tensor([ORDINARY, 500_000, 250_000, 2_000_000], dtype=torch.int32)
    logits = torch.ones(4, 3)
    scale_logits(logits[:1], micros, 0)
    scale_logits(logits[1:3], micros, 1)
    scale_logits(logits[3:], micros, 3)
    assert logits[:, 0].tolist() == [1.0, 2.0, 4.0, 0.5]


def test_a_slice_of_a_padded_vocabulary_is_scaled_alone():
    padded = torch.ones(2, 8)
    scale_logits(padded[:, :6], torch.tensor([500_000, 0], dtype=torch.int32), 0)
    assert padded[0].tolist() == [2.0] * 6 + [1.0] * 2
    assert padded[1].tolist() == [1.0] + [-INF] * 5 + [1.0] * 2


def test_entropy_against_the_slow_reference(block):
    rng = np.random.default_rng(1)
    num_rows, vocab_size = 30, 100
    selector = OneRowSelector({}, num_rows, CPU)
    logits = rng.normal(size=(num_rows, vocab_size)).astype(np.float32)
    logits *= rng.choice([0.01, 1.0, 5.0, 40.0], size=(num_rows, 1))
    logits[rng.random((num_rows, vocab_size)) < 0.2] = -INF
    logits[:, 0] = 0.0
    logits[3, :70] = -INF
    options = [
        make_options("entropy", parameters=(float(t0), float(theta)), scale=0.7, max=1.3)
        for t0, theta in rng.uniform(0.1, 2.0, size=(num_rows, 2))
    ]
    for slot, option in enumerate(options):
        selector.add(slot, option, 0)
    selector.flush()
    choices = Choices.make(num_rows + 2, CPU)
    choices.micros.fill_(PENDING)
    choices.micros[:2] = torch.tensor([ORDINARY, 123])
    choices.micros[5] = 77
    slots = torch.cat([torch.zeros(2, dtype=torch.long), torch.arange(num_rows)])
    choose_by_entropy(choices, slots, selector, torch.from_numpy(logits), 2)
    assert choices.micros[:2].tolist() == [ORDINARY, 123], "of another part of the step"
    assert choices.micros[5] == 77, "has waited for nothing"
    for row, option in enumerate(options):
        if row != 3:
            value = reference.entropy_temperature(logits[row].tolist(), *option.parameters)
            expected = min(value * option.scale, option.max)
            assert choices.micros[row + 2].item() / 1e6 == pytest.approx(expected, abs=2e-5)


def test_a_row_that_is_masked_as_a_whole_is_greedy():
    selector = OneRowSelector({}, 1, CPU)
    selector.add(0, make_options("entropy"), 0)
    selector.flush()
    choices = Choices.make(1, CPU)
    choices.micros.fill_(PENDING)
    choose_by_entropy(choices, torch.zeros(1).long(), selector, torch.full((1, 9), -INF), 0)
    assert choices.micros.tolist() == [0]
    assert selector.find_present(np.array([0])) == [PolicyIndex.ENTROPY]


def test_rows_are_gathered_anew_where_no_graph_reads_them():
    hidden = torch.arange(12.0).reshape(4, 3)
    indices = torch.tensor([3, 1])
    assert torch.equal(make_rows(4).gather(hidden, indices), hidden[indices])
