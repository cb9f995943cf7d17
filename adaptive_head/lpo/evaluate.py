"""Evaluation: heads and their controls answer held-out prompts, and are compared."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from adaptive_head.checkpoint import replace_file
from adaptive_head.lpo import engine as engines
from adaptive_head.lpo.arms import (
    Arm,
    HeadUnderTest,
    ResponseKey,
    make_arm_key,
    plan_arms,
    plan_controls,
    read_heads,
    save_shuffled_heads,
)
from adaptive_head.lpo.engine import Engine, Generation, GenerationRequest
from adaptive_head.lpo.experiment import EngineConfig, Experiment
from adaptive_head.lpo.plots import describe_temperatures, draw_plots
from adaptive_head.lpo.progress import TokenProgress
from adaptive_head.lpo.records import DataError, Prompt, Response, parse_line, to_line
from adaptive_head.lpo.report import ArmSummary, build_results, summarise_arm, write_report
from adaptive_head.lpo.rewards import Reward, score_responses

Encode = Callable[[Prompt], tuple[int, ...]]
Rewards = Mapping[str, Mapping[str, Reward]]
OpenEngine = Callable[
    [Path | str, EngineConfig, Mapping[str, Path]], AbstractContextManager[Engine]
]

KEY_FILE = "key.json"
LOCK_FILE = ".lock"
_RESPONSE = TypeAdapter(Response)


def evaluate(
    experiment: Experiment,
    model: Path | str,
    heads: Mapping[str, Path],
    train_prompts: Sequence[Prompt],
    test_prompts: Sequence[Prompt],
    encode: Encode,
    rewards: Rewards,
    folder: Path,
    *,
    open_engine: OpenEngine = engines.open_engine,
) -> None:
    """Compare trained heads with the controls of `lpo.arms` on held-out prompts.

    Writes `answers/ARM.jsonl`, `controls/` (heads that shuffle), `results.json`, `results.md` and
    plots. Answers are kept: after an interruption, and after a change of the settings of some
    arms only, the rest is generated; an arm whose settings changed starts over.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        heads: folders by name; a name that is one of the experiment's heads answers the tasks
            that it was trained for, any other all tasks.
        train_prompts: of each task the first `evaluation.num_train_prompts` choose its best fixed
            temperature.
        encode: a prompt's token ids.
        rewards: by task and name.

    Raises:
        HeadError: a folder is not a head.
        DataError: a reward failed, an answers file is damaged, or another process writes there.
        OSError: the disk is full; every answer written so far is kept.
    """
    questions = Questions(
        {"train": choose_train_prompts(experiment, train_prompts), "test": tuple(test_prompts)},
        experiment.evaluation.num_responses,
    )
    tested = read_heads(experiment, heads)
    with AnswerBook(folder / "answers") as book:
        examiner = Examiner(experiment, model, tested, questions, encode, rewards, book, open_engine)
        arms = plan_arms(experiment, tested)
        examiner.examine(arms, heads)
        control_heads: dict[str, Path] = {}
        controls = []
        for name, head in tested.items():
            answers = examiner.read_answers(next(a for a in arms if a.name == f"head-{name}"))
            controls += plan_controls(experiment, head, answers)
            control_heads |= save_shuffled_heads(controls[-1], head.metadata, folder / "controls")
        examiner.examine(controls, control_heads)

        summaries: dict[str, ArmSummary] = {}
        temperatures: dict[str, dict[str, Any]] = {}
        for arm in [*arms, *controls]:
            answers = examiner.read_answers(arm)
            summaries[arm.name] = summarise_arm(arm, answers, questions.prompts[arm.split], rewards)
            if arm.kind == "head":
                head = tested[arm.head or ""]
                temperatures[head.name] = describe_temperatures(
                    head.metadata, answers, questions.prompts["test"], rewards
                )
        seconds = book.num_seconds
    results = build_results(
        experiment, tested, questions.prompts, summaries, temperatures, rewards, seconds
    )
    write_report(results, folder)
    draw_plots(results, folder)


def choose_train_prompts(experiment: Experiment, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Of each task the first `num_train_prompts`."""
    chosen: list[Prompt] = []
    for task in experiment.tasks:
        of_task = [prompt for prompt in prompts if prompt.task == task]
        chosen += of_task[: experiment.evaluation.num_train_prompts]
    return tuple(chosen)


@dataclass(frozen=True)
class Questions:
    """What every arm is asked: each prompt of its split and its tasks, so many times."""

    prompts: Mapping[str, tuple[Prompt, ...]]
    num_responses: int

    def list(self, arm: Arm) -> Iterator[tuple[Prompt, int]]:
        """Prompt and sample of each answer of an arm."""
        for prompt in self.prompts[arm.split]:
            if prompt.task in arm.settings:
                for sample in range(self.num_responses):
                    yield prompt, sample


