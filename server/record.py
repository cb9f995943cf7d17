"""What is known of a request: filled in on its way, read when it has ended.

`Recorder` makes a record for every request to an inference route and hands it to its observers,
the request log and the tracer. Nothing of this is in the way of a server that has neither.
"""

import json
import time
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.logger import init_logger
from vllm.outputs import RequestOutput

from server.report import PromptReport, summarise_all

logger = init_logger("vllm.adaptive")

MAX_TEXT_LEN = 200
MAX_FINISH_REASONS = 100
_MAX_ERROR_BYTES = 1 << 16
# Events of the two kinds of streams.
_STREAM_ERRORS = (b'data: {"error"', b'event: error\ndata: {"')
_CURRENT: ContextVar["RequestRecord | None"] = ContextVar("request_record", default=None)


@dataclass(eq=False)
class RequestRecord:
    """One request, from its first byte to its last.

    Attributes:
        status: of the response; None where none had begun when the client left.
        ttft_s: seconds until the engine delivered the first token; None where there was none.
        is_aborted: the client left before the response was complete.
        error: `type` and `param` of an error response, or of an error inside a stream.
        trace_id: 32 hexadecimal digits, with tracing.
    """

    method: str
    path: str
    request_id: str | None = None
    started: float = field(default_factory=time.perf_counter)
    duration_s: float = 0.0
    ttft_s: float | None = None
    model: str | None = None
    is_stream: bool | None = None
    status: int | None = None
    is_complete: bool = False
    is_aborted: bool = False
    error: dict[str, str | None] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    trace_id: str | None = None
    _reports: dict[PromptReport, None] = field(default_factory=dict)
    _num_open_prompts: int = 0
    _end: Callable[[], None] | None = None

    @property
    def is_failed(self) -> bool:
        """Whether the server is to blame: a 5xx, or a stream that broke."""
        if self.status is None or self.status >= 500:
            return not self.is_aborted
        is_cut = not (self.is_complete or self.is_aborted)
        return self.status < 400 and (is_cut or self.error is not None)

    def begin(self, report: PromptReport | None) -> None:
        """A prompt is handed to the engine; an adaptive one has a report."""
        self._num_open_prompts += 1
        # Tool calls generate again with the same report.
        if report is not None:
            self._reports[report] = None

    def read(self, output: RequestOutput, is_first: bool) -> None:
        """Count an output's tokens; `is_first` where it is the first of its prompt."""
        if is_first:
            self.prompt_tokens += len(output.prompt_token_ids or ())
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        if num_tokens and self.ttft_s is None:
            self.ttft_s = self._measure_ttft(output)
        self.completion_tokens += num_tokens
        for completion in output.outputs:
            is_end = completion.finish_reason is not None
            if is_end and len(self.finish_reasons) < MAX_FINISH_REASONS:
                self.finish_reasons.append(completion.finish_reason)

    def end(self) -> None:
        """A prompt has ended: the engine delivers nothing more for it."""
        self._num_open_prompts -= 1
        self._end_if_over()

    def end_response(self, end: Callable[[], None]) -> None:
        """The response is over. Calls `end` as soon as its prompts are, too: where the client has
        gone, vLLM returns before the engine has delivered the last tokens.
        """
        self.duration_s = time.perf_counter() - self.started
        self._end = end
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._end is not None and not self._num_open_prompts:
            end, self._end = self._end, None
            end()

    def _measure_ttft(self, output: RequestOutput) -> float | None:
        if not output.finished:
            return time.perf_counter() - self.started
        # A whole answer comes at once; vLLM's statistics know when its first token came.
        return getattr(output.metrics, "first_token_latency", None) or None

    @cached_property
    def adaptive(self) -> dict[str, Any] | None:
        """Policy, head, level, report and temperatures of a request that has ended; None for an
        ordinary one."""
        return summarise_all(list(self._reports)) if self._reports else None


