"""The gate: whether a head is fit to be a default, judged by the answers of a run.

A head passes if, on kinds of prompts that it never saw, it gives hardly more bad answers than the
best constant, and does not lose to the best constant on its own tasks. Training prompts choose the
constants. A verdict is computed from the answers, without a model and in seconds.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from adaptive_head.checkpoint import read_metadata, write_metadata
from adaptive_head.lpo.answers import find_answers, pack_answers
from adaptive_head.lpo.arms import format_temperature, identify_head
from adaptive_head.lpo.comparison import EVEN
from adaptive_head.lpo.finished import FIXED, HEAD, TRAIN, FinishedEvaluation
from adaptive_head.lpo.fluency import is_bad, is_garbled, is_looping
from adaptive_head.lpo.layout import (
    ANSWERS_FOLDER,
    EVALUATION_FOLDER,
    EXPERIMENT_FILE,
    OUTSIDE_FOLDER,
    PROMPTS_FOLDER,
    RESULTS_FILE,
    TABLES_FILE,
)
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.lpo.statistics import Interval
from adaptive_head.metadata import GateOutcome

# Of the share of bad answers, the head's minus the constant's: the mean and its interval's end.
MAX_DIFFERENCE: Final = 0.02
MAX_UPPER_END: Final = 0.05
MIN_ANSWERS: Final = 400


@dataclass(frozen=True)
class Verdict:
    """What the gate found of a head.

    Attributes:
        num_answers: of the head, to prompts of kinds that it never saw.
        constant: the best fixed temperature there.
        bad: the head's share of bad answers; tasks weigh the same.
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
    """The verdict on every head of a run; of a head with several trainings, on the one that ships.

    Args:
        run: folder of the run, as `Run` or `pack_run` leaves it.

    Raises:
        DataError: the run has no outside tasks or is not finished, a file of it is damaged, or an
            outside task measures something other than fluency.
    """
    own = FinishedEvaluation(run)
    if not (run / OUTSIDE_FOLDER).is_dir():
        raise DataError(f"{run}: the run has no outside tasks")
    outside = FinishedEvaluation(run / OUTSIDE_FOLDER)
    for name, task in outside.experiment.tasks.items():
        if task.rewards[task.metrics[0]].kind != "fluency":
            raise DataError(f"{run}: outside.{name}: its first reward must be of kind fluency")
    for name, head in own.heads.items():
        if outside.heads.get(name, {}).get("identity") != head.get("identity"):
            raise DataError(f"{run}: head {name} has changed between its own tasks and the outside")
    return [_judge_head(name, own, outside) for name in own.heads]


def _judge_head(name: str, own: FinishedEvaluation, outside: FinishedEvaluation) -> Verdict:
    constant, own_constant = outside.choose_best(name), own.choose_best(name)
    row = outside.compare(name, constant)
    fluent = Interval(**row["difference"])
    tasks = outside.list_tasks(name)
    answers = outside.read_arm(f"{HEAD}{name}", tasks)
    others = outside.read_arm(f"{FIXED}{format_temperature(constant)}", tasks)
    return Verdict(
        head=name,
        num_answers=len(answers),
        constant=constant,
        bad=_average(answers, [is_bad(r.logprobs or (), r.text) for r in answers]),
        constant_bad=_average(others, [is_bad(r.logprobs or (), r.text) for r in others]),
        garbled=_average(answers, [is_garbled(r.logprobs or ()) for r in answers]),
        looping=_average(answers, [is_looping(r.text) for r in answers]),
        # An answer is either fluent or bad.
        difference=Interval(-fluent.mean, _negate(fluent.high), _negate(fluent.low)),
        own_constant=own_constant,
        win_rate=Interval(**own.compare(name, own_constant)["win_rate"]),
    )


def _average(answers: Sequence[Response], values: Sequence[bool]) -> float:
    """The mean over tasks of the values' means in each."""
    of_tasks: dict[str, list[bool]] = {}
    for response, value in zip(answers, values, strict=True):
        of_tasks.setdefault(response.task, []).append(value)
    return float(np.mean([np.mean(of_task) for of_task in of_tasks.values()]))


def _negate(value: float | None) -> float | None:
    return None if value is None else -value


def mark_head(folder: Path, run: Path, verdicts: Sequence[Verdict]) -> Verdict:
    """Write a verdict to the head.json of the head that was judged.

    Args:
        folder: of the head, which is found by its weights and settings.

    Raises:
        DataError: the run has judged no such head.
        HeadError: the folder is not a head.
    """
    identity = identify_head(folder)
    heads = FinishedEvaluation(run).heads
    names = [name for name, head in heads.items() if head.get("identity") == identity]
    found = next((verdict for verdict in verdicts if verdict.head in names), None)
    if found is None:
        raise DataError(f"{folder}: no head that {run} judged has its weights and settings")
    outcome: GateOutcome = "passed" if found.passes else "failed"
    write_metadata(folder, read_metadata(folder).model_copy(update={"gate": outcome}))
    return found


def pack_run(run: Path, target: Path) -> None:
    """Copy what a verdict rests on, and the run's tables and plots, with compressed answers.

    Raises:
        DataError: the run is not finished, or the target is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise DataError(f"{target} is not empty")
    answers = Path(EVALUATION_FOLDER) / ANSWERS_FOLDER
    files = [Path(EXPERIMENT_FILE)]
    files += [Path(PROMPTS_FOLDER) / f"{split}.jsonl" for split in ("train", "test")]
    files += [Path(EVALUATION_FOLDER) / name for name in (RESULTS_FILE, TABLES_FILE)]
    for folder in (Path(), Path(OUTSIDE_FOLDER)):
        source, copy = run / folder, target / folder
        arms = [
            arm for prefix in (HEAD, FIXED, TRAIN) for arm in find_answers(source / answers, prefix)
        ]
        pack_answers(source / answers, copy / answers, arms)
        (copy / PROMPTS_FOLDER).mkdir()
        for plot in (source / EVALUATION_FOLDER).glob("*.png"):
            shutil.copyfile(plot, copy / EVALUATION_FOLDER / plot.name)
        for file in files:
            try:
                shutil.copyfile(source / file, copy / file)
            except FileNotFoundError:
                raise DataError(f"{source / file} is missing; the run is not finished") from None
