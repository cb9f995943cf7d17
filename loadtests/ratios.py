"""Adaptive to fixed, as ratios: absolute times say more of the machine than of the server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.measurements import Block

NUM_BOOTSTRAP = 10_000
LEVEL = 0.95
# With fewer, a percentile interval is much too narrow.
MIN_PAIRS = 8
# The kernel counts a process's time in hundredths of a second.
MIN_CPU_SECONDS = 0.3


@dataclass(frozen=True)
class Ratio:
    """Adaptive divided by fixed.

    Attributes:
        pairs: of each pair of blocks.
        mean: their geometric mean.
        low, high: its 95 % interval.
    """

    pairs: list[float]
    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low > 1 or self.high < 1


def compare_blocks(
    pairs: Sequence[tuple[Block, Block]], measure: Callable[[Block], float | None], seed: int
) -> Ratio | None:
    """The ratio of a measure of blocks; None unless every block has it."""
    values = [(measure(adaptive), measure(fixed)) for adaptive, fixed in pairs]
    ratios = [a / b for a, b in values if a is not None and b]
    return bootstrap_ratio(ratios, seed) if ratios and len(ratios) == len(pairs) else None


def bootstrap_ratio(ratios: Sequence[float], seed: int) -> Ratio:
    """Geometric mean, with a percentile interval from resampled pairs.

    Geometric, so that fixed to adaptive is the inverse of adaptive to fixed.
    """
    logs = np.log(ratios)
    rng = np.random.default_rng(seed)
    means = rng.choice(logs, (NUM_BOOTSTRAP, len(logs))).mean(axis=1)
    low, high = np.exp(np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Ratio(list(ratios), float(np.exp(logs.mean())), float(low), float(high))


def measure_ttft(block: Block) -> float | None:
    """Median seconds to the first token."""
    return float(np.median(block.ttfts)) if block.ttfts else None


def measure_itl(block: Block) -> float | None:
    """Median over answers of their mean seconds between two tokens."""
    return float(np.median(block.itls)) if block.itls else None


def measure_speed(block: Block) -> float | None:
    """Tokens per second of all users together."""
    return block.num_tokens / block.seconds


def measure_cpu(block: Block) -> float | None:
    """Processor seconds that the API process spends on a request; None in too short a block."""
    if block.cpu_seconds < MIN_CPU_SECONDS:
        return None
    return block.cpu_seconds / block.num_requests


def measure_requests(block: Block) -> float | None:
    """Requests per second of all users together."""
    return block.num_requests / block.seconds
