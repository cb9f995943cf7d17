import itertools
import math
import random

import numpy as np
import pytest

from adaptive_head.lpo import statistics
from adaptive_head.lpo.statistics import (
    Interval,
    average_by_index,
    bootstrap_groups,
    bootstrap_nested,
    count_votes,
    make_interval,
)


def name(numbers) -> list[str]:
    return [f"g{number}" for number in numbers]


def enumerate_means(groups: list[list[float]]) -> list[float]:
    """The mean over prompts of every equally likely draw of one group less than there are."""
    draws = itertools.product(groups, repeat=len(groups) - 1)
    return [np.mean([value for group in draw for value in group]) for draw in draws]


def test_draws_are_those_of_all_resamples_of_groups():
    groups = [[0.1], [0.15, 0.4, 0.5], [0.31, 0.2], [0.52], [0.93, 1.7]]
    values = np.array([value for group in groups for value in group])
    labels = name(i for i, group in enumerate(groups) for _ in group)
    draws = bootstrap_groups(values, labels, ["k"] * len(values), 40_000, 0)
    expected = np.array(enumerate_means(groups))
    assert draws.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert draws.std() == pytest.approx(expected.std(), rel=0.02)
    tails = [0.025, 0.5, 0.975]
    assert np.quantile(draws, tails) == pytest.approx(np.quantile(expected, tails), abs=0.02)


def test_strata_are_resampled_apart_and_keep_their_share():
    few, many = [[0.0], [0.4], [1.0]], [[5.0], [5.1], [5.7, 5.9], [6.0]]
    values = np.array([value for group in few + many for value in group])
    labels = name([0, 1, 2, 3, 4, 5, 5, 6])
    draws = bootstrap_groups(values, labels, ["few"] * 3 + ["many"] * 5, 40_000, 3)
    both = itertools.product(enumerate_means(few), enumerate_means(many))
    expected = np.array([3 / 8 * a + 5 / 8 * b for a, b in both])
    assert draws.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert draws.std() == pytest.approx(expected.std(), rel=0.02)


def test_single_groups_share_a_stratum():
    values = np.array([0.0, 1.0, 4.0, 9.0])
    apart = bootstrap_groups(values, name(range(4)), ["a", "a", "b", "c"], 500, 0)
    pooled = bootstrap_groups(values, name(range(4)), ["a", "a", "b", "b"], 500, 0)
    assert np.array_equal(apart, pooled)
    alone = bootstrap_groups(values, name(range(4)), ["a", "a", "a", "b"], 500, 0)
    assert np.array_equal(alone, bootstrap_groups(values, name(range(4)), ["a"] * 4, 500, 0))


def test_columns_share_their_resamples():
    values = np.arange(12.0).reshape(6, 2)
    labels = name([0, 0, 1, 2, 3, 3])
    draws = bootstrap_groups(values, labels, ["k"] * 6, 50, 1)
    assert draws.shape == (50, 2)
    for column in (0, 1):
        own = bootstrap_groups(values[:, column], labels, ["k"] * 6, 50, 1)
        assert draws[:, column] == pytest.approx(own)


def draw_sample(rng, num_groups: int, per_group: int, share: float) -> np.ndarray:
    """Values of mean 0 and variance 1, a share of it between groups."""
    effects = np.repeat(rng.normal(size=num_groups), per_group)
    noise = rng.normal(size=num_groups * per_group)
    return math.sqrt(share) * effects + math.sqrt(1 - share) * noise


