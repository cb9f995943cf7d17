"""What can be said of a mean, and what cannot: intervals by the bootstrap over prompts."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
# Below this a percentile interval is much too narrow: five prompts that agree would decide.
MIN_PROMPTS = 20
_MAX_DRAWS = 4_000_000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of a value."""
        return self.low > value + _ROUNDING or self.high < value - _ROUNDING


@dataclass(frozen=True)
class Curve:
    """Means of values that have an index, such as a position; arrays [indices].

    Args:
        means: NaN where no value has the index.
        errors: half the width of the 95 % interval; NaN where fewer than two prompts reach it.
        counts: values at the index.
    """

    means: np.ndarray
    errors: np.ndarray
    counts: np.ndarray


def bootstrap_mean(values: np.ndarray, num: int, seed: int) -> Interval:
    """The mean over prompts, with a percentile interval from resampled prompts.

    The prompt is what is drawn, since samples of one prompt resemble each other: `values` holds
    one number a prompt, the mean over its samples. For a comparison of two arms that number is
    the difference, so that the prompt's difficulty cancels (paired bootstrap, Koehn 2004).

    Args:
        values: [prompts], finite.
        num: resamples.
        seed: equal seeds and lengths draw equal prompts.

    Raises:
        ValueError: there are no values.
    """
    return bootstrap_average([values], num, seed)


def bootstrap_average(groups: Sequence[np.ndarray], num: int, seed: int) -> Interval:
    """The average over tasks of the means over their prompts; every task weighs the same.

    Prompts are resampled within their task.

    Args:
        groups: a task's values [prompts], each as in `bootstrap_mean`.

    Raises:
        ValueError: there is no group, or an empty one.
    """
    if not groups or any(len(values) == 0 for values in groups):
        raise ValueError("a mean needs at least one value in every group")
    draws = np.zeros(num)
    for index, values in enumerate(groups):
        draws += np.concatenate(list(_draw_means(values, num, [seed, index])))
    low, high = np.quantile(draws / len(groups), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = np.mean([values.mean() for values in groups])
    return Interval(float(mean), float(low), float(high))


def _draw_means(values: np.ndarray, num: int, seed: list[int]) -> Iterator[np.ndarray]:
    """`num` means of resampled values, in blocks that fit into memory."""
    rng = np.random.default_rng(seed)
    block = max(1, _MAX_DRAWS // len(values))
    for start in range(0, num, block):
        drawn = rng.integers(len(values), size=(min(block, num - start), len(values)))
        yield values[drawn].mean(axis=1)


def count_votes(answers: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """The score of a majority vote: that of the most frequent answer.

    Tied winners share: the result is what one drawn among them scores on average. Responses
    without an answer (None) do not vote; without any vote the result is 0.

    Args:
        answers: of each response.
        scores: of each response; equal answers have equal scores.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    score = dict(zip(answers, scores, strict=True))
    most = max(votes.values())
    winners = [score[answer] for answer, count in votes.items() if count == most]
    return sum(winners) / len(winners)


def average_by_index(
    indices: np.ndarray, prompts: np.ndarray, values: np.ndarray, num_indices: int
) -> Curve:
    """The mean of the values at each index, with an interval for its mean over prompts.

    The standard error is that of a ratio of sums over clusters (Cochran 1977, §2.11 and §9A):
    values of one prompt are taken to be as dependent as they come.

    Args:
        indices: int [values]; values whose index is not below `num_indices` are left out.
        prompts: int [values], the number of the prompt that each belongs to.
        values: float [values].
    """
    is_in = indices < num_indices
    indices, prompts, values = indices[is_in], prompts[is_in], values[is_in]
    num_prompts = int(prompts.max(initial=-1)) + 1
    shape = (num_prompts, num_indices)
    cells = prompts * num_indices + indices
    sums = np.bincount(cells, values, num_prompts * num_indices).reshape(shape)
    sizes = np.bincount(cells, minlength=num_prompts * num_indices).reshape(shape)
    counts = sizes.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums.sum(axis=0) / counts
        present = (sizes > 0).sum(axis=0)
        residuals = np.where(sizes > 0, sums - means * sizes, 0.0)
        variances = (residuals**2).sum(axis=0) * present / (present - 1) / counts.astype(float) ** 2
    errors = np.where(present > 1, 1.96 * np.sqrt(variances), np.nan)
    return Curve(means, errors, counts)
