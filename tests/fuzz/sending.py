"""Sends requests, and says what is wrong with an answer."""

import http.client
import json
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import httpx

# A hang. A server that is well answers within milliseconds, but the machine may stand still for
# seconds.
HEALTH_S = 20
# Answers have at most a few hundred tokens.
ANSWER_S = 30
MAX_ERROR_BYTES = 5000
_PAUSE_S = 0.02
# The last event of a stream, by its route.
LAST_EVENTS = {
    "/v1/responses": {"response.completed", "response.incomplete", "response.failed", "error"},
    "/v1/messages": {"message_stop", "error"},
}


@dataclass(frozen=True)
class Case:
    """A request."""

    method: str
    path: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    query: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        query = self.query or ""
        return f"{self.method} {self.path} {query} {self.headers} {self.content[:2000]!r}"


def send(http: httpx.Client, case: Case) -> str | None:
    """Send a request; returns what is wrong with its answer, if anything."""
    try:
        response = http.request(
            case.method,
            case.path,
            content=case.content,
            headers=case.headers,
            params=case.query,
            timeout=ANSWER_S,
        )
    except httpx.TransportError as error:
        return f"{type(error).__name__}: {error}"
    if fault := find_fault(response, case):
        return f"{fault}: {response.status_code} {response.text[-300:]}"
    return None


def find_fault(response: httpx.Response, case: Case) -> str | None:
    """What is wrong with an answer."""
    # 501: the model has no such ability.
    if response.status_code >= 500 and response.status_code != 501:
        return "a mistake of the server's"
    if response.status_code >= 400:
        if len(response.content) > MAX_ERROR_BYTES:
            return "a long refusal"
        return None if is_error(response) else "a refusal in another form"
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return None if is_whole(response.text, case.path) else "a cut stream"
    return None


def is_error(response: httpx.Response) -> bool:
    """Whether an error has OpenAI's form, or Anthropic's on its route."""
    try:
        body = response.json()
        error = body["error"]
    except (ValueError, TypeError, KeyError):
        return False
    if body.get("type") == "error":
        return isinstance(error["type"], str) and isinstance(error["message"], str)
    fields = {"message", "type", "param", "code"}
    return fields <= error.keys() and error["code"] == response.status_code


def is_whole(text: str, path: str) -> bool:
    """Whether a stream of events has its end."""
    last = text.rstrip().rpartition("\n\n")[2]
    for route, kinds in LAST_EVENTS.items():
        if path.startswith(route):
            data = last.rpartition("data: ")[2]
            return data.startswith("{") and json.loads(data)["type"] in kinds
    return last == "data: [DONE]"


class Watch:
    """Asks for the server's health again and again while something else goes on.

    Attributes:
        longest_s: the longest time that an answer took, in seconds.
        num_asked: how many answers there were.
        failure: why there are no more, if that is so.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.longest_s = 0.0
        self.num_asked = 0
        self.failure: str | None = None

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while self.failure is None and not self._stop.wait(_PAUSE_S):
            start = time.perf_counter()
            try:
                status = self._ask_once()
            except (OSError, http.client.HTTPException) as error:
                took = time.perf_counter() - start
                self.failure = f"{type(error).__name__} after {took:.1f} s"
            else:
                self.failure = None if status == 200 else f"status {status}"
                self.longest_s = max(self.longest_s, time.perf_counter() - start)
                self.num_asked += 1

    def _ask_once(self) -> int:
        # On a connection of its own: one that idles while this process waits for its turn is
        # closed by the server after five seconds.
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=HEALTH_S)
        with closing(connection):
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
            return response.status
