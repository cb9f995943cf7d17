"""The gate: whether a head is fit to be a default, judged by the answers of a run.

A head passes if, on kinds of prompts that it never saw, it gives hardly more bad answers than the
best constant, and does not lose to the best constant on its own tasks. Training prompts choose the
constants. A verdict is computed from the answers anew, without a model and in seconds.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError

from adaptive_head.checkpoint import read_metadata, write_metadata
from adaptive_head.lpo.answers import find_answers, pack_answers, read_answers
from adaptive_head.lpo.arms import Arm, Setting, format_temperature, get_base, identify_head
from adaptive_head.lpo.comparison import Comparison, Opponent
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.fluency import is_garbled, is_looping
from adaptive_head.lpo.records import DataError, Prompt, Response, read_records
from adaptive_head.lpo.report import RESULTS_FILE, TABLES_FILE
from adaptive_head.lpo.run import (
    EVALUATION_FOLDER,
    EXPERIMENT_FILE,
    OUTSIDE_FOLDER,
    PROMPTS_FOLDER,
)
from adaptive_head.lpo.statistics import Interval
from adaptive_head.lpo.summaries import ArmSummary, summarise_arm
from adaptive_head.lpo.tuning import BestFixed, choose_best_fixed
from adaptive_head.metadata import GateOutcome

# Of the share of bad answers, the head's minus the constant's: the mean and its interval's end.
MAX_DIFFERENCE: Final = 0.02
MAX_UPPER_END: Final = 0.05
MIN_ANSWERS: Final = 400
EVEN: Final = 0.5

ANSWERS_FOLDER = "answers"
_HEAD, _FIXED, _TRAIN = "head-", "fixed-", "train-fixed-"


@dataclass(frozen=True)
class Verdict:
    """What the gate found of a head.

    Attributes:
        num_answers: of the head, to prompts of kinds that it never saw.
        constant: the best fixed temperature there.
        bad: the head's share of bad answers; kinds weigh the same.
        constant_bad: the constant's.
        garbled, looping: the head's shares of either.
        difference: `bad` minus `constant_bad`.
        own_constant: the best fixed temperature on the head's own tasks.
        win_rate: the head's against it, the average of its tasks.
    """

    head: str
    num_answers: int
    constant: float
    bad: float
    constant_bad: float
    garbled: float
    looping: float
    difference: Interval
    own_constant: float
    win_rate: Interval

    @property
    def reasons(self) -> list[str]:
        """Why it fails; empty where it passes."""
        found = []
        high = self.difference.high
        if self.num_answers < MIN_ANSWERS:
            found.append(f"{self.num_answers} answers to unseen kinds; {MIN_ANSWERS} are needed")
        if self.difference.mean > MAX_DIFFERENCE:
            found.append(f"more bad answers than the constant by above {MAX_DIFFERENCE:g}")
        if high is None:
            found.append("too few groups of prompts for an interval")
        elif high > MAX_UPPER_END:
            found.append(f"its interval reaches above {MAX_UPPER_END:g}")
        if self.win_rate.high is None:
            found.append("too few groups of its own prompts for an interval")
        elif self.win_rate.excludes(EVEN) and self.win_rate.mean < EVEN:
            found.append("loses to the best constant on its own tasks")
        return found

    @property
    def passes(self) -> bool:
        return not self.reasons


def judge_run(run: Path) -> list[Verdict]:
    """The verdict on every head of a run.

    Args:
        run: folder of the run, as `Run` or `pack_run` leaves it.

    Raises:
        DataError: the run has no outside tasks, is not finished, or a file of it is damaged.
    """
    own, outside = _Evaluation(run), _Evaluation(run / OUTSIDE_FOLDER)
    names = own.list_heads()
    if not names:
        raise DataError(f"{own.folder}: no answers of a head; the run is not finished")
    return [_judge_head(name, own, outside) for name in names]


def _judge_head(name: str, own: "_Evaluation", outside: "_Evaluation") -> Verdict:
    difference = outside.compare(name)["difference"]
    answers = list(outside.read_head(name))
    constant = outside.best.overall
    bad, constant_bad = (
        outside.measure_bad(of_arm)
        for of_arm in (answers, outside.read_arm(f"{_FIXED}{format_temperature(constant)}"))
    )
    return Verdict(
        head=name,
        num_answers=len(answers),
        constant=constant,
        bad=bad,
        constant_bad=constant_bad,
        garbled=outside.average(answers, [is_garbled(r.logprobs or ()) for r in answers]),
        looping=outside.average(answers, [is_looping(r.text) for r in answers]),
        # Of fluent answers the head has so many more as it has fewer bad ones.
        difference=Interval(
            -difference["mean"], _negate(difference["high"]), _negate(difference["low"])
        ),
        own_constant=own.best.overall,
        win_rate=Interval(**own.compare(name)["win_rate"]),
    )


def _negate(value: float | None) -> float | None:
    return None if value is None else -value


class _Evaluation:
    """The answers of a run to its own tasks, or to the outside ones."""

    def __init__(self, run: Path) -> None:
        path = run / EXPERIMENT_FILE
        try:
            experiment = Experiment.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            missing = "outside tasks" if run.name == OUTSIDE_FOLDER else EXPERIMENT_FILE
            raise DataError(f"{run}: there is no run with {missing}") from None
        except ValidationError as error:
            raise DataError(f"{path}: {error.errors()[0]['msg']}") from None
        evaluation = experiment.evaluation.model_copy(update={"majority": False})
        self.experiment = experiment.model_copy(update={"evaluation": evaluation})
        self.folder = run / EVALUATION_FOLDER / ANSWERS_FOLDER
        self._prompts = {
            split: list(read_records(run / PROMPTS_FOLDER / f"{split}.jsonl", Prompt))
            for split in ("train", "test")
        }

    def list_heads(self) -> list[str]:
        """The names of the heads that have answered, those of further training seeds left out."""
        names = [name.removeprefix(_HEAD) for name in find_answers(self.folder, _HEAD)]
        return [name for name in names if get_base(name) == name]

    @cached_property
    def best(self) -> BestFixed:
        """The fixed temperatures that the training prompts chose."""
        names = find_answers(self.folder, _TRAIN)
        arms = [self._make_arm(name) for name in names]
        answers = {arm.name: list(self.read_arm(arm.name)) for arm in arms}
        best = choose_best_fixed(self.experiment, answers, arms)
        if best is None:
            raise DataError(f"{self.folder}: no answers to training prompts ({_TRAIN}*)")
        return best

    def compare(self, head: str) -> dict[str, Any]:
        """A head and the best constant on the average of its tasks: a row of `Comparison`.

        The only comparison that counts, so that its interval is not corrected for others.
        """
        names = [n for n in find_answers(self.folder, _HEAD) if get_base(n) == f"{_HEAD}{head}"]
        recipe = self.experiment.heads.get(head)
        tasks = (recipe and recipe.tasks) or tuple(self.experiment.tasks)
        constant = self._summarise(f"{_FIXED}{format_temperature(self.best.overall)}")
        arms = {task: [constant] for task in tasks}
        opponent = Opponent("best_fixed_overall", "", arms)
        comparison = Comparison(self.experiment, self._prompts["test"], {})
        own = [self._summarise(name) for name in names]
        return comparison.compare_on_average(own, [opponent], tasks)[1]

    def read_head(self, head: str) -> Iterator[Response]:
        """The answers of a head, those of its further training seeds among them."""
        for name in find_answers(self.folder, _HEAD):
            if get_base(name) == f"{_HEAD}{head}":
                yield from self.read_arm(name)

    def read_arm(self, name: str) -> Iterator[Response]:
        """An arm's answers to the prompts of its split, in their order.

        Raises:
            DataError: one is missing.
        """
        split = "train" if name.startswith(_TRAIN) else "test"
        answers = read_answers(self.folder, name)
        num_samples = 1 + max((sample for _, sample in answers), default=0)
        for prompt in self._prompts[split]:
            for sample in range(num_samples):
                if (prompt.id, sample) not in answers:
                    raise DataError(
                        f"{self.folder}: {name} has no answer {sample} to prompt {prompt.id}"
                    )
                yield answers[prompt.id, sample]

    def measure_bad(self, answers: Iterator[Response] | Sequence[Response]) -> float:
        """The share of bad answers; tasks weigh the same."""
        answers = list(answers)
        bad = [is_garbled(r.logprobs or ()) or is_looping(r.text) for r in answers]
        return self.average(answers, bad)

    def average(self, answers: Sequence[Response], values: Sequence[bool]) -> float:
        """The mean over tasks of the values' means in each."""
        of_tasks: dict[str, list[bool]] = {}
        for response, value in zip(answers, values, strict=True):
            of_tasks.setdefault(response.task, []).append(value)
        return float(np.mean([np.mean(of_task) for of_task in of_tasks.values()]))

    def _summarise(self, name: str) -> ArmSummary:
        arm = self._make_arm(name)
        return summarise_arm(arm, "token", list(self.read_arm(name)), self.experiment, {})

    def _make_arm(self, name: str) -> Arm:
        """An arm as far as comparisons look at it."""
        is_head, is_train = name.startswith(_HEAD), name.startswith(_TRAIN)
        temperature = None if is_head else float(name.rpartition("-")[2])
        return Arm(
            name,
            "head" if is_head else "train" if is_train else "fixed",
            dict.fromkeys(self.experiment.tasks, Setting(temperature or 0.0)),
            num_samples=1,
            head=name.removeprefix(_HEAD) if is_head else None,
            family=None if is_head else "fixed",
            temperature=temperature,
        )


