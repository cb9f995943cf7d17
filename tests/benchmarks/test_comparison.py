"""Ratios of paired runs, against values by hand."""

import math

import pytest

from benchmarks.bench_engine import ADAPTIVE, ARMS, ORDINARY, Run
from benchmarks.comparison import average, compare, describe_arms, describe_ratio

RATIOS = [1.0, 2.0, 4.0, 2.0, 1.0, 4.0, 2.0, 2.0]


def make_pairs(ratios):
    """An adaptive token takes so many times as long as an ordinary one, which takes ever longer."""
    base = [Run(1.0, 0.25 * (n + 1), 4.0) for n in range(len(ratios))]
    return [
        dict.fromkeys(ARMS, run) | {ADAPTIVE: Run(1.0, run.tpot_s * ratio, 4.0 / ratio)}
        for run, ratio in zip(base, ratios, strict=True)
    ]


def test_there_and_back_is_a_geometric_mean():
    assert average(Run(1.0, 2.0, 9.0), Run(4.0, 8.0, 4.0)) == Run(2.0, 4.0, 6.0)


def test_a_ratio_is_taken_within_pairs():
    ratio = describe_ratio(make_pairs(RATIOS), ADAPTIVE, ORDINARY, "tpot_s")
    assert ratio["mean"] == pytest.approx(2.0)
    assert (ratio["median"], ratio["quartiles"]) == (2.0, [1.75, 2.5])
    low, high = ratio["interval_95"]
    assert 1.0 < low < 2.0 < high < 4.0
    # Logarithms with a standard error of ln 2 / sqrt(2) / sqrt(8): about ± 0.34 around ln 2.
    assert math.log(high / low) == pytest.approx(4 * 0.173, abs=0.1)
    speed = describe_ratio(make_pairs(RATIOS), ADAPTIVE, ORDINARY, "tokens_per_s")
    assert speed["mean"] == pytest.approx(0.5)


def test_few_pairs_give_no_interval():
    assert (
        describe_ratio(make_pairs(RATIOS[:7]), ADAPTIVE, ORDINARY, "tpot_s")["interval_95"] is None
    )


def test_every_comparison_has_every_size_and_measure():
    runs = {size: make_pairs(RATIOS) for size in (1, 8)}
    ratios = compare(runs, ARMS)
    assert list(ratios) == [
        "again / ordinary",
        "ordinary / stock",
        "adaptive / ordinary",
        "adaptive / stock",
        "mixed / ordinary",
    ]
    for by_size in ratios.values():
        assert list(by_size) == [1, 8]
        assert all(set(by) == {"ttft_s", "tpot_s", "tokens_per_s"} for by in by_size.values())
    assert ratios["again / ordinary"][1]["tpot_s"]["interval_95"] == [1.0, 1.0]
    with_policy = [{**pair, "entropy": pair[ADAPTIVE]} for pair in make_pairs(RATIOS)]
    ratios = compare({1: with_policy}, [*ARMS, "entropy"])
    assert ratios["entropy / ordinary"] == ratios["adaptive / ordinary"]
    assert list(compare(runs, [ORDINARY, ADAPTIVE])) == ["adaptive / ordinary"]


def test_arms_are_described_by_their_medians():
    arms = describe_arms({8: make_pairs([1.0, 1.0, 1.0])}, ARMS)
    assert arms[ORDINARY] == {8: {"ttft_s": 1.0, "tpot_s": 0.5, "tokens_per_s": 4.0}}
