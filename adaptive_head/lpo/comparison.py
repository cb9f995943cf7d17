"""Heads against their controls: means, differences and wins, paired by prompt and sample."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from adaptive_head.lpo.arms import Arm, ArmKind, HeadUnderTest, format_temperature, list_choices
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.records import Prompt, Response
from adaptive_head.lpo.rewards import NumberReward, Reward, compare_scores
from adaptive_head.lpo.statistics import (
    MIN_PROMPTS,
    Interval,
    bootstrap_average,
    count_votes,
)

Rewards = Mapping[str, Mapping[str, Reward]]

BEATS = "beats"
LOSES = "loses to"
UNDECIDED = "cannot be told apart from"
TOO_FEW = "was tested on too few prompts to be told apart from"
EVEN = 0.5
_TIE = 1e-9
_LABELS: Mapping[ArmKind, str] = {
    "meanshift": "MeanShift",
    "shuffled": "shuffled",
    "entropy": "entropy rule",
    "self": "itself, other seeds",
}


@dataclass(frozen=True)
class ArmSummary:
    """What comparisons need of an arm's answers.

    Args:
        scores: by prompt, of each sample.
        votes: by prompt, the score of the majority vote; empty where there is no vote.
        temperatures: by task, the mean: over tokens, or over responses of a sequence-level head;
            a task without a token is missing.
    """

    arm: Arm
    scores: Mapping[str, tuple[Mapping[str, float], ...]]
    votes: Mapping[str, float]
    temperatures: Mapping[str, float]
    num_tokens: int
    finish_reasons: Mapping[str, int]


@dataclass(frozen=True)
class BestFixed:
    """Fixed temperatures that training prompts chose.

    Args:
        by_task: each task's own.
        overall: the one for all tasks.
    """

    by_task: Mapping[str, float]
    overall: float


@dataclass(frozen=True)
class Opponent:
    """What a head is compared with: an arm for each of the head's tasks."""

    kind: str
    label: str
    arms: Mapping[str, ArmSummary]


def summarise_arm(
    arm: Arm,
    level: str,
    answers: Sequence[Response],
    experiment: Experiment,
    rewards: Rewards,
) -> ArmSummary:
    """Reduce an arm's answers to what comparisons need.

    Args:
        level: of the head that the arm belongs to; `token` for arms of none.
        answers: in the order of samples.
    """
    by_prompt: dict[str, list[Response]] = defaultdict(list)
    by_task: dict[str, list[Response]] = defaultdict(list)
    for response in answers:
        by_prompt[response.prompt_id].append(response)
        by_task[response.task].append(response)
    votes = {}
    for prompt_id, responses in by_prompt.items():
        task = responses[0].task
        if name := find_voted_reward(experiment, rewards, task):
            reward = rewards[task][name]
            assert isinstance(reward, NumberReward)
            found = [reward.find_answer(response.text) for response in responses]
            votes[prompt_id] = count_votes(found, [r.scores[name] for r in responses])
    choices = {task: list_choices(level, responses) for task, responses in by_task.items()}
    return ArmSummary(
        arm=arm,
        scores={key: tuple(r.scores for r in responses) for key, responses in by_prompt.items()},
        votes=votes,
        temperatures={task: float(np.mean(chosen)) for task, chosen in choices.items() if chosen},
        num_tokens=sum(len(response.token_ids) for response in answers),
        finish_reasons=Counter(response.finish_reason for response in answers),
    )


def find_voted_reward(experiment: Experiment, rewards: Rewards, task: str) -> str | None:
    """The reward whose answers are put to the vote: the first that compares numbers, if any."""
    evaluation = experiment.evaluation
    if not evaluation.majority or evaluation.num_responses == 1:
        return None
    names = experiment.tasks[task].metrics
    return next((n for n in names if isinstance(rewards[task][n], NumberReward)), None)


def choose_best_fixed(
    experiment: Experiment,
    train_prompts: Sequence[Prompt],
    summaries: Mapping[str, ArmSummary],
) -> BestFixed | None:
    """The best fixed temperature of each task and of all, by training prompts alone.

    A task's has the highest mean of the task's metric. The one for all tasks has the highest
    average over tasks of these means, each divided by its range over the temperatures, since the
    metrics of different tasks have different units. Ties go to the lower temperature.

    Returns:
        None where no training prompts were answered.
    """
    arms = [summary for summary in summaries.values() if summary.arm.kind == "train"]
    by_task: dict[str, float] = {}
    temperatures = np.array([summary.arm.temperature for summary in arms], dtype=float)
    totals = np.zeros(len(arms))
    for task, config in experiment.tasks.items():
        ids = [prompt.id for prompt in train_prompts if prompt.task == task]
        if arms and ids:
            metric = config.metrics[0]
            means = np.array([_average_prompts(arm, ids, metric).mean() for arm in arms])
            by_task[task] = _pick_best(temperatures, means)
            totals += means / (np.ptp(means) or 1.0)
    return BestFixed(by_task, _pick_best(temperatures, totals)) if by_task else None


def _pick_best(temperatures: np.ndarray, values: np.ndarray) -> float:
    return float(temperatures[values >= values.max() - _TIE].min())


def _average_prompts(summary: ArmSummary, ids: Sequence[str], reward: str) -> np.ndarray:
    """Each prompt's mean over its samples; float [prompts]."""
    return np.array([np.mean([s[reward] for s in summary.scores[i]]) for i in ids])


