"""Reads answers off the wire, and notes when their tokens came."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


class ServerError(Exception):
    """The server refused the request, or failed in the middle of an answer."""


@dataclass
class Choice:
    """One answer of a response.

    Attributes:
        adaptive: what it says of its temperatures; None if it says nothing.
        temperatures: those that were listed, in the order in which they came.
    """

    text: str = ""
    finish_reason: str | None = None
    adaptive: dict[str, Any] | None = None
    temperatures: list[float] = field(default_factory=list)

    @property
    def chooser(self) -> str | None:
        """The head that chose its temperatures, or the policy without one; None until it says."""
        if not self.adaptive:
            return None
        return str(self.adaptive["head"] or self.adaptive["policy"])

    def read(self, choice: dict[str, Any]) -> bool:
        """Take in a choice of a response or of a chunk. Returns whether it brought tokens."""
        message = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text") or message.get("content") or ""
        self.text += text
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        adaptive = choice.get("adaptive")
        if adaptive is not None:
            self.temperatures += adaptive.get("temperatures", [])
            # A chunk in the middle of a stream has nothing but temperatures.
            self.adaptive = adaptive if "tokens" in adaptive else self.adaptive or {}
        return bool(text or choice.get("finish_reason"))


@dataclass
class Answer:
    """A response, as far as it has been read.

    Attributes:
        num_tokens: as the response's `usage` says; None where it has not come.
        arrivals: seconds from the request to each chunk of a stream that brought tokens.
        duration: seconds from the request to the end.
        is_done: whether a stream ended as it should.
    """

    choices: dict[int, Choice] = field(default_factory=dict)
    num_tokens: int | None = None
    arrivals: list[float] = field(default_factory=list)
    duration: float = 0.0
    is_done: bool = False

    @property
    def num_received(self) -> int:
        """Tokens that have surely been received of a stream."""
        listed = sum(len(choice.temperatures) for choice in self.choices.values())
        return max(listed, len(self.arrivals))

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token; None for what was not streamed."""
        return self.arrivals[0] if self.arrivals else None

    @property
    def itl(self) -> float | None:
        """Mean seconds between two tokens of a stream; None with fewer than two."""
        if self.num_tokens is None or self.num_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_tokens - 1)

    @property
    def text(self) -> str:
        """The first choice's."""
        return self.choices[0].text if 0 in self.choices else ""

    def read_json(self, text: bytes) -> bool:
        """Take in a response or a chunk. Returns whether it brought tokens.

        Raises:
            ServerError: it is an error, or nothing of OpenAI's.
        """
        try:
            return self._read(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"cannot be read ({error!r}): {text[:100]!r}") from None

    def _read(self, content: dict[str, Any]) -> bool:
        if "error" in content:
            raise ServerError(f"the server says: {json.dumps(content['error'])[:300]}")
        has_tokens = False
        for choice in content.get("choices") or ():
            has_tokens |= self.choices.setdefault(choice["index"], Choice()).read(choice)
        if usage := content.get("usage"):
            self.num_tokens = usage["completion_tokens"]
        return has_tokens


def read_stream(
    lines: Iterable[bytes], answer: Answer, clock: Callable[[], float], leave_after: int | None
) -> None:
    """Read server-sent events until the end, or until so many chunks with tokens have come.

    Args:
        clock: seconds since the request.

    Raises:
        ServerError: the stream holds an error, or what is no event of OpenAI's.
    """
    for line in lines:
        if not line.strip():
            continue
        name, _, value = line.strip().partition(b": ")
        if name != b"data":
            raise ServerError(f"a stream's line is no event: {line[:100]!r}")
        if value == b"[DONE]":
            answer.is_done = True
            break
        now = clock()
        if answer.read_json(value):
            answer.arrivals.append(now)
            if leave_after is not None and len(answer.arrivals) >= leave_after:
                break
    answer.duration = clock()
