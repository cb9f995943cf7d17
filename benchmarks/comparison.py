"""Arms divided by arms: ratios of paired runs, with their spread."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.bench_engine import ADAPTIVE, AGAIN, MIXED, ORDINARY, POLICIES, STOCK, Run
from loadtests.ratios import MIN_PAIRS, bootstrap_ratio

# What is divided by what. The first shows what a ratio of two equal things looks like.
COMPARISONS = (
    (AGAIN, ORDINARY),
    (ORDINARY, STOCK),
    (ADAPTIVE, ORDINARY),
    (ADAPTIVE, STOCK),
    (MIXED, ORDINARY),
)
MEASURES = ("ttft_s", "tpot_s", "tokens_per_s")

# The runs of each arm, one a pair.
Pairs = Sequence[Mapping[str, Run]]


def average(first: Run, second: Run) -> Run:
    """The geometric means of two runs."""
    return Run(*((getattr(first, name) * getattr(second, name)) ** 0.5 for name in MEASURES))


def compare(runs: Mapping[int, Pairs], arms: Sequence[str]) -> dict[str, Any]:
    """Ratios by comparison, batch size and measure: above 1 is slower, for tokens/s faster."""
    policies = [(arm, ORDINARY) for arm in POLICIES]
    return {
        f"{arm} / {base}": {
            size: {name: describe_ratio(pairs, arm, base, name) for name in MEASURES}
            for size, pairs in runs.items()
        }
        for arm, base in (*COMPARISONS, *policies)
        if arm in arms and base in arms
    }


def describe_ratio(pairs: Pairs, arm: str, base: str, name: str) -> dict[str, Any]:
    """Median of the paired ratios with quartiles; their geometric mean with its interval, which
    is None for fewer pairs than give one."""
    ratios = [getattr(pair[arm], name) / getattr(pair[base], name) for pair in pairs]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    mean = bootstrap_ratio(ratios, seed=0)
    interval = [round(mean.low, 4), round(mean.high, 4)] if len(pairs) >= MIN_PAIRS else None
    return {
        "mean": round(mean.mean, 4),
        "interval_95": interval,
        "median": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
    }


def describe_arms(runs: Mapping[int, Pairs], arms: Sequence[str]) -> dict[str, Any]:
    """Medians by arm, batch size and measure."""
    return {
        arm: {
            size: {
                name: float(f"{np.median([getattr(pair[arm], name) for pair in pairs]):.4g}")
                for name in MEASURES
            }
            for size, pairs in runs.items()
        }
        for arm in arms
    }
