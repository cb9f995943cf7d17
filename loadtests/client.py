"""Sends requests as one of locust's users, checks the answers, and tells locust what it measured.

With geventhttpclient, on which locust's FastHttpUser stands, and not httpx: under gevent it takes a
fraction of the processor time, which on one machine is the server's.
"""

import json
from collections.abc import Callable, Iterator
from time import perf_counter, time
from typing import Any

from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse

from loadtests.accounts import Accounts, Entry
from loadtests.answers import Answer, ServerError, read_stream
from loadtests.checks import WrongAnswerError, check_answer, check_beginning
from loadtests.settings import make_headers
from loadtests.target import Target
from loadtests.workload import Ask

# In locust's column "Type". Its page and its files say milliseconds of every number; these are in
# the unit of their name.
REQUEST = "request"
TTFT = "TTFT, ms"
ITL = "ITL, ms"
SPEED = "tokens/s"
TEMPERATURE = "temperature, 1/1000"

_TIMEOUT_S = 300.0
# vLLM closes a connection that has been idle for 5 seconds, maybe while a request is on its way.
_MAX_IDLE_S = 3.0
_HEADERS = {"Content-Type": "application/json"}


class Client:
    """One user's connection to the server.

    Args:
        fire: takes the arguments of locust's `request` event.
    """

    def __init__(self, target: Target, accounts: Accounts, fire: Callable[..., Any]) -> None:
        self._target = target
        self._accounts = accounts
        self._fire = fire
        self._headers = _HEADERS | make_headers()
        self._http = self._connect()
        self._last_used = perf_counter()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _connect(self) -> HTTPClient:
        return HTTPClient.from_url(
            self._target.url, connection_timeout=_TIMEOUT_S, network_timeout=_TIMEOUT_S
        )

    def send(self, ask: Ask) -> Answer | None:
        """Send a request and read its answer; None where it failed, and locust knows why."""
        entry = self._accounts.begin(ask.style.is_adaptive, ask.max_tokens)
        answer = Answer()
        error: Exception | None = None
        start = perf_counter()
        if start - self._last_used > _MAX_IDLE_S:
            self._http.close()
            self._http = self._connect()
        try:
            self._read(ask, answer, entry)
            self._check(ask, answer, entry)
        except (OSError, HTTPParseError, ServerError, WrongAnswerError) as caught:
            error = caught
        finally:
            # Also where locust ends this user in the middle of an answer.
            entry.low = max(entry.low, min(answer.num_received, entry.high))
        self._last_used = perf_counter()
        answer.duration = self._last_used - start
        self._report(REQUEST, ask.name, 1000 * answer.duration, error)
        if error is None:
            self._report_measured(ask, answer)
        return answer if error is None else None

    def _read(self, ask: Ask, answer: Answer, entry: Entry) -> None:
        start = perf_counter()
        body = json.dumps(ask.body).encode()
        response = self._http.request("POST", ask.path, body, self._headers)
        try:
            if response.status_code != 200:
                raise _refuse(response, entry)
            if ask.is_stream:
                lines = _iterate_lines(response)
                read_stream(lines, answer, lambda: perf_counter() - start, ask.leave_after)
            else:
                answer.read_json(bytes(response.read()))
        finally:
            # Closes the connection where the answer has not been read to its end.
            response.release()

    def _check(self, ask: Ask, answer: Answer, entry: Entry) -> None:
        if ask.leave_after is not None and not answer.is_done:
            check_beginning(ask, answer)
            return
        if answer.num_tokens is not None:
            entry.settle(answer.num_tokens)
        check_answer(ask, answer, self._target)

    def _report_measured(self, ask: Ask, answer: Answer) -> None:
        if answer.ttft is not None:
            self._report(TTFT, ask.name, 1000 * answer.ttft)
        for before, after in zip(answer.arrivals, answer.arrivals[1:], strict=False):
            self._report(ITL, ask.name, 1000 * (after - before))
        if answer.num_tokens is not None:
            self._report(SPEED, ask.name, answer.num_tokens / answer.duration)
        for choice in answer.choices.values():
            if choice.adaptive:
                name = f"mean of an answer, {choice.chooser}"
                self._report(TEMPERATURE, name, 1000 * choice.adaptive["mean"])

    def _report(self, kind: str, name: str, value: float, error: Exception | None = None) -> None:
        self._fire(
            request_type=kind,
            name=name,
            response_time=value,
            response_length=0,
            exception=error,
            context={},
            start_time=time(),
        )


def _refuse(response: HTTPSocketPoolResponse, entry: Entry) -> ServerError:
    if response.status_code < 500:
        entry.settle(0)
    text = bytes(response.read()).decode(errors="replace")
    return ServerError(f"status {response.status_code}: {text[:300]}")


def _iterate_lines(response: HTTPSocketPoolResponse) -> Iterator[bytes]:
    while line := response.readline(b"\n"):
        yield line
