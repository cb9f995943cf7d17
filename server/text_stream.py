"""Streams of plain text, whose chunks between the first and the last differ in their text alone.

vLLM makes, validates and serialises three objects for every token. Here it writes the first chunks
of a stream and the last; those between are the first again with another text.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pydantic_core import to_json
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.outputs import RequestOutput

from server.stream import ChunkWriter


@dataclass(frozen=True)
class Form:
    """What the chunks of a route look like.

    Attributes:
        key: what stands before the text.
        num_opening: chunks that the first output becomes, the last of which has its text.
        get_output: finds the engine's output in what vLLM's generator of chunks takes.
    """

    key: str
    num_opening: int
    get_output: Callable[[Any], RequestOutput]


# A chat's first chunk names the role.
CHAT = Form('"content":', 2, lambda output: output)
COMPLETION = Form('"text":', 1, itemgetter(1))


def is_plain(request: ChatCompletionRequest | CompletionRequest, is_usage_forced: bool) -> bool:
    """Whether a stream is one answer, and tells of its tokens nothing but their text.

    Args:
        is_usage_forced: vLLM's `--enable-force-include-usage`.
    """
    _, is_usage_continuous = should_include_usage(request.stream_options, is_usage_forced)
    # A chat's `logprobs` is a flag, a completion's a number, which may be 0.
    has_logprobs = request.logprobs is not None and request.logprobs is not False
    has_several = request.n is not None and request.n > 1
    has_more = request.echo or request.return_token_ids
    return not (has_several or has_logprobs or has_more or is_usage_continuous)


class TextStream:
    """One plain stream.

    Args:
        outputs: what vLLM's generator of chunks takes.
        writer: adds temperatures to the chunks; None where nothing is said of them.
    """

    def __init__(self, outputs: AsyncIterator[Any], form: Form, writer: ChunkWriter | None) -> None:
        self._outputs = outputs
        self._form = form
        self._writer = writer
        # What vLLM's generator was last given, and what it shall be given next.
        self._given: Any = None
        self._end: Any = None
        self._error: Exception | None = None

    async def write(
        self, make_chunks: Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]]
    ) -> AsyncGenerator[str, None]:
        """The chunks, byte for byte those of `make_chunks`, which is vLLM's generator."""
        num_opening = self._form.num_opening
        async for chunk in make_chunks(self._hand_over()):
            yield chunk if self._writer is None else self._writer.write(chunk)
            num_opening -= 1
            if num_opening == 0:
                async for between in self._write_between(chunk):
                    yield between

    async def _hand_over(self) -> AsyncGenerator[Any, None]:
        """What vLLM's generator sees of the outputs: the first, and those from the last text on."""
        async for item in self._outputs:
            self._given = item
            yield item
            # It asks for the next one when the chunks between have been written.
            if self._error is not None:
                raise self._error
            if self._end is not None:
                end, self._end = self._end, None
                yield end

    async def _write_between(self, first: str) -> AsyncGenerator[str, None]:
        """The chunks after the first with a text, up to the one that ends the answer."""
        if self._given is None:
            # Nothing came of the request but the error that this chunk tells.
            return
        get_output, writer = self._form.get_output, self._writer
        output = get_output(self._given).outputs[0]
        before, text, after = first.partition(f"{self._form.key}{write_json(output.text)}")
        if not text or output.finish_reason is not None:
            return
        before += self._form.key
        start = before
        said: dict[str, Any] = {}
        token_ids: list[int] = []
        try:
            async for item in self._outputs:
                (output,) = get_output(item).outputs
                if output.finish_reason is not None:
                    # vLLM counts the tokens of all that it is given.
                    output.token_ids = [*token_ids, *output.token_ids]
                    self._end = item
                    return
                token_ids += output.token_ids
                if writer is not None and (adaptive := writer.describe_next()) != said:
                    start, said = writer.insert(before, adaptive), adaptive
                yield f"{start}{write_json(output.text)}{after}"
        except Exception as error:
            # vLLM's generator knows how a stream says that it broke.
            self._error = error


def write_json(text: str) -> str:
    """A text as vLLM's chunks have it."""
    return to_json(text).decode()
