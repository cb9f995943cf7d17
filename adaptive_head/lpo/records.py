"""What the stages of training hand to each other, and its form on disk: JSON lines."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from adaptive_head.files import replace_file

FinishReason = Literal["stop", "length", "abort", "repetition", "error"]


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: chat `messages`, or the plain `text` that the model is to continue.

    Args:
        id: unique within an experiment, such as `arithmetic/train/17`.
        task: the name of the task that it belongs to.
        reference: what rewards compare with, such as `{"answer": 21}`.
        group: the content that it shares with other prompts, such as its operands or its title.
            Statistics resample groups. Empty where it is unknown.
        kind: stratum of the group, such as `sums`; empty: the task.
    """

    id: str
    task: str
    messages: tuple[dict[str, str], ...] | None = None
    text: str | None = None
    reference: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("a prompt has either messages or text")
        if not self.messages and not self.text:
            raise ValueError("a prompt must not be empty")


@dataclass(frozen=True)
class Response:
    """One sampled response to a prompt.

    Args:
        sample: 0 to N - 1, the response's number within its prompt.
        seed: of the request; it depends on prompt, sample and the experiment's name and seed only.
        temperatures: of each token, as the worker applied them.
        scores: by the name of the reward; higher is better.
        logprobs: of each token under the model at temperature 1, before any filter; None in files
            that were written before these were recorded.
    """

    prompt_id: str
    task: str
    sample: int
    seed: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    temperatures: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    scores: dict[str, float] = field(default_factory=dict)
    logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("temperatures", "logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(f"{len(self.token_ids)} tokens but {len(values)} {name}")
        for name, score in self.scores.items():
            if not math.isfinite(score):
                raise ValueError(f"scores.{name} is {score}")

    @property
    def key(self) -> tuple[str, int]:
        """What identifies a response within a stage: its prompt and its number."""
        return self.prompt_id, self.sample


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of a response's text, with a score of their own."""

    start: int
    stop: int
    score: float


@dataclass(frozen=True)
class Side:
    """Tokens [start, stop) of one response: what a pair prefers, or rejects."""

    prompt_id: str
    sample: int
    start: int
    stop: int

    @property
    def key(self) -> tuple[str, int]:
        """The response that the tokens belong to."""
        return self.prompt_id, self.sample


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected side of one task, and what told them apart."""

    task: str
    reward: str
    chosen: Side
    rejected: Side


Record = TypeVar("Record", Prompt, Response, Pair)


def write_records(path: Path, records: Iterable[Prompt | Response | Pair]) -> None:
    """Write a whole file of records; it appears complete or not at all."""
    replace_file(path, "".join(map(to_line, records)))


def to_line(record: Prompt | Response | Pair) -> str:
    """A record as one line of JSON, its newline included."""
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a file, one a line.

    Raises:
        DataError: names the file and the line that is not such a record.
    """
    adapter = TypeAdapter(kind)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield parse_line(f"{path}, line {number}", line, adapter)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None


def parse_line(where: str, line: str, adapter: TypeAdapter[Record]) -> Record:
    """One line of JSON as a record; DataError, beginning with `where`, if it is not one."""
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {name + ': ' if name else ''}{first['msg']}") from None
