"""Stopping: answers that have begun are finished, new requests are sent elsewhere.

vLLM drains its engine (`--shutdown-timeout`), but its API server goes on taking requests, calls
itself healthy, loses what is running when there are several API processes, and waits without end
for a client that does not read. On a signal, vLLM calls `shutdown` on the engine client that it
finds in the application's state; ours stands there, and does first what is missing.
"""

import asyncio
import json
import signal
import time
from typing import Any

from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

from server.record import find_path
from server.signals import HURRIED_S, end_within

logger = init_logger("vllm.adaptive")

PROBES = ("/health", "/ping")
RETRY_AFTER_S = 5
# A part of the grace time is kept for ending what is left; of a short one, a quarter.
MAX_ENDING_S = 5.0
MIN_TEARDOWN_S = 1.0
_POLL_S = 0.05
# Until the last words of answers have reached their clients.
_SETTLE_S = 2.0
# One Ctrl-C can reach a process twice: from the terminal, and from the process above it, which is
# quick to pass it on; but vLLM's process above several API processes turns it into a SIGTERM.
_ONE_SIGNAL_S = {signal.SIGINT: 0.1, signal.SIGTERM: 1.0}
# For connections that are still open when there is nothing more to say.
_CLOSE_CONNECTIONS_S = 2


class Drain:
    """Whether the server stops, and how many requests are being answered."""

    def __init__(self) -> None:
        self.is_on = False
        self.num_running = 0
        self.has_engine_died = False


# One a process: `adaptive-serve` asks it for the exit code when the server has ended.
DRAIN = Drain()


class Gate:
    """ASGI middleware: counts requests, and turns them away while the server stops."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if self._drain.is_on and (is_post or is_probe(scope)):
            return await refuse(send)
        if not is_post:
            return await self._app(scope, receive, send)
        self._drain.num_running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.num_running -= 1


def is_probe(scope: Scope) -> bool:
    """Whether a request asks for the server's health."""
    return scope["type"] == "http" and find_path(scope) in PROBES


async def refuse(send: Send) -> None:
    """Answer 503: not here, not now."""
    error = {
        "message": "the server is stopping; send the request again, to another one",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    headers = [
        (b"content-type", b"application/json"),
        (b"retry-after", str(RETRY_AFTER_S).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


class DrainingClient:
    """The engine client in the application's state: `shutdown` lets running requests end first."""

    def __init__(self, engine_client: EngineClient, drain: Drain) -> None:
        self._engine_client: Any = engine_client
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._is_hurried = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine_client, name)

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop within `timeout` seconds. vLLM calls it from a thread, at the first signal.

        What runs at the end of the grace time, or at a second signal, is aborted: its answers end
        with the finish reason "abort". After a second signal the process ends within `HURRIED_S`.
        """
        grace_s = timeout or 0.0
        end = time.monotonic() + grace_s
        self._drain.is_on = True
        self._loop.call_soon_threadsafe(self._listen_for_second_signal)
        self._wait_until(end - min(MAX_ENDING_S, grace_s / 4))
        if (num_running := self._count_running()) and not self._engine_client.errored:
            logger.warning("aborting %d requests that still run", num_running)
            asyncio.run_coroutine_threadsafe(self._abort_all(), self._loop)
            self._wait_until(time.monotonic() + _SETTLE_S)
        if self._is_hurried:
            end = 0.0
        # The engine has nothing to do now, and ends as soon as it has given its memory back.
        self._engine_client.shutdown(timeout=max(end - time.monotonic(), MIN_TEARDOWN_S))

    def _wait_until(self, deadline: float) -> None:
        was_hurried = self._is_hurried
        idle_since: float | None = None
        while (now := time.monotonic()) < deadline:
            if self._count_running():
                idle_since = None
            elif not self._drain.num_running:
                return
            else:
                # Answers are on their way; one whose client does not read may stay there.
                idle_since = idle_since or now
                if now - idle_since > _SETTLE_S:
                    return
            time.sleep(_POLL_S)
            if self._engine_client.errored or self._is_hurried != was_hurried:
                return

    def _count_running(self) -> int:
        """How many requests the engine has, those of background responses among them."""
        return len(self._engine_client.output_processor.request_states)

    async def _abort_all(self) -> None:
        # Request by request, and not the whole engine: other API processes may use it, too.
        running = list(self._engine_client.output_processor.request_states)
        await self._engine_client.abort(running, internal=True)

    def _listen_for_second_signal(self) -> None:
        started = time.monotonic()

        def hurry(number: signal.Signals) -> None:
            if time.monotonic() - started > _ONE_SIGNAL_S[number] and not self._is_hurried:
                self._is_hurried = True
                end_within(HURRIED_S, number)

        for number in _ONE_SIGNAL_S:
            self._loop.add_signal_handler(number, hurry, number)


def bound_closing(state: State) -> None:
    """Have uvicorn wait for open connections a short time only, once everything was said."""
    state.server.config.timeout_graceful_shutdown = _CLOSE_CONNECTIONS_S


def note_end(state: State, drain: Drain) -> None:
    """The server ends. Remember whether that is because its engine is dead."""
    if not drain.is_on and state.engine_client.errored:
        drain.has_engine_died = True
