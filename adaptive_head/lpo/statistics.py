"""What can be said of a mean, and what cannot: intervals from a bootstrap over groups.

Prompts that share their content, such as an operand pair in several wordings, resemble each other.
So groups of prompts are resampled and not prompts, within kinds of prompt as strata. Where several
heads were trained from different seeds and answered several times, seeds and answers are resampled
too.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
# Below this a percentile interval is much too narrow: five groups that agree would decide.
MIN_GROUPS = 20
_MAX_DRAWS = 4_000_000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """A mean and its interval, in the unit of the values; without bounds, too few groups."""

    mean: float
    low: float | None
    high: float | None

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of a value."""
        if self.low is None or self.high is None:
            return False
        return self.low > value + _ROUNDING or self.high < value - _ROUNDING


@dataclass(frozen=True)
class Curve:
    """Means of values that have an index, such as a position; arrays [indices].

    Args:
        means: NaN where no value has the index.
        errors: half the width of the 95 % interval; NaN where fewer than two groups reach it.
        counts: values at the index.
    """

    means: np.ndarray
    errors: np.ndarray
    counts: np.ndarray


def bootstrap_groups(
    values: np.ndarray,
    groups: Sequence[str],
    strata: Sequence[str],
    num_bootstrap: int,
    seed: int | Sequence[int],
) -> np.ndarray:
    """Draw the mean over prompts from resampled groups of prompts.

    Each stratum with G groups draws G - 1 of them with replacement, which makes the variance of
    the draws an unbiased estimate of the mean's (Rao and Wu 1988). A stratum keeps its share of
    the prompts in every draw. Strata of a single group are pooled.

    Args:
        values: float [prompts, ...]. For a comparison of two arms these are differences or wins,
            so that the prompt's difficulty cancels (paired bootstrap, Koehn 2004). All columns
            share their resamples.
        groups: by prompt, the name of the content that it shares with others.
        strata: by prompt, its kind.
        num_bootstrap: number of draws.
        seed: equal seeds and groups give equal resamples.

    Returns:
        float [num_bootstrap, ...], the resampled means. Pass them to `make_interval`.

    Raises:
        ValueError: there are no prompts, the lengths differ, or a group is in two strata.
    """
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} prompts but {len(groups)} groups")
    columns = np.asarray(values, dtype=float)
    flat = columns.reshape(len(columns), columns[:1].size)
    blocks = _draw_weights(groups, strata, num_bootstrap, np.random.default_rng(seed))
    draws = np.concatenate([weights @ flat for weights in blocks])
    return draws.reshape(num_bootstrap, *columns.shape[1:])


