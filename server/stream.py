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
# Set, if only to null, in chunks that are made of tokens, and not in those before them, which have
# a chat's role and echo its last message.
_TOKENS = "token_ids"
_TOKENS_KEY = f'"{_TOKENS}":'


class ChunkWriter:
    """Adds to the chunks of one chat or completion stream what their tokens' temperatures were.

    vLLM asks the engine for its next output when it has made the chunks of the one before. So
    what it was given before a chunk is in that chunk or an earlier one.

    Args:
        show_tokens: whether each chunk lists the temperatures of its tokens; the chunk that ends a
            choice always has its summary.
    """

    def __init__(self, report: Report, show_tokens: bool) -> None:
        self._report = report
        self._show_tokens = show_tokens
        # How the last chunk began, up to the fields of its choice, and the choice's index.
        self._beginning = ""
        self._index = 0

    def write_text(self, chunk: str) -> str:
        """Return a server-sent event of vLLM's with the field `adaptive`."""
        is_finished = _FINISHED in chunk
        if not (self._show_tokens or is_finished) or _TOKENS_KEY not in chunk:
            return chunk
        # The chunks of one choice begin alike.
        if not (self._beginning and chunk.startswith(self._beginning)):
            if (choice := _CHOICE.search(chunk)) is None:
                return chunk
            self._beginning, self._index = chunk[: choice.end()], int(choice[1])
        if not (adaptive := self._describe(self._index, is_finished)):
            return chunk
        # As text: to decode and encode every chunk would cost more than all else that we do.
        field = msgspec.json.encode(adaptive).decode()
        return f'{self._beginning}"adaptive":{field},{chunk[len(self._beginning) :]}'

    def write_object(self, chunk: Any) -> Any:
        """Return a chunk that vLLM has not yet serialised with the field `adaptive`."""
        # None of an error, or of the usage.
        for choice in getattr(chunk, "choices", ()):
            if _TOKENS in choice.model_fields_set:
                is_finished = choice.finish_reason is not None
                if adaptive := self._describe(choice.index, is_finished):
                    # To set the attribute would cost twenty times as much.
                    choice.model_extra["adaptive"] = adaptive
        return chunk

    def _describe(self, index: int, is_finished: bool) -> dict[str, Any]:
        choice = self._report[index]
        adaptive = choice.describe(show_tokens=False) if is_finished else {}
        if self._show_tokens and (temperatures := choice.take_ready()):
            adaptive["temperatures"] = temperatures
        return adaptive


async def write_chunks(
    chunks: AsyncGenerator[Any, None], write: Callable[[Any], Any]
) -> AsyncGenerator[Any, None]:
    """The chunks of a stream, as `write` returns them."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield write(chunk)
