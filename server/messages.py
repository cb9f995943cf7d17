"""vLLM's handler of Anthropic's `/v1/messages`, whose answers say what their temperatures were.

vLLM makes a chat of a request, and a message of the chat's answer.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from server.handlers import AdaptiveServingChat, find_report
from server.protocol import carry_options
from server.report import Report, current_report
from server.stream import encode_field, list_temperatures

_DELTA, _END = "event: content_block_delta\n", "event: message_delta\n"
_DATA = "data: {"


class AdaptiveMessagesResponse(AnthropicMessagesResponse):
    """A message with the summary of its temperatures."""

    adaptive: dict[str, Any]


class AdaptiveServingMessages(AnthropicServingMessages, AdaptiveServingChat):
    """`/v1/messages`; its chats are answered as those of clients."""

    @classmethod
    def to_chat_completion_request(
        cls, anthropic_request: Any, **options: Any
    ) -> ChatCompletionRequest:
        chat = super().to_chat_completion_request(anthropic_request, **options)
        return carry_options(chat, find_report(anthropic_request))

    def messages_full_converter(self, generator: Any) -> AnthropicMessagesResponse:
        message = super().messages_full_converter(generator)
        if (report := find_current_report()) is None:
            return message
        adaptive = report[0].describe(show_tokens=report.detail == "tokens")
        return AdaptiveMessagesResponse.model_construct(**dict(message), adaptive=adaptive)

    def message_stream_converter(self, generator: Any) -> AsyncGenerator[str, None]:
        events = super().message_stream_converter(generator)
        report = find_current_report()
        return events if report is None else write_messages(events, report)


def find_current_report() -> Report | None:
    """What the answer to the current request is to show; None for nothing."""
    report = current_report()
    return None if report is None or report.detail == "none" else report


async def write_messages(
    events: AsyncGenerator[str, None], report: Report
) -> AsyncGenerator[str, None]:
    """The events of a message. The one that ends it has the summary, at the top level.

    With the temperature of every token, so do those of its pieces; the last token, which ends the
    message, is in no piece.
    """
    show_tokens = report.detail == "tokens"
    async with aclosing(events):
        async for event in events:
            adaptive: dict[str, Any] = {}
            if event.startswith(_END):
                adaptive = report[0].describe(show_tokens=False)
            if show_tokens and event.startswith((_DELTA, _END)):
                adaptive |= list_temperatures(*report[0].take_ready())
            yield insert(event, adaptive) if adaptive else event


def insert(event: str, adaptive: dict[str, Any]) -> str:
    """A server-sent event with one more field."""
    place = event.index(_DATA) + len(_DATA)
    return f"{event[:place]}{encode_field(adaptive)}{event[place:]}"
