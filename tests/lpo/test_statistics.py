import itertools
import math
import random

import numpy as np
import pytest

from adaptive_head.lpo import statistics
from adaptive_head.lpo.statistics import (
    Interval,
    average_by_index,
    bootstrap_average,
    bootstrap_mean,
    count_votes,
)


def enumerate_means(values: list[float]) -> list[float]:
    """The mean of every one of the n^n equally likely resamples."""
    resamples = itertools.product(values, repeat=len(values))
    return [sum(resample) / len(values) for resample in resamples]


def exact_interval(means: list[float]) -> tuple[float, float]:
    ordered = sorted(means)
    return ordered[int(0.025 * len(ordered))], ordered[math.ceil(0.975 * len(ordered)) - 1]


def test_the_interval_is_that_of_all_resamples():
    values = [0.1, 0.15, 0.31, 0.52, 0.93, 1.7]
    found = bootstrap_mean(np.array(values), 60_000, 0)
    low, high = exact_interval(enumerate_means(values))
    assert found.mean == pytest.approx(sum(values) / 6)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert high - low > 0.5


def test_tasks_are_resampled_apart_and_weigh_the_same():
    few, many = [0.0, 0.4, 1.0], [5.0, 5.1, 5.7, 6.0]
    found = bootstrap_average([np.array(few), np.array(many)], 60_000, 3)
    both = itertools.product(enumerate_means(few), enumerate_means(many))
    low, high = exact_interval([(a + b) / 2 for a, b in both])
    assert found.mean == pytest.approx((1.4 / 3 + 21.8 / 4) / 2)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_tasks_of_one_length_do_not_draw_the_same_prompts():
    # Drawn alike, the two would cancel and leave an interval of no width.
    values = np.arange(50.0)
    found = bootstrap_average([values, -values], 2000, 0)
    assert found.high - found.low > 3


def test_about_95_of_100_intervals_hold_the_truth():
    rng = np.random.default_rng(1)
    # Wins of a head that is worth 0.6, on 60 prompts.
    intervals = [
        bootstrap_mean(rng.binomial(3, 0.6, size=60) / 3, 400, seed) for seed in range(500)
    ]
    share = np.mean([interval.low <= 0.6 <= interval.high for interval in intervals])
    assert 0.91 <= share <= 0.98


def test_blocks_that_fit_into_memory_give_as_many_draws(monkeypatch):
    values = np.array([0.0, 1.0, 5.0, 2.0, 2.0])
    whole = bootstrap_mean(values, 5003, 0)
    monkeypatch.setattr(statistics, "_MAX_DRAWS", 35)
    blocks = list(statistics._draw_means(values, 5003, [0, 0]))
    assert {len(block) for block in blocks} == {7, 5003 % 7}
    assert sum(map(len, blocks)) == 5003
    in_blocks = bootstrap_mean(values, 5003, 0)
    assert (in_blocks.low, in_blocks.high) == pytest.approx((whole.low, whole.high), abs=0.25)


def test_a_seed_gives_the_same_interval_again():
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap_mean(values, 300, 5) == bootstrap_mean(values, 300, 5)
    assert bootstrap_mean(values, 300, 5) != bootstrap_mean(values, 300, 6)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean(np.array([]), 10, 0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_average([], 10, 0)


def test_an_interval_excludes_what_lies_outside():
    interval = Interval(0.55, 0.51, 0.6)
    assert interval.excludes(0.5)
    assert interval.excludes(0.7)
    assert not interval.excludes(0.51)
    assert not interval.excludes(0.55)
    # What only rounding separates is not excluded.
    assert not Interval(0.5, 0.5 + 1e-12, 0.6).excludes(0.5)


def test_the_most_frequent_answer_wins_the_vote():
    assert count_votes([21, 20, 21], [1.0, 0.0, 1.0]) == 1.0
    assert count_votes([20, 20, 21], [0.0, 0.0, 1.0]) == 0.0


def test_responses_without_an_answer_do_not_vote():
    assert count_votes([None, None, 21], [0.0, 0.0, 1.0]) == 1.0
    assert count_votes([None, None], [0.0, 0.0]) == 0.0


def test_a_tied_vote_is_worth_what_a_random_winner_is_on_average():
    rng, rule = random.Random(0), random.Random(1)
    for _ in range(200):
        answers = [rule.choice([1, 2, 3, 4, None]) for _ in range(6)]
        scores = [float(answer == 3) for answer in answers]
        votes = [a for a in answers if a is not None]
        drawn = 0
        for _ in range(300):
            most = max(map(votes.count, votes), default=0)
            winners = sorted({a for a in votes if votes.count(a) == most})
            drawn += bool(winners) and rng.choice(winners) == 3
        assert count_votes(answers, scores) == pytest.approx(drawn / 300, abs=0.1)


def simulate(num_prompts: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Responses of many lengths, those of a prompt alike; (indices, prompts, values)."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(num_prompts):
        level = rng.normal()
        for _ in range(rng.integers(1, 4)):
            for index in range(rng.integers(1, 6)):
                rows.append((index, prompt, 0.1 * index + level + 0.3 * rng.normal()))
    table = np.array(rows)
    return table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2]


def test_means_by_index_are_those_of_the_values_there():
    indices, prompts, values = simulate(30, 0)
    curve = average_by_index(indices, prompts, values, 4)
    for index in range(4):
        here = [v for i, v in zip(indices, values, strict=True) if i == index]
        assert curve.counts[index] == len(here)
        assert curve.means[index] == pytest.approx(sum(here) / len(here))


def test_errors_by_index_are_those_of_resampled_prompts():
    indices, prompts, values = simulate(60, 1)
    curve = average_by_index(indices, prompts, values, 5)
    rng = np.random.default_rng(2)
    by_prompt = [np.flatnonzero(prompts == prompt) for prompt in range(60)]
    means = []
    for _ in range(1500):
        drawn = np.concatenate([by_prompt[i] for i in rng.integers(60, size=60)])
        means.append([values[drawn][indices[drawn] == index].mean() for index in range(5)])
    assert curve.errors == pytest.approx(1.96 * np.std(means, axis=0), rel=0.15)
    # As if all values were independent, it would be much less.
    naive = 1.96 * values[indices == 0].std() / math.sqrt((indices == 0).sum())
    assert curve.errors[0] > 1.2 * naive


def test_an_index_of_one_prompt_has_no_error_and_one_of_none_no_mean():
    curve = average_by_index(
        np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), np.array([1.0, 3.0, 4.0, 6.0]), 3
    )
    assert curve.means[:2].tolist() == [2.0, 5.0]
    assert math.isnan(curve.means[2])
    assert np.isnan(curve.errors).tolist() == [False, True, True]
    assert curve.counts.tolist() == [2, 2, 0]
