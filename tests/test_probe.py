import math

import pytest
import torch

from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.metadata import FeatureProbe
from adaptive_head.probe import (
    MIN_TOLERANCE,
    choose_tolerance,
    compare_temperatures,
    expect_temperatures,
    find_mismatch,
    find_unreadable,
)
from tests import reference

TEMPERATURES = tuple(index / 10 for index in range(8))
PROBE = FeatureProbe(
    prompts=[[1, 2, index] for index in range(8)],
    temperatures=TEMPERATURES,
    tolerances={"float32": 0.01, "bfloat16": 0.05},
)


def shift(distance: float) -> list[float]:
    return [value + distance for value in TEMPERATURES]


@pytest.mark.parametrize(
    ("dtype", "distance", "agrees"),
    [
        ("float32", 0.0, True),
        ("float32", 0.009, True),
        ("float32", 0.011, False),
        ("bfloat16", 0.049, True),
        ("bfloat16", -0.051, False),
        # Unknown ones are allowed as much as the coarsest.
        ("float8", 0.049, True),
        ("quantisation", 0.051, False),
    ],
)
def test_each_dtype_has_its_tolerance(dtype, distance, agrees):
    assert (find_mismatch(PROBE, shift(distance), dtype) is None) == agrees


def test_one_prompt_near_a_decision_does_not_decide():
    found = list(TEMPERATURES)
    found[3] += 0.3
    assert find_mismatch(PROBE, found, "bfloat16") is None
    assert compare_temperatures(TEMPERATURES, found) == pytest.approx(0.3 / 8)


def test_a_mismatch_says_what_was_expected_and_what_was_found():
    reason = find_mismatch(PROBE, shift(0.5), "bfloat16")
    assert "should be 0.00 0.10 0.20 0.30 0.40 0.50 0.60 0.70, and are 0.50 0.60" in reason
    assert "0.500 apart on average, where bfloat16 explains 0.050" in reason


def test_a_model_must_know_the_tokens_and_read_the_prompts():
    assert find_unreadable(PROBE, 8, 3) is None
    assert find_unreadable(PROBE, 7, 3) == "its token 7 is not one of the model's 7"
    assert "a prompt of 3 tokens, and the model reads 2" in find_unreadable(PROBE, 8, 2)


def test_expected_temperatures_are_means_of_the_head_s_distribution():
    head = AdaptiveHead(HeadConfig(12, (0.0, 0.35, 1.2), (16,)), seed=2)
    with torch.no_grad():
        head.layers[-1].weight.mul_(300)
    states = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)) * 3
    expected = [
        math.fsum(
            map(math.prod, zip(reference.softmax(row), head.config.temperatures, strict=True))
        )
        for row in reference.mlp(head.state_dict(), states.numpy()).tolist()
    ]
    assert expect_temperatures(head, states) == pytest.approx(expected, abs=2e-6)
    assert max(expected) - min(expected) > 0.1


def test_a_tolerance_leaves_room_for_other_engines_and_is_never_tiny():
    assert choose_tolerance(0.02) == pytest.approx(0.08)
    assert choose_tolerance(0.0) == MIN_TOLERANCE
