"""Writes temperatures into the chunks of a streamed response."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from server.report import Report

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
        # How the last chunk began, up to the fields of its choice, and the choice's index.
        self._beginning = ""
        self._index = 0

    def write_text(self, chunk: str) -> str:
        """Return a server-sent event of vLLM's with the field `adaptive`."""
        is_finished = _FINISHED in chunk
        if self._skips and not is_finished:
            return chunk
        if _TOKENS_KEY not in chunk:
            return self._write_usage_text(chunk) if _NO_CHOICE in chunk else chunk
        # The chunks of one choice begin alike.
        if not (self._beginning and chunk.startswith(self._beginning)):
            if (choice := _CHOICE.search(chunk)) is None:
                return chunk
            self._beginning, self._index = chunk[: choice.end()], int(choice[1])
        adaptive = self._describe(self._index)
        if is_finished:
            summary = self._end(self._index)
            adaptive = summary | adaptive
            chunk = f'{chunk.removesuffix(_END)},"adaptive":{_encode(summary)}{_END}'
        elif not adaptive:
            return chunk
        return f'{self._beginning}"adaptive":{_encode(adaptive)},{chunk[len(self._beginning) :]}'

    def write_object(self, chunk: Any) -> Any:
        """Return a chunk that vLLM has not yet serialised with the field `adaptive`."""
        # None of an error, or of the usage.
        if not (choices := getattr(chunk, "choices", None)):
            return self._write_usage_object(chunk)
        (choice,) = choices
        if _TOKENS in choice.model_fields_set:
            adaptive = self._describe(choice.index)
            if choice.finish_reason is not None:
                summary = self._end(choice.index)
                adaptive = summary | adaptive
                chunk.model_extra["adaptive"] = summary
            if adaptive:
                # To set the attribute would cost twenty times as much.
                choice.model_extra["adaptive"] = adaptive
        return chunk

    def _describe(self, index: int) -> dict[str, Any]:
        """The temperatures of a chunk's tokens, where they are to be listed."""
        if self._show_tokens and (temperatures := self._report[index].take_ready()):
            return {"temperatures": temperatures}
        return {}

    def _end(self, index: int) -> dict[str, Any]:
        """The summary of a choice that has ended."""
        self._num_ended += 1
        if self._num_ended >= self._report.num_begun:
            self._skips = False
        return self._report[index].describe(show_tokens=False)

    def _write_usage_text(self, chunk: str) -> str:
        return chunk.replace(_USAGE, f'{_USAGE}"adaptive":{_encode(self._report.describe())},', 1)

    def _write_usage_object(self, chunk: Any) -> Any:
        if (usage := getattr(chunk, "usage", None)) is not None:
            usage.model_extra["adaptive"] = self._report.describe()
        return chunk


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
