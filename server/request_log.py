"""The request log: one line of JSON for every request to an inference route."""

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from starlette.types import Scope
from vllm.logger import init_logger

from server.record import RequestRecord

logger = init_logger("vllm.adaptive")

STDOUT = "-"
MAX_WAITING_LINES = 10_000
CLOSE_TIMEOUT_S = 5.0


class RequestLog:
    """Observes requests and writes them, in a thread of its own.

    A disk that is slow, full or gone loses lines, and delays no request: lines that find
    `MAX_WAITING_LINES` others waiting, or cannot be written, are counted in
    `adaptive_request_log_lost_total`.

    Args:
        target: a file, which is appended to (and opened anew where it was moved away, as
            logrotate does), or "-" for the standard output.
    """

    def __init__(self, target: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._lost = Counter(
            "adaptive_request_log_lost", "Lines that the log had to drop.", registry=registry
        )
        self._handler = open_handler(target)
        self._handler.handleError = self._count_failure  # type: ignore[method-assign]
        self._is_failing = self._has_failed = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._write_lines, name="request-log", daemon=True)
        self._thread.start()

    def begin(self, record: RequestRecord, scope: Scope) -> None:
        """Nothing is written before a request ends."""

    def end(self, record: RequestRecord) -> None:
        """Have the request's line written."""
        self.write(describe(record))

    def write(self, fields: dict[str, Any]) -> None:
        """Have a line written; returns at once."""
        try:
            if self._is_closed:
                raise queue.Full
            self._lines.put_nowait(format_line(fields))
        except queue.Full:
            self._lost.inc()

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        self._is_closed = True
        try:
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            record = logging.makeLogRecord({"msg": line})
            self._has_failed = False
            try:
                self._handler.handle(record)
            except OSError:
                # Opening anew failed; what fails in writing comes to `_count_failure` by itself.
                self._count_failure(record)
            self._is_failing = self._has_failed
        with contextlib.suppress(OSError):
            self._handler.close()

    def _count_failure(self, record: logging.LogRecord) -> None:
        self._lost.inc()
        self._has_failed = True
        if not self._is_failing:
            logger.error("the request log cannot be written: %s", sys.exc_info()[1])


def open_handler(target: str) -> logging.Handler:
    """A handler that writes a line with one call, so that processes can share a file."""
    if target != STDOUT:
        return logging.handlers.WatchedFileHandler(target, encoding="utf-8")
    # Not sys.stdout: vLLM puts a prefix before every line of that.
    return logging.StreamHandler(open(1, "w", encoding="utf-8", closefd=False))


def check_target(target: str) -> None:
    """Try a log's file before anything else is started: write a line that marks the start.

    Raises:
        ValueError: names the file, and what is wrong with it.
    """
    if target == STDOUT:
        return
    try:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(format_line({"time": tell_time(), "level": "info", "event": "start"}) + "\n")
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


def format_line(fields: dict[str, Any]) -> str:
    """JSON in ASCII: no text that a client sends can break a line or an encoding."""
    return json.dumps(fields, separators=(",", ":"))


def tell_time() -> str:
    """Now, by RFC 3339, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
