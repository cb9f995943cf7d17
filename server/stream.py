"""Writes temperatures into the chunks of a streamed response."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from openai.types.responses import ResponseErrorEvent
from vllm.logger import init_logger

from server.report import ChoiceReport, Report

logger = init_logger("vllm.adaptive")

# An unescaped quote cannot occur inside a JSON string, so these are keys: with a text value, and
# of the first choice with its first key.
_FINISHED = '"finish_reason":"'
_CHOICE = re.compile(r'"choices":\[\{"index":(\d+)')


async def write_chunks(
    chunks: AsyncGenerator[str, None], report: Report, show_tokens: bool
) -> AsyncGenerator[str, None]:
    """Add to the chunks of a chat or completion stream what their tokens' temperatures were.

    Args:
        chunks: server-sent events of vLLM's stream.
        show_tokens: whether each chunk lists the temperatures of its tokens; the chunk that ends
            a choice always has its summary.
    """
    async for chunk in chunks:
        if show_tokens or _FINISHED in chunk:
            chunk = _write_chunk(chunk, report, show_tokens)
        yield chunk


def _write_chunk(chunk: str, report: Report, show_tokens: bool) -> str:
    # Put in as text: to decode and encode every chunk would cost more than all else that we do.
    # Every chunk of vLLM's has one choice, but for the one with the usage and for errors.
    if (choice := _CHOICE.search(chunk)) is None:
        return chunk
    adaptive = _describe_chunk(report[int(choice[1])], _FINISHED in chunk, show_tokens)
    if not adaptive:
        return chunk
    text = msgspec.json.encode(adaptive).decode()
    return f'{chunk[: choice.end()]},"adaptive":{text}{chunk[choice.end() :]}'


def _describe_chunk(choice: ChoiceReport, is_finished: bool, show_tokens: bool) -> dict[str, Any]:
    adaptive = choice.describe(show_tokens=False) if is_finished else {}
    if show_tokens and (temperatures := choice.take_ready()):
        adaptive["temperatures"] = temperatures
    return adaptive


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
