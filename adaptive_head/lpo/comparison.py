"""Heads against their controls: means, differences and wins, paired by prompt and sample."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from adaptive_head.lpo.arms import ArmKind, HeadUnderTest, format_temperature
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.records import DataError, Prompt
from adaptive_head.lpo.rewards import compare_scores
from adaptive_head.lpo.statistics import Interval, bootstrap_nested, make_interval
from adaptive_head.lpo.summaries import ArmSummary, Rewards, find_voted_reward
from adaptive_head.lpo.tuning import BestFixed

BEATS = "beats"
LOSES = "loses to"
UNDECIDED = "cannot be told apart from"
TOO_FEW = "was tested on too few groups of prompts to be told apart from"
EVEN = 0.5
_TIE = 1e-9
_LABELS: Mapping[ArmKind, str] = {
    "meanshift": "MeanShift",
    "equal_surprisal": "constant of equal entropy",
    "shuffled": "shuffled within the answer",
    "dealt": "shuffled across prompts",
    "entropy": "EDT",
    "min_p": "min-p at temperature 1",
    "top_p": "top-p at temperature 1",
    "card": "model card",
    "head_min_p": "the head with min-p",
    "self": "itself, other seeds",
}


@dataclass(frozen=True)
class Opponent:
    """What a head is compared with.

    Args:
        arms: for each of the head's tasks, one for each of its training seeds, or one for all.
    """

    kind: str
    label: str
    arms: Mapping[str, Sequence[ArmSummary]]


def list_opponents(
    heads: Sequence[HeadUnderTest], summaries: Mapping[str, ArmSummary], best: BestFixed | None
) -> list[Opponent]:
    """All that a head is compared with.

    Args:
        heads: the head of each training seed.
    """
    tasks = heads[0].tasks
    fixed = {s.arm.temperature: s for s in summaries.values() if s.arm.kind == "fixed"}

    def everywhere(kind: str, label: str, arms: Sequence[ArmSummary]) -> Opponent:
        return Opponent(kind, label, dict.fromkeys(tasks, arms))

    opponents = [
        everywhere("fixed", f"fixed {format_temperature(temperature or 0.0)}", [summary])
        for temperature, summary in fixed.items()
    ]
    if best is not None:
        own = {task: [fixed[best.by_task[task]]] for task in tasks}
        opponents.append(Opponent("best_fixed", "best fixed of the task", own))
        overall = fixed[best.overall]
        opponents.append(everywhere("best_fixed_overall", "best fixed overall", [overall]))
    names = [head.name for head in heads]
    for kind, label in _LABELS.items():
        of_kind = [s for s in summaries.values() if s.arm.kind == kind]
        arms = [s for name in names for s in of_kind if s.arm.head == name]
        arms = arms or [s for s in of_kind if s.arm.head is None]
        if arms:
            setting = f" ({arms[0].arm.label})" if arms[0].arm.label else ""
            opponents.append(everywhere(kind, label + setting, arms))
    return opponents


@dataclass(frozen=True)
class Comparison:
    """Makes the rows of results. Every row is a JSON object:

    `kind`, `label` and `arm` (null in an average) say what is compared with the head, `votes`
    how many answers a value stands for (1, or N for maj@N), `temperature` is the arm's mean, null
    where it wrote no token. `metric` is the arm's own, `difference` the head's minus the arm's,
    `win_rate` the head's from 0 to 1, each with `mean`, `low` and `high`; the bounds are null with
    too few groups. All comparisons of one table hold together at 95 % (Bonferroni). `verdict` goes
    by the win rate. The head's own row, the first, has neither difference nor win rate nor verdict.
    """

    experiment: Experiment
    test_prompts: Sequence[Prompt]
    rewards: Rewards

    def list_prompts(self, task: str) -> list[Prompt]:
        """The task's test prompts.

        Raises:
            DataError: one has no group.
        """
        prompts = [prompt for prompt in self.test_prompts if prompt.task == task]
        for prompt in prompts:
            if not prompt.group:
                raise DataError(f"prompt {prompt.id}: group: missing")
        return prompts

    def count_groups(self, task: str) -> int:
        """Groups of the task's test prompts."""
        return len({prompt.group for prompt in self.list_prompts(task)})

    def average_rewards(self, summary: ArmSummary, task: str) -> dict[str, float]:
        """Mean of every reward of a task over its test prompts."""
        names = self.experiment.tasks[task].rewards
        scores = [s for p in self.list_prompts(task) for s in summary.scores[p.id]]
        return {name: float(np.mean([s[name] for s in scores])) for name in names}

    def compare_on_task(
        self, own: Sequence[ArmSummary], opponents: Sequence[Opponent], task: str
    ) -> list[dict[str, Any]]:
        """The rows of one task: of single answers, and of votes if there are any.

        Args:
            own: the head's arm of each training seed.
        """
        has_votes = find_voted_reward(self.experiment, self.rewards, task) is not None
        votes = [False, True] if has_votes else [False]
        num_comparisons = len(votes) * len(opponents)
        return [
            row
            for is_voted in votes
            for row in self._make_rows(own, opponents, [task], is_voted, num_comparisons)
        ]

    def compare_on_average(
        self, own: Sequence[ArmSummary], opponents: Sequence[Opponent], tasks: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The rows of the average over tasks, each of which weighs the same."""
        return self._make_rows(own, opponents, tasks, False, len(opponents))

    def _make_rows(
        self,
        own: Sequence[ArmSummary],
        opponents: Sequence[Opponent],
        tasks: Sequence[str],
        is_voted: bool,
        num_comparisons: int,
    ) -> list[dict[str, Any]]:
        head = Opponent("head", f"head {own[0].arm.head}", dict.fromkeys(tasks, own))
        everyone = [head, *opponents]
        intervals = self._bootstrap(own, everyone, tasks, is_voted, num_comparisons)
        rows = []
        for number, opponent in enumerate(everyone):
            first = [opponent.arms[task][0] for task in tasks]
            metric, difference, win_rate = intervals[3 * number : 3 * number + 3]
            row: dict[str, Any] = {
                "kind": opponent.kind,
                "label": opponent.label,
                "arm": first[0].arm.name if len(set(map(id, first))) == 1 else None,
                "votes": self.experiment.evaluation.num_responses if is_voted else 1,
                "temperature": _average_temperature(opponent, tasks),
                "metric": asdict(metric),
            }
            if opponent.kind != "head":
                row["difference"] = asdict(difference)
                row["win_rate"] = asdict(win_rate)
                row["verdict"] = judge_win_rate(win_rate)
            rows.append(row)
        return rows

    def _bootstrap(
        self,
        own: Sequence[ArmSummary],
        everyone: Sequence[Opponent],
        tasks: Sequence[str],
        is_voted: bool,
        num_comparisons: int,
    ) -> list[Interval]:
        """For each opponent the intervals of its metric, its difference and its win rate.

        All rest on the same resamples.
        """
        evaluation = self.experiment.evaluation
        means: np.ndarray | float = 0.0
        draws: np.ndarray | float = 0.0
        for part, task in enumerate(tasks):
            prompts = self.list_prompts(task)
            columns = [
                column
                for opponent in everyone
                for column in self._compare(own, opponent.arms[task], task, is_voted)
            ]
            values = np.stack(columns, axis=-1)
            means = means + values.mean(axis=(0, 1, 2))
            draws = draws + bootstrap_nested(
                values,
                [prompt.group for prompt in prompts],
                [prompt.kind or task for prompt in prompts],
                evaluation.num_bootstrap,
                self.experiment.derive_seed("bootstrap"),
                part,
            )
        num_groups = min(self.count_groups(task) for task in tasks)
        assert isinstance(means, np.ndarray) and isinstance(draws, np.ndarray)
        return [
            make_interval(mean, of_column, num_groups, num_comparisons)
            for mean, of_column in zip(means / len(tasks), (draws / len(tasks)).T, strict=True)
        ]

    def _compare(
        self,
        own: Sequence[ArmSummary],
        others: Sequence[ArmSummary],
        task: str,
        is_voted: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The metric, the head's difference and its wins, each [seeds, prompts, streams]."""
        others = others if len(others) > 1 else list(others) * len(own)
        theirs = np.stack([self._measure(other, task, is_voted) for other in others])
        ours = np.stack([self._measure(summary, task, is_voted) for summary in own])
        if is_voted:
            gains = ours - theirs
            wins = np.where(np.abs(gains) > _TIE, gains > 0, EVEN).astype(float)
        else:
            pairs = zip(own, others, strict=True)
            wins = np.stack([self._count_wins(summary, other, task) for summary, other in pairs])
        return theirs, ours - theirs, wins

    def _measure(self, summary: ArmSummary, task: str, is_voted: bool) -> np.ndarray:
        """Each prompt's metric in each stream; [prompts, streams]."""
        prompts = self.list_prompts(task)
        if is_voted:
            return np.array([summary.votes[prompt.id] for prompt in prompts])
        name = self.experiment.tasks[task].metrics[0]
        return self._average([[s[name] for s in summary.scores[p.id]] for p in prompts])

    def _count_wins(self, own: ArmSummary, other: ArmSummary, task: str) -> np.ndarray:
        """Each prompt's share of samples that the head wins, ties half; [prompts, streams]."""
        names = self.experiment.tasks[task].metrics
        return self._average(
            [
                [
                    compare_scores(ours, theirs, names)
                    for ours, theirs in zip(own.scores[p.id], other.scores[p.id], strict=True)
                ]
                for p in self.list_prompts(task)
            ]
        )

    def _average(self, values: Sequence[Sequence[float]]) -> np.ndarray:
        """Means over the samples of a stream: [prompts, samples] -> [prompts, streams]."""
        array = np.array(values, dtype=float)
        num_streams = self.experiment.evaluation.num_streams
        return array.reshape(len(array), num_streams, -1).mean(axis=2)


def _average_temperature(opponent: Opponent, tasks: Sequence[str]) -> float | None:
    found = [arm.temperatures.get(task) for task in tasks for arm in opponent.arms[task]]
    known = [temperature for temperature in found if temperature is not None]
    return float(np.mean(known)) if len(known) == len(found) else None


def judge_win_rate(win_rate: Interval) -> str:
    """In words whether a head is better, by the interval of its win rate."""
    if win_rate.low is None:
        return TOO_FEW
    if not win_rate.excludes(EVEN):
        return UNDECIDED
    return BEATS if win_rate.mean > EVEN else LOSES
