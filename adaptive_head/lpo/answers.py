"""The answers of an evaluation on disk: a file an arm, written as they come."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from adaptive_head.files import replace_file
from adaptive_head.lpo.arms import ResponseKey
from adaptive_head.lpo.records import DataError, Response, parse_line, to_line

KEY_FILE = "key.json"
LOCK_FILE = ".lock"
_RESPONSE = TypeAdapter(Response)


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
        return _parse_answers(path, path.read_bytes())

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


def find_answers(folder: Path, prefix: str) -> list[str]:
    """The names of the arms in a folder that begin so, in order."""
    files = folder.glob(f"{glob.escape(prefix)}*.jsonl*")
    return sorted({path.name.removesuffix(".gz").removesuffix(".jsonl") for path in files})


def read_answers(folder: Path, arm: str) -> dict[ResponseKey, Response]:
    """The answers of an arm, compressed (`.jsonl.gz`) or not.

    Raises:
        DataError: there are none, a line is not an answer, or answers what another did.
    """
    path = folder / f"{arm}.jsonl"
    packed = path.with_name(f"{path.name}.gz")
    try:
        if path.exists():
            return _parse_answers(path, path.read_bytes())
        return _parse_answers(packed, gzip.decompress(packed.read_bytes()))
    except (FileNotFoundError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{packed} cannot be read: {error}") from None


def _parse_answers(path: Path, content: bytes) -> dict[ResponseKey, Response]:
    answers: dict[ResponseKey, Response] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        where = f"{path}, line {number}"
        response = parse_line(where, line.decode(errors="replace"), _RESPONSE)
        if response.key in answers:
            raise DataError(f"{where}: {response.key} is there twice")
        answers[response.key] = response
    return answers


def pack_answers(source: Path, target: Path, arms: Iterable[str]) -> None:
    """Write the answers of some arms to another folder, compressed.

    Without the prompts' tokens, and with log-probabilities rounded to a ten-thousandth.
    """
    target.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        responses = [
            replace(
                response,
                prompt_token_ids=(),
                logprobs=response.logprobs and tuple(round(p, 4) for p in response.logprobs),
            )
            for response in read_answers(source, arm).values()
        ]
        content = "".join(map(to_line, sorted(responses, key=lambda response: response.key)))
        # Without a time in it, so that equal answers make equal files.
        (target / f"{arm}.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))


def _read_key_file(path: Path) -> dict[str, Any]:
    """Each arm's key, and the seconds spent so far."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"arms": {}, "seconds": 0.0}
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(about, dict) or about.keys() != {"arms", "seconds"}:
        raise DataError(f"{path} is not a file of keys")
    return about
