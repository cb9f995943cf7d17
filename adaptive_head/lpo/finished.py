"""A finished evaluation on disk, read again without a model."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adaptive_head.lpo.answers import find_answers, read_answers
from adaptive_head.lpo.arms import Arm, Family, ResponseKey, Setting, format_temperature, get_base
from adaptive_head.lpo.comparison import Comparison, Opponent
from adaptive_head.lpo.controls import count_samples, count_tuning_samples
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.layout import (
    ANSWERS_FOLDER,
    EVALUATION_FOLDER,
    EXPERIMENT_FILE,
    PROMPTS_FOLDER,
    RESULTS_FILE,
)
from adaptive_head.lpo.records import DataError, Prompt, Response, read_records
from adaptive_head.lpo.summaries import ArmSummary, summarise_arm
from adaptive_head.lpo.tuning import choose_best_fixed, choose_train_prompts

HEAD, FIXED, TRAIN = "head-", "fixed-", "train-fixed-"


class FinishedEvaluation:
    """The answers of the heads and of the fixed temperatures.

    Args:
        run: the folder with `experiment.json`, `prompts/` and `evaluation/`.

    Raises:
        DataError: a file is missing or damaged; the evaluation is not finished.
    """

    def __init__(self, run: Path) -> None:
        path = run / EXPERIMENT_FILE
        try:
            experiment = Experiment.model_validate_json(path.read_bytes())
            self.results: dict[str, Any] = json.loads(
                (run / EVALUATION_FOLDER / RESULTS_FILE).read_bytes()
            )
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing; the run is not finished") from None
        except ValidationError as error:
            raise DataError(f"{path}: {error.errors()[0]['msg']}") from None
        except ValueError as error:
            raise DataError(f"{run / EVALUATION_FOLDER / RESULTS_FILE}: {error}") from None
        # Votes need rewards, and so models; nothing here asks for them.
        evaluation = experiment.evaluation.model_copy(update={"majority": False})
        self.experiment = experiment.model_copy(update={"evaluation": evaluation})
        self.folder = run / EVALUATION_FOLDER / ANSWERS_FOLDER
        prompts = {
            split: list(read_records(run / PROMPTS_FOLDER / f"{split}.jsonl", Prompt))
            for split in ("train", "test")
        }
        self._answers: dict[str, dict[ResponseKey, Response]] = {}
        self._train = choose_train_prompts(experiment, prompts["train"])
        self._test = prompts["test"]

    @property
    def heads(self) -> dict[str, Any]:
        """The heads by name, with their `identity` as JSON; of each its first training."""
        heads: dict[str, Any] = self.results.get("heads") or {}
        return heads

    def list_tasks(self, head: str) -> tuple[str, ...]:
        """The tasks that a head answers."""
        recipe = self.experiment.heads.get(get_base(head))
        return (recipe and recipe.tasks) or tuple(self.experiment.tasks)

    def choose_best(self, head: str) -> float:
        """The fixed temperature that wins most often on the training prompts of a head's tasks."""
        tasks = {task: self.experiment.tasks[task] for task in self.list_tasks(head)}
        of_tasks = self.experiment.model_copy(update={"tasks": tasks})
        answers = {arm.name: self.read_arm(arm.name, tasks) for arm in self._tuning_arms}
        best = choose_best_fixed(of_tasks, answers, self._tuning_arms)
        if best is None:
            raise DataError(f"{self.folder}: no answers to training prompts ({TRAIN}*)")
        return best.overall

    def compare(self, head: str, constant: float) -> dict[str, Any]:
        """A head and a constant on the average of the head's tasks: a row of `Comparison`.

        It is the only row, so that its intervals are not corrected for others.
        """
        tasks = self.list_tasks(head)
        other = self._summarise(f"{FIXED}{format_temperature(constant)}", tasks)
        arms = {task: [other] for task in tasks}
        own = [self._summarise(f"{HEAD}{head}", tasks)]
        comparison = Comparison(self.experiment, self._test, {})
        return comparison.compare_on_average(own, [Opponent("fixed", "", arms)], tasks)[1]

    def read_arm(self, name: str, tasks: Iterable[str]) -> list[Response]:
        """An arm's answers to the prompts of some tasks, in their order.

        Raises:
            DataError: one is missing.
        """
        is_train = name.startswith(TRAIN)
        num_samples = (
            count_tuning_samples(self.experiment, len(self._tuning_arms))
            if is_train
            else count_samples(self.experiment)
        )
        if name not in self._answers:
            self._answers[name] = read_answers(self.folder, name)
        answers = self._answers[name]
        found = []
        for prompt in self._train if is_train else self._test:
            for sample in range(num_samples if prompt.task in tasks else 0):
                if (prompt.id, sample) not in answers:
                    where = f"answer {sample} to prompt {prompt.id}"
                    raise DataError(f"{self.folder}: {name} has no {where}")
                found.append(answers[prompt.id, sample])
        return found

    def _summarise(self, name: str, tasks: Sequence[str]) -> ArmSummary:
        answers = self.read_arm(name, tasks)
        return summarise_arm(_make_arm(name, tasks), "token", answers, self.experiment, {})

    @cached_property
    def _tuning_arms(self) -> list[Arm]:
        names = find_answers(self.folder, TRAIN)
        return [_make_arm(name, tuple(self.experiment.tasks)) for name in names]


def _make_arm(name: str, tasks: Sequence[str]) -> Arm:
    """An arm as far as comparisons look at it."""
    is_head = name.startswith(HEAD)
    family: Family | None = None if is_head else "fixed"
    temperature = None if is_head else float(name.rpartition("-")[2])
    return Arm(
        name,
        "head" if is_head else "train" if name.startswith(TRAIN) else "fixed",
        dict.fromkeys(tasks, Setting(temperature or 0.0)),
        num_samples=1,
        head=name.removeprefix(HEAD) if is_head else None,
        family=family,
        temperature=temperature,
    )