def bootstrap_nested(
    values: np.ndarray,
    groups: Sequence[str],
    strata: Sequence[str],
    num_bootstrap: int,
    seed: int,
    part: int = 0,
) -> np.ndarray:
    """Draw the mean over training seeds, prompts and streams of answers, resampling all three.

    All seeds answer the same prompts, so a draw resamples the groups once for all its seeds. Drawn
    again for each of S seeds, G groups would be taken for S * G. Of S seeds S - 1 are drawn, as
    groups are. Last, each prompt of each drawn seed draws as many of its streams as there are.
    That counts the noise of single answers twice, which makes intervals wider. No draw leaves the
    range of the seeds that there are: of trainings in general, three say little.

    Args:
        values: float [seeds, prompts, streams, ...], each the mean over a stream's answers.
        groups, strata, num_bootstrap: as in `bootstrap_groups`.
        part: parts with one `seed`, such as the tasks of an average, draw the same training seeds
            but different groups and streams.

    Returns:
        float [num_bootstrap, ...].

    Raises:
        ValueError: as `bootstrap_groups`.
    """
    values = np.asarray(values, dtype=float)
    num_seeds, num_prompts, num_streams = values.shape[:3]
    if num_seeds == num_streams == 1:
        return bootstrap_groups(values[0, :, 0], groups, strata, num_bootstrap, [seed, part])
    if num_prompts != len(groups):
        raise ValueError(f"{num_prompts} prompts but {len(groups)} groups")
    flat = values.reshape(num_seeds * num_prompts * num_streams, -1)
    heads_rng = np.random.default_rng(seed)
    heads = _draw_counts(num_seeds, num_bootstrap, heads_rng) / max(1, num_seeds - 1)
    streams_rng = np.random.default_rng([seed, part, 1])
    shape = (num_seeds, num_prompts, num_streams)
    draws, start = [], 0
    for of_block in _draw_weights(
        groups,
        strata,
        num_bootstrap,
        np.random.default_rng([seed, part]),
        block=max(1, _MAX_DRAWS // len(flat)),
    ):
        num = len(of_block)
        weights = heads[start : start + num, :, None] * of_block[:, None, :]
        shares = streams_rng.multinomial(
            num_streams, [1 / num_streams] * num_streams, (num, *shape[:2])
        )
        weights = weights[..., None] * (shares / num_streams)
        draws.append(weights.reshape(num, -1) @ flat)
        start += num
    return np.concatenate(draws).reshape(num_bootstrap, *values.shape[3:])


def _draw_weights(
    groups: Sequence[str],
    strata: Sequence[str],
    num: int,
    rng: np.random.Generator,
    block: int | None = None,
) -> Iterator[np.ndarray]:
    """`num` rows of weights [draws, prompts] that sum to 1, in blocks that fit into memory."""
    if len(groups) == 0 or len(groups) != len(strata):
        raise ValueError(f"{len(groups)} groups and {len(strata)} strata; give one per prompt")
    members = _assign_groups(groups, strata)
    block = block or max(1, _MAX_DRAWS // len(groups))
    for start in range(0, num, block):
        size = min(block, num - start)
        weights = np.empty((size, len(groups)))
        for prompts, numbers in members:
            counts = _draw_counts(int(numbers.max()) + 1, size, rng)[:, numbers]
            share = len(prompts) / len(groups)
            weights[:, prompts] = share * counts / counts.sum(axis=1, keepdims=True)
        yield weights


def _draw_counts(num_units: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of G units is among G - 1 drawn; of one unit, that one; int [num, units]."""
    return rng.multinomial(max(1, num_units - 1), [1 / num_units] * num_units, num)


def _assign_groups(
    groups: Sequence[str], strata: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each stratum its prompts, and the number of each one's group within the stratum."""
    kinds: dict[str, str] = {}
    for group, stratum in zip(groups, strata, strict=True):
        if kinds.setdefault(group, stratum) != stratum:
            raise ValueError(f"group {group!r} is in the kinds {kinds[group]!r} and {stratum!r}")
    sizes = Counter(kinds.values())
    largest = max(sizes, key=lambda stratum: sizes[stratum])
    singles = [stratum for stratum, size in sizes.items() if size == 1]
    pool = largest if len(singles) == 1 else singles[0] if singles else largest
    by_stratum: dict[str, list[int]] = {}
    for prompt, stratum in enumerate(strata):
        by_stratum.setdefault(pool if stratum in singles else stratum, []).append(prompt)
    return [
        (np.array(prompts), np.unique([groups[p] for p in prompts], return_inverse=True)[1])
        for prompts in by_stratum.values()
    ]


def make_interval(
    mean: float, draws: np.ndarray, num_groups: int, num_comparisons: int = 1
) -> Interval:
    """The percentile interval of resampled means.

    The quantiles are those that make an interval as wide as Student's with one degree of freedom
    less than there are groups (expanded percentiles, Hesterberg 2015).

    Args:
        draws: [draws], from `bootstrap_groups`.
        num_groups: with fewer than `MIN_GROUPS` the interval has no bounds.
        num_comparisons: all of so many intervals hold their truths together at `LEVEL`
            (Bonferroni): each has the level 1 - (1 - LEVEL) / num_comparisons.
    """
    if num_groups < MIN_GROUPS:
        return Interval(float(mean), None, None)
    tail = NormalDist().cdf(-_student_quantile((1 - LEVEL) / 2 / num_comparisons, num_groups - 1))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(mean), float(low), float(high))


def _student_quantile(tail: float, degrees: int) -> float:
    """Student's t above which lies `tail`; Abramowitz and Stegun 26.7.5, exact to 1 % from 19."""
    z = -NormalDist().inv_cdf(tail)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


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
    indices: np.ndarray, groups: np.ndarray, values: np.ndarray, num_indices: int
) -> Curve:
    """The mean of the values at each index, with an interval for its mean over groups.

    The standard error is that of a ratio of sums over clusters (Cochran 1977, §2.11 and §9A):
    values of one group are taken to be as dependent as they come.

    Args:
        indices: int [values]; values whose index is not below `num_indices` are left out.
        groups: int [values], the number of the group that each belongs to.
        values: float [values].
    """
    is_in = indices < num_indices
    indices, groups, values = indices[is_in], groups[is_in], values[is_in]
    num_groups = int(groups.max(initial=-1)) + 1
    shape = (num_groups, num_indices)
    cells = groups * num_indices + indices
    sums = np.bincount(cells, values, num_groups * num_indices).reshape(shape)
    sizes = np.bincount(cells, minlength=num_groups * num_indices).reshape(shape)
    counts = sizes.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums.sum(axis=0) / counts
        present = (sizes > 0).sum(axis=0)
        residuals = np.where(sizes > 0, sums - means * sizes, 0.0)
        variances = (residuals**2).sum(axis=0) * present / (present - 1) / counts.astype(float) ** 2
    errors = np.where(present > 1, 1.96 * np.sqrt(variances), np.nan)
    return Curve(means, errors, counts)