class Observer:
    """Sees requests to inference routes begin and end. What it raises is logged, no more."""

    def begin(self, record: RequestRecord, scope: Scope) -> None: ...

    def end(self, record: RequestRecord) -> None: ...

    def close(self) -> None: ...


def current_record() -> RequestRecord | None:
    """The record of the request that this task works for; None where nobody looks."""
    return _CURRENT.get()


def note_request(request: Any) -> None:
    """Remember what the body of the current request asked for."""
    if (record := _CURRENT.get()) is not None:
        record.model = bound(request.model)
        record.is_stream = bool(getattr(request, "stream", False))


def bound(text: str | None) -> str | None:
    """A client's text, cut to a length that fits a log line, and without lone surrogates."""
    return None if text is None else text[:MAX_TEXT_LEN].encode(errors="replace").decode()


class Recorder:
    """ASGI middleware: one record per request to one of `paths`, shown to every observer."""

    def __init__(self, app: ASGIApp, paths: Collection[str], observers: Sequence[Observer]) -> None:
        self._app = app
        self._paths = frozenset(paths)
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or find_path(scope) not in self._paths:
            return await self._app(scope, receive, send)
        record = RequestRecord(scope["method"], find_path(scope))
        for observer in self._observers:
            try:
                observer.begin(record, scope)
            except Exception:
                logger.exception("a request could not be recorded")
        token = _CURRENT.set(record)
        try:
            await self._app(scope, watch_receive(record, receive), watch_send(record, send))
        except Exception:
            # What stands around this middleware makes it a 500.
            record.status = record.status or 500
            raise
        finally:
            _CURRENT.reset(token)
            record.request_id = find_request_id(scope)
            record.end_response(partial(self._end, record))

    def _end(self, record: RequestRecord) -> None:
        for observer in self._observers:
            try:
                observer.end(record)
            except Exception:
                logger.exception("a request could not be recorded")


def find_path(scope: Scope) -> str:
    """A request's path as the router sees it: without the prefix of `--root-path`."""
    return get_route_path(scope)


def find_header(scope: Scope, name: bytes) -> bytes:
    """The first header of that name (in lower case) of a request or an answer; empty for none."""
    return next((value for found, value in scope["headers"] if found == name), b"")


def find_request_id(scope: Scope) -> str | None:
    """The response's `id`, which vLLM notes in the scope; else the client's X-Request-Id."""
    metadata = scope.get("state", {}).get("request_metadata")
    if metadata is not None:
        return bound(metadata.request_id)
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return bound(value.decode("latin-1"))
    return None


def watch_receive(record: RequestRecord, receive: Receive) -> Receive:
    """`receive`, which notes that the client has left."""

    async def watched() -> Message:
        message = await receive()
        # An ASGI server says so after a complete response, too.
        if message["type"] == "http.disconnect" and not record.is_complete:
            record.is_aborted = True
        return message

    return watched


def watch_send(record: RequestRecord, send: Send) -> Send:
    """`send`, which notes status, errors and the response's end."""
    refusal = bytearray()

    async def watched(message: Message) -> None:
        if record.is_aborted:
            pass
        elif message["type"] == "http.response.start":
            record.status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if record.status is not None and record.status >= 400:
                refusal.extend(body[: _MAX_ERROR_BYTES - len(refusal)])
            elif body.startswith(_STREAM_ERRORS):
                record.error = read_error(body[body.index(b"{") :])
            if not message.get("more_body", False):
                record.is_complete = True
                record.error = record.error or read_error(bytes(refusal))
        await send(message)

    return watched


def read_error(content: bytes) -> dict[str, str | None] | None:
    """Type and parameter of an error in OpenAI's form; its message may quote the prompt."""
    if not content:
        return None
    try:
        error = json.loads(content)
        error = error.get("error", error)
        kind = error["code"] if error["type"] == "error" else error["type"]
        return {"type": bound(kind), "param": bound(error.get("param"))}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"type": None, "param": None}