def mark_head(folder: Path, run: Path, verdicts: Sequence[Verdict]) -> Verdict:
    """Write a verdict to the head.json of the head that was judged; its name is the folder's.

    Raises:
        DataError: the run has no head of that name, or another one.
        HeadError: the folder is not a head.
    """
    name = folder.resolve().name
    found = next((verdict for verdict in verdicts if verdict.head == name), None)
    if found is None:
        raise DataError(f"{run}: has no head {name!r}, only {', '.join(v.head for v in verdicts)}")
    path = run / EVALUATION_FOLDER / RESULTS_FILE
    try:
        judged = json.loads(path.read_bytes())["heads"][name]["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: missing or damaged; the run is not finished") from None
    if identify_head(folder) != judged:
        raise DataError(f"{folder}: not the head that {run} judged, or its settings have changed")
    outcome: GateOutcome = "passed" if found.passes else "failed"
    write_metadata(folder, read_metadata(folder).model_copy(update={"gate": outcome}))
    return found


def pack_run(run: Path, target: Path) -> None:
    """Copy what a verdict rests on, and the tables of the run, with compressed answers.

    Raises:
        DataError: the run is not finished.
    """
    for folder in (Path(), Path(OUTSIDE_FOLDER)):
        source, copy = run / folder, target / folder
        answers = Path(EVALUATION_FOLDER) / ANSWERS_FOLDER
        arms = [
            name
            for prefix in (_HEAD, _FIXED, _TRAIN)
            for name in find_answers(source / answers, prefix)
        ]
        pack_answers(source / answers, copy / answers, arms)
        (copy / PROMPTS_FOLDER).mkdir(exist_ok=True)
        files = [
            Path(EXPERIMENT_FILE),
            *(Path(PROMPTS_FOLDER) / f"{s}.jsonl" for s in ("train", "test")),
        ]
        files += [Path(EVALUATION_FOLDER) / name for name in (RESULTS_FILE, TABLES_FILE)]
        for file in files:
            try:
                shutil.copyfile(source / file, copy / file)
            except FileNotFoundError:
                raise DataError(f"{source / file} is missing; the run is not finished") from None