def test_about_95_of_100_intervals_hold_the_truth_where_bootstrapping_prompts_fails():
    rng = np.random.default_rng(1)
    grouped, single = 0, 0
    labels, prompts, kinds = name(i // 4 for i in range(100)), name(range(100)), ["k"] * 100
    for seed in range(300):
        values = draw_sample(rng, 25, 4, 0.4)
        for names in (labels, prompts):
            draws = bootstrap_groups(values, names, kinds, 400, seed)
            interval = make_interval(values.mean(), draws, len(set(names)))
            covers = interval.low <= 0 <= interval.high
            grouped += covers and names is labels
            single += covers and names is prompts
    assert 0.91 <= grouped / 300 <= 0.98
    assert single / 300 < 0.87


def test_bonferroni_intervals_hold_their_truths_together():
    rng = np.random.default_rng(2)
    labels, kinds = name(range(40)), ["k"] * 40
    held = 0
    for seed in range(150):
        values = rng.normal(size=(40, 10))
        draws = bootstrap_groups(values, labels, kinds, 4000, seed)
        intervals = [make_interval(values[:, i].mean(), draws[:, i], 40, 10) for i in range(10)]
        held += all(interval.low <= 0 <= interval.high for interval in intervals)
    assert 0.9 <= held / 150 <= 1.0


def simulate_nested(rng, seeds: float, groups: float, noise: float) -> np.ndarray:
    """Values [3 seeds, 60 prompts in 30 groups, 3 streams] with these variances."""
    return (
        math.sqrt(seeds) * rng.normal(size=(3, 1, 1))
        + math.sqrt(groups) * np.repeat(rng.normal(size=30), 2)[None, :, None]
        + math.sqrt(noise) * rng.normal(size=(3, 60, 3))
    )


@pytest.mark.parametrize(
    ("seeds", "groups", "noise"), [(0.0, 0.4, 0.6), (0.0, 0.0, 1.0), (0.002, 0.2, 0.8)]
)
def test_nested_intervals_hold_the_truth_at_least_as_often(seeds, groups, noise):
    rng = np.random.default_rng(3)
    labels, kinds, held = name(i // 2 for i in range(60)), ["k"] * 60, 0
    for seed in range(100):
        values = simulate_nested(rng, seeds, groups, noise)
        draws = bootstrap_nested(values, labels, kinds, 200, seed)
        interval = make_interval(values.mean(), draws, 30)
        held += interval.low <= 0 <= interval.high
    assert held / 100 >= 0.91


def test_groups_are_shared_by_training_seeds():
    # Only groups differ, for all seeds alike: three seeds are no more groups than one.
    one = np.repeat(np.random.default_rng(0).normal(size=(1, 40, 1)), 2, axis=2)
    three = np.repeat(one, 3, axis=0)
    labels, kinds = name(range(40)), ["k"] * 40
    spreads = [bootstrap_nested(v, labels, kinds, 4000, 0).std() for v in (one, three)]
    assert spreads[1] == pytest.approx(spreads[0], rel=0.06)
    assert spreads[0] == pytest.approx(one[0, :, 0].std(ddof=1) / math.sqrt(40), rel=0.06)


def test_training_seeds_have_the_variance_of_their_mean():
    values = np.array([0.0, 3.0, 9.0])[:, None, None] * np.ones((3, 30, 1))
    draws = bootstrap_nested(values, name(range(30)), ["k"] * 30, 20_000, 0)
    assert draws.mean() == pytest.approx(4.0, abs=0.1)
    assert draws.var() == pytest.approx(np.var([0, 3, 9], ddof=1) / 3, rel=0.05)


def test_parts_draw_the_same_training_seeds_and_other_groups():
    of_seeds = np.array([0.0, 1.0, 5.0])[:, None, None] * np.ones((3, 25, 2))
    of_groups = np.arange(25.0)[None, :, None] * np.ones((3, 25, 2))
    labels, kinds = name(range(25)), ["k"] * 25
    draws = {
        key: [bootstrap_nested(values, labels, kinds, 200, 0, part) for part in (0, 1)]
        for key, values in (("seeds", of_seeds), ("groups", of_groups))
    }
    assert draws["seeds"][0] == pytest.approx(draws["seeds"][1])
    assert abs(np.corrcoef(*draws["groups"])[0, 1]) < 0.3


def test_blocks_that_fit_into_memory_give_as_many_draws(monkeypatch):
    values = np.array([0.0, 1.0, 5.0, 2.0, 2.0])
    labels, kinds = name(range(5)), ["k"] * 5
    whole = bootstrap_groups(values, labels, kinds, 5003, 0)
    monkeypatch.setattr(statistics, "_MAX_DRAWS", 35)
    in_blocks = bootstrap_groups(values, labels, kinds, 5003, 0)
    assert in_blocks.shape == whole.shape == (5003,)
    assert in_blocks.std() == pytest.approx(whole.std(), rel=0.05)
    nested = bootstrap_nested(np.ones((2, 5, 2)), labels, kinds, 11, 0)
    assert nested == pytest.approx(np.ones(11))


def test_a_seed_gives_the_same_draws_again():
    values, labels, kinds = np.random.default_rng(0).normal(size=40), name(range(40)), ["k"] * 40
    draws = [bootstrap_groups(values, labels, kinds, 30, seed) for seed in (5, 5, 6)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="0 groups"):
        bootstrap_groups(np.array([]), [], [], 10, 0)
    with pytest.raises(ValueError, match="2 prompts but 1 groups"):
        bootstrap_groups(np.zeros(2), ["a"], ["k"], 10, 0)
    with pytest.raises(ValueError, match="group 'a' is in the kinds 'k' and 'm'"):
        bootstrap_groups(np.zeros(2), ["a", "a"], ["k", "m"], 10, 0)


def test_fewer_than_twenty_groups_have_no_interval():
    draws = np.linspace(0, 1, 1000)
    assert make_interval(0.5, draws, 19) == Interval(0.5, None, None)
    assert not make_interval(0.5, draws, 19).excludes(7.0)
    assert make_interval(0.5, draws, 20).low is not None


@pytest.mark.parametrize(
    ("tail", "degrees", "quantile"),
    # From tables of Student's distribution.
    [(0.025, 19, 2.0930), (0.025, 60, 2.0003), (0.0005, 20, 3.8495), (0.0005, 100, 3.3905)],
)
def test_students_quantiles(tail, degrees, quantile):
    assert statistics._student_quantile(tail, degrees) == pytest.approx(quantile, rel=0.01)


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


def test_errors_by_index_are_those_of_resampled_groups():
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


def test_an_index_of_one_group_has_no_error_and_one_of_none_no_mean():
    curve = average_by_index(
        np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), np.array([1.0, 3.0, 4.0, 6.0]), 3
    )
    assert curve.means[:2].tolist() == [2.0, 5.0]
    assert math.isnan(curve.means[2])
    assert np.isnan(curve.errors).tolist() == [False, True, True]
    assert curve.counts.tolist() == [2, 2, 0]
