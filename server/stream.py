"""Writes temperatures into the chunks of a streamed response."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from openai.types.responses import ResponseErrorEvent
from vllm.logger import init_logger

from server.report import Report

logger = init_logger("vllm.adaptive")

# An unescaped quote cannot occur inside a JSON string, so these are keys: one with a text value,
# and that of the choices with the first key of the first. Every chunk of vLLM's has one choice, but
# for the one with the usage and for errors, which have none.
_FINISHED = '"finish_reason":"'
_CHOICE = re.compile(r'"choices":\[\{"index":(\d+)[,}]')


class ChunkWriter:
    """Adds to the chunks of one chat or completion stream what their tokens' temperatures were.

    Args:
        show_tokens: whether each chunk lists the temperatures of its tokens; the chunk that ends a
            choice always has its summary.
    """

    def __init__(self, report: Report, show_tokens: bool) -> None:
        self._report = report
        self._show_tokens = show_tokens
        # What a choice's chunks begin with, which is looked for again only where another one's
        # comes.
        self._prefix, self._choice = "", report[0]

    def write(self, chunk: str) -> str:
        """A server-sent event of vLLM's, with what is to be said of it."""
        is_finished = _FINISHED in chunk
        if not (self._show_tokens or is_finished) or not self._find_choice(chunk):
            return chunk
        summary = self._choice.describe(show_tokens=False) if is_finished else {}
        return self.insert(chunk, summary | self.describe_next())

    def describe_next(self) -> dict[str, Any]:
        """What is to be said of the tokens in the next chunk of the same choice."""
        temperatures = self._choice.take_ready() if self._show_tokens else []
        return {"temperatures": temperatures} if temperatures else {}

    def insert(self, chunk: str, adaptive: dict[str, Any]) -> str:
        """A chunk of the same choice, or its beginning, that says it."""
        if not adaptive:
            return chunk
        # As text: to decode and encode every chunk would cost more than all else that we do.
        place = len(self._prefix) - 1
        return f'{chunk[:place]},"adaptive":{msgspec.json.encode(adaptive).decode()}{chunk[place:]}'

    def _find_choice(self, chunk: str) -> bool:
        """Whether a chunk has a choice."""
        if not self._prefix or not chunk.startswith(self._prefix):
            found = _CHOICE.search(chunk)
            if found is None:
                return False
            self._prefix, self._choice = chunk[: found.end()], self._report[int(found[1])]
        return True


def write_chunks(
    chunks: AsyncGenerator[str, None], writer: ChunkWriter | None
) -> AsyncGenerator[str, None]:
    """The chunks of a stream, with their temperatures where they are to be said."""
    return chunks if writer is None else (writer.write(chunk) async for chunk in chunks)


async def write_events(
    events: AsyncGenerator[Any, None], report: Report
) -> AsyncGenerator[Any, None]:
    """The same for the events of the Responses API, which are still objects here.

    The delta events list the temperatures; the summary is on the completed response.
    """
    async for event in events:
        if event.type.endswith(".delta") and (temperatures := report[0].take_ready()):
            event.adaptive = {"temperatures": temperatures}
        yield event


async def end_with_error(events: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The events of the Responses API, the last of which says so where the stream broke.

    vLLM says it in the other two streams; here it only closes the connection.
    """
    num_events = 0
    try:
        async with aclosing(events):
            async for event in events:
                num_events += 1
                yield event
    except Exception as error:
        logger.exception("the stream of a response broke")
        yield ResponseErrorEvent(
            type="error",
            code="server_error",
            message=f"the server could not go on: {type(error).__name__}",
            sequence_number=num_events,
        )
