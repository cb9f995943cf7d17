import math

import pytest
import torch

from adaptive_head.policies import (
    entropy_temperature,
    schedule_temperature,
    two_phase_temperature,
)
from tests import reference

INF = math.inf


def entropy_of(rows, t0=1.0, theta=1.0) -> list[float]:
    logits = torch.tensor(rows)
    num_rows = len(logits)
    return entropy_temperature(
        logits, torch.full((num_rows,), t0), torch.full((num_rows,), theta)
    ).tolist()


@pytest.mark.parametrize("t0", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("theta", [0.01, 0.1, 1.0, 5.0])
def test_entropy_agrees_with_the_formula(t0, theta):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 0.3, 1.0, 3.0, 10.0]).unsqueeze(1)
    logits = torch.randn(5, 300, generator=generator) * spread
    logits[:, ::7] = -INF
    expected = [reference.entropy_temperature(row, t0, theta) for row in logits.tolist()]
    assert entropy_of(logits.tolist(), t0, theta) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_entropy_of_a_uniform_distribution_is_the_logarithm_of_its_size():
    (temperature,) = entropy_of([[3.0] * 100], t0=1.5, theta=2.0)
    assert temperature == pytest.approx(1.5 * 0.8 ** (2.0 / math.log(100)), rel=1e-5)


def test_masked_tokens_count_for_nothing():
    masked, short = entropy_of([[0.5, -1.0, -INF, -INF]]), entropy_of([[0.5, -1.0]])
    assert masked == pytest.approx(short, rel=1e-6)


@pytest.mark.parametrize("row", [[2.0, -INF, -INF], [1000.0, 0.0, 0.0], [-INF, -INF, -5.0]])
def test_no_entropy_is_greedy(row):
    assert entropy_of([row]) == [0.0]


def test_less_entropy_means_a_lower_temperature():
    temperatures = entropy_of([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [4.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    assert temperatures == sorted(temperatures, reverse=True)
    assert len(set(temperatures)) == 4


def test_theta_0_leaves_t0():
    rows = [[0.0, 1.0], [5.0, 1.0], [1000.0, 0.0]]
    assert entropy_of(rows, t0=0.9, theta=0.0) == pytest.approx([0.9, 0.9, 0.9])


def test_each_row_has_its_own_entropy_parameters():
    logits = torch.zeros(2, 10)
    both = entropy_temperature(logits, torch.tensor([1.0, 0.5]), torch.tensor([1.0, 3.0]))
    expected = [reference.entropy_temperature([0.0] * 10, *p) for p in ((1.0, 1.0), (0.5, 3.0))]
    assert both.tolist() == pytest.approx(expected, rel=1e-5)


def schedule_of(num_generated, start, end, tokens) -> list[float]:
    count = len(num_generated)
    return schedule_temperature(
        torch.tensor(num_generated),
        torch.full((count,), start),
        torch.full((count,), end),
        torch.full((count,), float(tokens)),
    ).tolist()


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.3), (0.0, 2.0), (0.7, 0.7)])
@pytest.mark.parametrize("tokens", [1, 3, 256, 10_000_000])
def test_schedule_is_a_line_and_then_flat(start, end, tokens):
    num_generated = [0, 1, 2, 3, 4, 100, 255, 256, 257, 9_999_999, 10_000_000, 10_000_001]
    expected = [
        reference.schedule_temperature(count, start, end, tokens) for count in num_generated
    ]
    assert schedule_of(num_generated, start, end, tokens) == pytest.approx(expected, abs=1e-6)


def test_schedule_starts_and_ends_exactly():
    start, end = torch.tensor(1.1).item(), torch.tensor(0.3).item()
    assert schedule_of([0, 7, 8], 1.1, 0.3, 7) == [start, end, end]


def test_schedule_before_the_first_token_is_its_start():
    assert schedule_of([-5], 1.0, 0.0, 10) == [1.0]


def test_two_phase_takes_the_answer_s_temperature_once_thinking_is_over():
    chosen = two_phase_temperature(
        torch.tensor([False, True]), torch.tensor([1.0, 1.2]), torch.tensor([0.3, 0.5])
    )
    assert chosen.tolist() == [1.0, 0.5]


def test_a_row_that_is_masked_as_a_whole_is_greedy():
    """NaN would say that the row is an ordinary request's."""
    row = torch.full((1, 4), -INF)
    assert entropy_temperature(row, torch.ones(1), torch.ones(1)).tolist() == [0.0]
