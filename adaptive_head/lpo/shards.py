"""Responses on disk as they come: append-only shards with a manifest, whole after any kill."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from adaptive_head.files import replace_file
from adaptive_head.lpo.records import DataError, Response, parse_line, read_records, to_line

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
_RESPONSE = TypeAdapter(Response)


class ShardWriter:
    """Appends responses to the shards of a folder, each response once.

    A line is written whole and flushed before the next begins, so that a killed process leaves at
    most one torn line, at the end of the last shard; the next writer cuts it off. A full shard is
    entered in the manifest with its hash, and never touched again.

    Args:
        folder: of the shards; made if missing.
        key: of the settings that the responses belong to.
        shard_size: responses a shard.

    Raises:
        DataError: the folder holds responses of other settings, a shard was changed or is not
            readable, or another process writes to the folder.
    """

    def __init__(self, folder: Path, key: str, shard_size: int) -> None:
        self._folder = folder
        self._key = key
        self._shard_size = shard_size
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK_FILE)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"{folder}: another process is writing there") from None
        self._file: IO[bytes] | None = None
        try:
            self._closed = self._read_manifest()
            self.keys = {response.key for response in self._read_closed()}
            self._open_last()
        except BaseException:
            self.close()
            raise

    def write(self, response: Response) -> None:
        """Append a response.

        Raises:
            OSError: the disk is full, say; what was written before stays.
            DataError: the response is there already.
        """
        if response.key in self.keys:
            raise DataError(f"{self._folder}: response {response.key} came twice")
        assert self._file is not None
        self._file.write(to_line(response).encode())
        self._file.flush()
        self.keys.add(response.key)
        self._num_in_last += 1
        if self._num_in_last >= self._shard_size:
            self._seal_last()
            self._open_last()

    def finish(self) -> None:
        """Seal the last shard: no response is missing."""
        if self._num_in_last:
            self._seal_last()
        self._write_manifest(is_complete=True)

    def close(self) -> None:
        """Let another process write to the folder."""
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read_manifest(self) -> dict[str, dict[str, object]]:
        manifest = read_manifest(self._folder)
        if manifest is None:
            self._closed = {}
            self._write_manifest()
            return {}
        if manifest["key"] != self._key:
            raise DataError(
                f"{self._folder} holds responses of other settings: delete it to start over, "
                "or give another folder"
            )
        return dict(manifest["shards"])

    def _read_closed(self) -> Iterator[Response]:
        for name, entry in self._closed.items():
            path = self._folder / name
            if not path.is_file() or _hash(path) != entry["sha256"]:
                raise DataError(f"{path} is not the shard that {MANIFEST_FILE} knows")
            yield from read_records(path, Response)

    def _open_last(self) -> None:
        path = self._folder / f"shard-{len(self._closed):05d}.jsonl"
        self._num_in_last = 0
        size = 0
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                text = line.decode(errors="replace")
                response = parse_line(f"{path}, line {number}", text, _RESPONSE)
                if response.key in self.keys:
                    raise DataError(f"{path}, line {number}: {response.key} is there twice")
                self.keys.add(response.key)
                self._num_in_last += 1
                size += len(line)
        self._last = path
        self._file = path.open("ab")
        self._file.truncate(size)

    def _seal_last(self) -> None:
        assert self._file is not None
        self._file.close()
        self._closed[self._last.name] = {
            "num_responses": self._num_in_last,
            "sha256": _hash(self._last),
        }
        self._num_in_last = 0
        self._write_manifest()

    def _write_manifest(self, is_complete: bool = False) -> None:
        content = {"key": self._key, "is_complete": is_complete, "shards": self._closed}
        replace_file(self._folder / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> dict | None:
    """A folder's manifest, or None where there is none.

    Raises:
        DataError: it is not one.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.keys() != {"key", "is_complete", "shards"}:
        raise DataError(f"{path} is not a manifest of shards")
    return manifest


def read_shards(folder: Path) -> list[Response]:
    """All responses of a complete folder, in the order of prompt and sample.

    Raises:
        DataError: responses are missing, or a shard is not readable.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest["is_complete"]:
        raise DataError(f"{folder} is not complete yet")
    responses = (r for name in manifest["shards"] for r in read_records(folder / name, Response))
    return sorted(responses, key=lambda response: response.key)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