@dataclass(frozen=True)
class Examiner:
    """Gets the answers of arms. The fields are those of `evaluate`."""

    experiment: Experiment
    model: Path | str
    tested: Mapping[str, HeadUnderTest]
    questions: Questions
    encode: Encode
    rewards: Rewards
    book: "AnswerBook"
    open_engine: OpenEngine

    def examine(self, arms: Sequence[Arm], heads: Mapping[str, Path]) -> None:
        """Generate and score what these arms have not answered yet, in one go.

        Args:
            heads: that their requests name.
        """
        missing = []
        for arm in arms:
            prompts = self.questions.prompts[arm.split]
            key = make_arm_key(self.experiment, self.tested, arm, prompts)
            done = self.book.open(arm.name, key)
            missing += [
                (arm, prompt, sample)
                for prompt, sample in self.questions.list(arm)
                if (prompt.id, sample) not in done
            ]
        if not missing:
            return
        by_id = {f"{arm.name}|{p.id}|{sample}": (arm, p, sample) for arm, p, sample in missing}
        with (
            self.open_engine(self.model, self.experiment.engine, heads) as engine,
            TokenProgress("evaluation", len(by_id)) as progress,
        ):
            try:
                for generation in engine.generate(self._make_requests(by_id)):
                    arm, prompt, sample = by_id[generation.id]
                    self.book.write(arm.name, self._score(arm, prompt, sample, generation))
                    progress.advance(len(generation.token_ids))
            finally:
                self.book.add_seconds(progress.num_seconds)

    def read_answers(self, arm: Arm) -> list[Response]:
        """All answers of an arm, in the order of its questions."""
        answers = self.book.read(arm.name)
        return [answers[prompt.id, sample] for prompt, sample in self.questions.list(arm)]

    def _make_requests(
        self, questions: Mapping[str, tuple[Arm, Prompt, int]]
    ) -> Iterator[GenerationRequest]:
        encoded: dict[str, tuple[int, ...]] = {}
        for request_id, (arm, prompt, sample) in questions.items():
            if prompt.id not in encoded:
                encoded[prompt.id] = self.encode(prompt)
            yield GenerationRequest(
                id=request_id,
                prompt_token_ids=encoded[prompt.id],
                max_tokens=self.experiment.tasks[prompt.task].max_tokens,
                seed=arm.make_seed(self.experiment, prompt, sample),
                temperature=arm.find_setting(prompt, sample),
            )

    def _score(self, arm: Arm, prompt: Prompt, sample: int, generation: Generation) -> Response:
        response = Response(
            prompt_id=prompt.id,
            task=prompt.task,
            sample=sample,
            seed=arm.make_seed(self.experiment, prompt, sample),
            prompt_token_ids=self.encode(prompt),
            token_ids=generation.token_ids,
            temperatures=generation.temperatures,
            text=generation.text,
            finish_reason=generation.finish_reason,
        )
        (scored,) = score_responses(self.rewards[prompt.task], [prompt], [response])
        return scored


class AnswerBook:
    """The answers of all arms on disk, a file each, written as they come.

    A line is written whole and flushed before the next begins, so that a killed process leaves at
    most one torn line at the end of a file, which is cut off.

    Raises:
        DataError: another process writes to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._closing = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)
        try:
            self._closing.enter_context(lock.acquire(timeout=0))
        except Timeout:
            raise DataError(f"{folder}: another process is writing there") from None
        self._about = _read_key_file(folder / KEY_FILE)

    @property
    def num_seconds(self) -> float:
        """Spent on generating, by all runs that ended by themselves."""
        return self._about["seconds"]

    def open(self, arm: str, key: str) -> set[ResponseKey]:
        """Begin an arm, or go on with it if it has the same key.

        Returns:
            The prompts and samples that are answered.

        Raises:
            DataError: a line is not an answer, or answers what another did.
        """
        path = self._get_path(arm)
        if self._about["arms"].get(arm) != key:
            path.unlink(missing_ok=True)
            self._about["arms"][arm] = key
            self._write_about()
        file = self._closing.enter_context(path.open("a+b"))
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        self._files[arm] = file
        return set(self.read(arm))

    def write(self, arm: str, response: Response) -> None:
        """Append an answer."""
        self._files[arm].write(to_line(response).encode())
        self._files[arm].flush()

    def read(self, arm: str) -> dict[ResponseKey, Response]:
        """The answers so far; DataError as for `open`."""
        path = self._get_path(arm)
        answers: dict[ResponseKey, Response] = {}
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                response = parse_line(where, line.decode(errors="replace"), _RESPONSE)
                if response.key in answers:
                    raise DataError(f"{where}: {response.key} is there twice")
                answers[response.key] = response
        return answers

    def add_seconds(self, seconds: float) -> None:
        """Count time spent on generating."""
        self._about["seconds"] += seconds
        self._write_about()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.close()

    def _get_path(self, arm: str) -> Path:
        return self._folder / f"{arm}.jsonl"

    def _write_about(self) -> None:
        replace_file(self._folder / KEY_FILE, json.dumps(self._about, indent=2) + "\n")


def _read_key_file(path: Path) -> dict[str, Any]:
    """Each arm's key and the seconds spent; a file that is none counts for nothing."""
    ...
