"""The request log: one line of JSON for every request to an inference route."""

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import threading
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from vllm.logger import init_logger

from server.record import Observer, RequestRecord

logger = init_logger("vllm.adaptive")

STDOUT = "-"
MAX_WAITING_LINES = 10_000
CLOSE_TIMEOUT_S = 5.0
# Writes ASCII, so that no text from a client can break a line or an encoding.
FORMATTER = JsonFormatter(
    (),
    # vLLM adds its process's name to every log record.
    reserved_attrs=[*RESERVED_ATTRS, "vllm_process_name"],
    json_serializer=partial(json.dumps, separators=(",", ":")),
)


class RequestLog(logging.handlers.QueueListener, Observer):
    """Writes a line for every request that has ended, in a thread of its own.

    A disk that is slow, full or gone loses lines, and delays no request: lines that find
    `MAX_WAITING_LINES` others waiting, or cannot be written, are counted in
    `adaptive_request_log_lost_total`.

    Args:
        target: a file, which is appended to (and reopened where it was moved away, as logrotate
            does), or "-" for the standard output.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, target: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        super().__init__(self._lines, open_handler(target))
        self._entry = logging.handlers.QueueHandler(self._lines)
        self._entry.setFormatter(FORMATTER)
        self._lost = Counter(
            "adaptive_request_log_lost", "Lines that the log had to drop.", registry=registry
        )
        self._is_failing = self._is_closed = False
        self.start()

    def end(self, record: RequestRecord) -> None:
        """Have the request's line written."""
        self.write(describe(record))

    def write(self, fields: dict[str, Any]) -> None:
        """Have a line written; returns at once."""
        if self._is_closed or self._lines.qsize() >= MAX_WAITING_LINES:
            self._lost.inc()
        else:
            self._entry.handle(logging.makeLogRecord({"msg": fields}))

    def handle(self, record: logging.LogRecord) -> None:
        """Write a line, in the listener's thread."""
        try:
            super().handle(record)
            self._is_failing = False
        except OSError as error:
            self._lost.inc()
            if not self._is_failing:
                logger.error("the request log cannot be written: %s", error)
            self._is_failing = True

    def stop(self) -> None:
        """Write what waits, however long that takes, and close the file."""
        super().stop()
        with contextlib.suppress(OSError):
            self.handlers[0].close()

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        self._is_closed = True
        stopping = threading.Thread(target=self.stop, daemon=True)
        stopping.start()
        stopping.join(CLOSE_TIMEOUT_S)


class LineHandler(logging.handlers.WatchedFileHandler):
    """Writes a line with one call, so that processes can share a file.

    Opens the file again after an error. A buffer would keep a line that could not be written, and
    fail on it again before the file is opened once more.
    """

    _is_torn = False

    def _open(self) -> Any:
        return open(self.baseFilename, "ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line.

        Raises:
            OSError: it was not written, or only its beginning. The next line begins a new one.
        """
        try:
            self.reopenIfNeeded()
            if self.stream is None:
                self.stream = self._open()
                self._statstream()
            self._write(f"{self.format(record)}\n".encode())
        except OSError:
            if self.stream is not None:
                with contextlib.suppress(OSError):
                    self.stream.close()
            self.stream = None
            raise

    def _write(self, line: bytes) -> None:
        # Typed as a text file, which `_open` does not open.
        stream: Any = self.stream
        if self._is_torn and os.fstat(stream.fileno()).st_size:
            line = b"\n" + line
        rest = line
        while rest := rest[stream.write(rest) :]:
            self._is_torn = True
        self._is_torn = False


def open_handler(target: str) -> logging.Handler:
    """A handler whose errors are raised and not printed."""
    if target != STDOUT:
        return LineHandler(target)

    def raise_again(record: logging.LogRecord) -> NoReturn:
        raise  # what a handler would print otherwise

    # Not sys.stdout: vLLM puts a prefix before every line of that.
    handler = logging.StreamHandler(open(1, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    handler.handleError = raise_again  # type: ignore[method-assign]
    return handler


def check_target(target: str) -> None:
    """Try a log's file before anything else is started: write a line that marks the start.

    Raises:
        ValueError: names the file, and what is wrong with it.
    """
    if target == STDOUT:
        return
    try:
        with Path(target).open("a", encoding="utf-8") as file:
            line = {"time": tell_time(), "level": "info", "event": "start"}
            file.write(FORMATTER.format(logging.makeLogRecord({"msg": line})) + "\n")
    except OSError as error:
        raise ValueError(f"--request-log {target}: {error.strerror}") from None


def describe(record: RequestRecord) -> dict[str, Any]:
    """A line's fields. Never prompts, answers, or messages that may quote them."""
    is_refused = record.status is not None and record.status >= 400
    fields: dict[str, Any] = {
        "time": tell_time(),
        "level": "error" if record.is_failed else "warning" if is_refused else "info",
        "event": "request",
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "duration_ms": to_ms(record.duration_s),
        "ttft_ms": None if record.ttft_s is None else to_ms(record.ttft_s),
        "model": record.model,
        "stream": record.is_stream,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reasons": record.finish_reasons,
        "aborted": record.is_aborted,
    }
    optional = {"error": record.error, "adaptive": record.adaptive, "trace_id": record.trace_id}
    return fields | {key: value for key, value in optional.items() if value is not None}


def tell_time() -> str:
    """Now, by RFC 3339, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
