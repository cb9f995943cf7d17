"""Which setting of a control is best, by training prompts and by the criterion of the verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_head.lpo.arms import Arm, Family
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.records import Prompt, Response
from adaptive_head.lpo.rewards import compare_scores

_TIE = 1e-9


@dataclass(frozen=True)
class BestFixed:
    """Fixed temperatures that training prompts chose.

    Args:
        by_task: each task's own.
        overall: the one for all tasks.
    """

    by_task: Mapping[str, float]
    overall: float


Tuned = dict[Family, dict[str, dict[str, Arm]]]


def tune(
    experiment: Experiment, answers: Mapping[str, Sequence[Response]], arms: Sequence[Arm]
) -> Tuned:
    """The best setting of every control for each task.

    Args:
        answers: of each `train` arm, by its name.
        arms: the `train` arms.

    Returns:
        By family, head ("" where heads share it) and task. Ties go to the earlier setting, of
        fixed temperatures the lower one.
    """
    tuned: Tuned = {}
    for family, head in dict.fromkeys((arm.family, arm.head or "") for arm in arms):
        assert family is not None
        candidates = [arm for arm in arms if (arm.family, arm.head or "") == (family, head)]
        of_task = {}
        for task in candidates[0].settings:
            rates = rate_settings(experiment, [answers[arm.name] for arm in candidates], task)
            of_task[task] = candidates[pick_best(rates)]
        tuned.setdefault(family, {})[head] = of_task
    return tuned


def choose_best_fixed(
    experiment: Experiment, answers: Mapping[str, Sequence[Response]], arms: Sequence[Arm]
) -> BestFixed | None:
    """The best fixed temperature of each task, and of all by the average of its win rates.

    Returns:
        None where no training prompts were answered.
    """
    arms = sorted(
        (arm for arm in arms if arm.family == "fixed"), key=lambda arm: arm.temperature or 0.0
    )
    if not arms:
        return None
    temperatures = [arm.temperature or 0.0 for arm in arms]
    own = [answers[arm.name] for arm in arms]
    rates = {task: rate_settings(experiment, own, task) for task in experiment.tasks}
    total = np.mean(list(rates.values()), axis=0)
    by_task = {task: temperatures[pick_best(of_task)] for task, of_task in rates.items()}
    return BestFixed(by_task, temperatures[pick_best(total)])


def pick_best(rates: np.ndarray) -> int:
    """The first of the highest."""
    return int(np.flatnonzero(rates >= rates.max() - _TIE)[0])


def rate_settings(
    experiment: Experiment, answers: Sequence[Sequence[Response]], task: str
) -> np.ndarray:
    """How often each setting wins against each other one, ties counting half; [settings].

    Settings are compared answer by answer with the same seed, by the task's rewards in their
    order, as heads are compared with their opponents.
    """
    names = experiment.tasks[task].metrics
    scores = [{r.key: r.scores for r in of_arm if r.task == task} for of_arm in answers]
    num = len(scores)
    wins = np.full((num, num), 0.5)
    for first in range(num):
        for second in range(first):
            keys = scores[first].keys() & scores[second].keys()
            rate = np.mean(
                [compare_scores(scores[first][k], scores[second][k], names) for k in keys]
            )
            wins[first, second], wins[second, first] = rate, 1 - rate
    return wins.mean(axis=1)


def choose_train_prompts(experiment: Experiment, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Of each task the first `num_train_prompts`."""
    chosen: list[Prompt] = []
    for task in experiment.tasks:
        of_task = [prompt for prompt in prompts if prompt.task == task]
        chosen += of_task[: experiment.evaluation.num_train_prompts]
    return tuple(chosen)
