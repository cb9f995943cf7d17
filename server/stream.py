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


async def write_chunks(
    chunks: AsyncGenerator[str, None], report: Report, show_tokens: bool
) -> AsyncGenerator[str, None]:
    """Add to the chunks of a chat or completion stream what their tokens' temperatures were.

    Args:
        chunks: server-sent events of vLLM's stream.
        show_tokens: whether each chunk lists the temperatures of its tokens; the chunk that ends
            a choice always has its summary.
    """
    # What a choice's chunks begin with, which is looked for again only where another one's comes,
    # and what was last said of its tokens, which is often said again.
    prefix, choice = "", None
    said: list[float] = []
    text = ""
    async for chunk in chunks:
        is_finished = _FINISHED in chunk
        if not (show_tokens or is_finished):
            yield chunk
            continue
        if choice is None or not chunk.startswith(prefix):
            found = _CHOICE.search(chunk)
            if found is None:
                yield chunk
                continue
            prefix, choice = chunk[: found.end()], report[int(found[1])]
        temperatures = choice.take_ready() if show_tokens else []
        if is_finished:
            adaptive = choice.describe(show_tokens=False)
            if temperatures:
                adaptive["temperatures"] = temperatures
            said, text = [], f',"adaptive":{msgspec.json.encode(adaptive).decode()}'
        elif temperatures != said:
            # A list of floats is written in JSON as in Python.
            said, text = temperatures, f',"adaptive":{{"temperatures":{temperatures}}}'
        if temperatures or is_finished:
            # As text: to decode and encode every chunk would cost more than all else that we do.
            yield f"{prefix[:-1]}{text}{chunk[len(prefix) - 1 :]}"
        else:
            yield chunk


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