def list_opponents(
    head: HeadUnderTest, summaries: Mapping[str, ArmSummary], best: BestFixed | None
) -> list[Opponent]:
    """All that a head is compared with."""
    fixed = {s.arm.temperature: s for s in summaries.values() if s.arm.kind == "fixed"}

    def everywhere(kind: str, label: str, summary: ArmSummary) -> Opponent:
        return Opponent(kind, label, dict.fromkeys(head.tasks, summary))

    opponents = [
        everywhere("fixed", f"fixed {format_temperature(temperature or 0.0)}", summary)
        for temperature, summary in fixed.items()
    ]
    if best is not None and all(task in best.by_task for task in head.tasks):
        own = {task: fixed[best.by_task[task]] for task in head.tasks}
        opponents.append(Opponent("best_fixed", "best fixed of the task", own))
        overall = fixed[best.overall]
        opponents.append(everywhere("best_fixed_overall", "best fixed overall", overall))
    own_arms = {s.arm.kind: s for s in summaries.values() if s.arm.head in (head.name, None)}
    return opponents + [everywhere(kind, label, own_arms[kind]) for kind, label in _LABELS.items()]


@dataclass(frozen=True)
class Comparison:
    """Makes the rows of results. Every row is a JSON object:

    `kind`, `label` and `arm` (null in an average) say what is compared with the head, `votes`
    how many answers a value stands for (1, or N for maj@N), `temperature` is the arm's mean, null
    where it wrote no token. `metric` is the arm's own, `difference` the head's minus the arm's,
    `win_rate` the head's from 0 to 1, each with `mean`, `low` and `high`; `verdict` goes by the
    win rate. The head's own row, the first, has neither difference nor win rate nor verdict.
    """

    experiment: Experiment
    test_prompts: Sequence[Prompt]
    rewards: Rewards

    def list_ids(self, task: str) -> list[str]:
        """The task's test prompts."""
        return [prompt.id for prompt in self.test_prompts if prompt.task == task]

    def average_rewards(self, summary: ArmSummary, task: str) -> dict[str, float]:
        """Mean of every reward of a task over its test prompts."""
        ids = self.list_ids(task)
        names = self.experiment.tasks[task].rewards
        return {name: float(_average_prompts(summary, ids, name).mean()) for name in names}

    def compare_on_task(
        self, own: ArmSummary, opponents: Sequence[Opponent], task: str
    ) -> list[dict[str, Any]]:
        """The rows of one task: of single answers, and of votes if there are any."""
        has_votes = find_voted_reward(self.experiment, self.rewards, task) is not None
        head = Opponent("head", f"head {own.arm.head}", {task: own})
        return [
            self._make_row(own, opponent, [task], is_voted)
            for is_voted in ([False, True] if has_votes else [False])
            for opponent in (head, *opponents)
        ]

    def compare_on_average(
        self, own: ArmSummary, opponents: Sequence[Opponent], tasks: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The rows of the average over tasks, each of which weighs the same."""
        head = Opponent("head", f"head {own.arm.head}", dict.fromkeys(tasks, own))
        return [self._make_row(own, other, tasks, False) for other in (head, *opponents)]

    def _make_row(
        self, own: ArmSummary, opponent: Opponent, tasks: Sequence[str], is_voted: bool
    ) -> dict[str, Any]:
        arms = [opponent.arms[task] for task in tasks]
        theirs = [self._measure(opponent.arms[task], task, is_voted) for task in tasks]
        temperatures = [arm.temperatures.get(task) for arm, task in zip(arms, tasks, strict=True)]
        known = [temperature for temperature in temperatures if temperature is not None]
        row: dict[str, Any] = {
            "kind": opponent.kind,
            "label": opponent.label,
            "arm": arms[0].arm.name if len(set(map(id, arms))) == 1 else None,
            "votes": self.experiment.evaluation.num_responses if is_voted else 1,
            "temperature": float(np.mean(known)) if len(known) == len(tasks) else None,
            "metric": asdict(self._bootstrap(theirs)),
        }
        if opponent.kind != "head":
            ours = [self._measure(own, task, is_voted) for task in tasks]
            differences = [a - b for a, b in zip(ours, theirs, strict=True)]
            wins = [self._count_wins(own, opponent.arms[task], task, is_voted) for task in tasks]
            win_rate = self._bootstrap(wins)
            row["difference"] = asdict(self._bootstrap(differences))
            row["win_rate"] = asdict(win_rate)
            row["verdict"] = judge_win_rate(win_rate, min(map(len, wins)))
        return row

    def _measure(self, summary: ArmSummary, task: str, is_voted: bool) -> np.ndarray:
        ids = self.list_ids(task)
        if is_voted:
            return np.array([summary.votes[i] for i in ids])
        return _average_prompts(summary, ids, self.experiment.tasks[task].metrics[0])

    def _count_wins(
        self, own: ArmSummary, other: ArmSummary, task: str, is_voted: bool
    ) -> np.ndarray:
        """Each prompt's share of samples that the head wins, ties counting half; [prompts]."""
        ids = self.list_ids(task)
        if is_voted:
            gains = np.array([own.votes[i] - other.votes[i] for i in ids])
            return np.where(np.abs(gains) > _TIE, gains > 0, EVEN).astype(float)
        names = self.experiment.tasks[task].metrics
        return np.array(
            [
                np.mean(
                    [
                        compare_scores(ours, theirs, names)
                        for ours, theirs in zip(own.scores[i], other.scores[i], strict=True)
                    ]
                )
                for i in ids
            ]
        )

    def _bootstrap(self, groups: Sequence[np.ndarray]) -> Interval:
        return bootstrap_average(
            groups, self.experiment.evaluation.num_bootstrap, self.experiment.seed
        )


def judge_win_rate(win_rate: Interval, num_prompts: int) -> str:
    """In words whether a head is better, by the 95 % interval of its win rate."""
    if num_prompts < MIN_PROMPTS:
        return TOO_FEW
    if not win_rate.excludes(EVEN):
        return UNDECIDED
    return BEATS if win_rate.mean > EVEN else LOSES
