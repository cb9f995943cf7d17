"""Writes temperatures into the chunks of a streamed response."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import lru_cache
from typing import Any

import msgspec

from server.report import ChoiceReport, Report

# An unescaped quote cannot occur inside a JSON string, so these are keys: one with a text value,
# and the choices' with the first key of the first. Every chunk of vLLM's has one choice, except for
# the one with the usage and for errors, which have none.
_FINISHED = '"finish_reason":"'
_CHOICE = re.compile(r'"choices":\[\{"index":(\d+),')
_NO_CHOICE = '"choices":[],'
_USAGE = '"usage":{'
# How an event ends, after the last field of its chunk.
_END = "}\n\n"
# Set, if only to null, in chunks that are made of tokens, and not in those before them, which have
# a chat's role and echo its last message.
_TOKENS = "token_ids"
_TOKENS_KEY = f'"{_TOKENS}":'


class ChunkWriter:
    """Adds to the chunks of one chat or completion stream what their tokens' temperatures were.

    vLLM asks the engine for its next output when it has made the chunks of the one before. So
    what it was given before a chunk is in that chunk or an earlier one.

    The chunk that ends a choice has its summary twice, on the choice and at its top level: of a
    chunk without text some clients pass on only the latter. The chunk of the usage has all of them.

    Args:
        show_tokens: whether each chunk lists the temperatures of its tokens.
    """

    def __init__(self, report: Report, show_tokens: bool) -> None:
        self._report = report
        self._show_tokens = show_tokens
        self._num_ended = 0
        # Whether a chunk that ends no choice passes as it is. Not once all choices have ended, as
        # the usage follows.
        self._skips = not show_tokens
        # How the last chunk began, up to the fields of its choice, and that choice's report.
        self._beginning = ""
        self._choice: ChoiceReport | None = None

    def write_text(self, chunk: str) -> str:
        """Return a server-sent event of vLLM's with the field `adaptive`."""
        is_finished = _FINISHED in chunk
        if self._skips and not is_finished:
            return chunk
        if _TOKENS_KEY not in chunk:
            return self._write_usage_text(chunk) if _NO_CHOICE in chunk else chunk
        # The chunks of one choice begin alike.
        if (choice := self._choice) is None or not chunk.startswith(self._beginning):
            if (found := _CHOICE.search(chunk)) is None:
                return chunk
            self._beginning = chunk[: found.end()]
            self._choice = choice = self._report[int(found[1])]
        temperatures = choice.take_ready() if self._show_tokens else []
        if is_finished:
            summary = self._end(choice)
            field = encode_field(summary | list_temperatures(*temperatures))
            chunk = f'{chunk.removesuffix(_END)},"adaptive":{_encode(summary)}{_END}'
        elif temperatures:
            field = encode_temperatures(*temperatures)
        else:
            return chunk
        return f"{self._beginning}{field}{chunk[len(self._beginning) :]}"

    def write_object(self, chunk: Any) -> Any:
        """Return a chunk that vLLM has not yet serialised with the field `adaptive`."""
        # None of an error, or of the usage.
        if not (choices := getattr(chunk, "choices", None)):
            return self._write_usage_object(chunk)
        (choice,) = choices
        if _TOKENS in choice.model_fields_set:
            report = self._report[choice.index]
            temperatures = report.take_ready() if self._show_tokens else []
            adaptive = list_temperatures(*temperatures)
            if choice.finish_reason is not None:
                summary = self._end(report)
                adaptive = summary | adaptive
                chunk.model_extra["adaptive"] = summary
            if adaptive:
                # To set the attribute would cost twenty times as much.
                choice.model_extra["adaptive"] = adaptive
        return chunk

    def _end(self, choice: ChoiceReport) -> dict[str, Any]:
        """The summary of a choice that has ended."""
        self._num_ended += 1
        if self._num_ended >= self._report.num_begun:
            self._skips = False
        return choice.describe(show_tokens=False)

    def _write_usage_text(self, chunk: str) -> str:
        return chunk.replace(_USAGE, _USAGE + encode_field(self._report.describe()), 1)

    def _write_usage_object(self, chunk: Any) -> Any:
        if (usage := getattr(chunk, "usage", None)) is not None:
            usage.model_extra["adaptive"] = self._report.describe()
        return chunk


def list_temperatures(*temperatures: float) -> dict[str, Any]:
    """The field of an `adaptive` object that lists tokens' temperatures; none for no token."""
    return {"temperatures": temperatures} if temperatures else {}


# A head has few temperatures, and most chunks have one token.
@lru_cache(maxsize=1024)
def encode_temperatures(*temperatures: float) -> str:
    """`encode_field` of an object that has nothing but these."""
    return encode_field(list_temperatures(*temperatures))


def encode_field(adaptive: object) -> str:
    """The field `adaptive` as JSON, to stand before another one."""
    return f'"adaptive":{_encode(adaptive)},'


def _encode(adaptive: object) -> str:
    # As text: to decode and encode every chunk would cost more than all else that we do.
    return msgspec.json.encode(adaptive).decode()


async def write_chunks(
    chunks: AsyncGenerator[Any, None], write: Callable[[Any], Any]
) -> AsyncGenerator[Any, None]:
    """The chunks of a stream, as `write` returns them."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield write(chunk)
