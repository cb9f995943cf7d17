"""vLLM's own request handlers, whose answers say what their temperatures were.

Overrides where an answer is made, and not wrappers of the routes: stored and background responses
never pass through one, and vLLM's routes keep their cancellation, keep-alive and error forms.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from server.report import Report, find_report
from server.stream import ChunkWriter, end_with_error, write_chunks, write_events
from server.text_stream import CHAT, COMPLETION, TextStream, is_plain


class AdaptiveServingChat(OpenAIServingChat):
    """`/v1/chat/completions`"""

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        def make_chunks(outputs: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
            return stock(request, outputs, *args, **kwargs)

        stock = super().chat_completion_stream_generator
        report = find_report(request)
        writer = None
        if report is not None:
            writer = ChunkWriter(report, shows_tokens(request, report, self.parser_cls))
        is_read = self.parser_cls is not None or self.enable_log_outputs
        if is_read or not is_plain(request, self.enable_force_include_usage):
            return write_chunks(make_chunks(result_generator), writer)
        return TextStream(result_generator, CHAT, writer).write(make_chunks)

    async def chat_completion_full_generator(
        self, request: Any, *args: Any, **kwargs: Any
    ) -> ErrorResponse | ChatCompletionResponse:
        answer = await super().chat_completion_full_generator(request, *args, **kwargs)
        report = find_report(request)
        if report is not None and isinstance(answer, ChatCompletionResponse):
            describe_choices(answer, report, shows_tokens(request, report, self.parser_cls))
        return answer


class AdaptiveServingCompletion(OpenAIServingCompletion):
    """`/v1/completions`"""

    def completion_stream_generator(
        self,
        request: Any,
        engine_inputs: Sequence[Any],
        result_generator: AsyncIterator[Any],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        def make_chunks(outputs: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
            return stock(request, engine_inputs, outputs, *args, **kwargs)

        stock = super().completion_stream_generator
        report = find_report(request)
        writer = None if report is None else ChunkWriter(report, report.detail == "tokens")
        has_several = len(engine_inputs) > 1
        if has_several or not is_plain(request, self.enable_force_include_usage):
            return write_chunks(make_chunks(result_generator), writer)
        return TextStream(result_generator, COMPLETION, writer).write(make_chunks)

    def request_output_to_completion_response(
        self, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> CompletionResponse:
        answer = super().request_output_to_completion_response(
            final_res_batch, request, *args, **kwargs
        )
        if (report := find_report(request)) is not None:
            describe_choices(answer, report, report.detail == "tokens")
        return answer


class AdaptiveServingResponses(OpenAIServingResponses):
    """`/v1/responses`"""

    def responses_stream_generator(
        self, request: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        events = end_with_error(super().responses_stream_generator(request, *args, **kwargs))
        report = find_report(request)
        if report is None or not shows_tokens(request, report, self.parser):
            return events
        return write_events(events, report)

    async def responses_full_generator(
        self, request: Any, *args: Any, **kwargs: Any
    ) -> ErrorResponse | ResponsesResponse:
        response = await super().responses_full_generator(request, *args, **kwargs)
        report = find_report(request)
        if report is not None and isinstance(response, ResponsesResponse):
            response.adaptive = report[0].describe(shows_tokens(request, report, self.parser))
        return response


def describe_choices(
    answer: ChatCompletionResponse | CompletionResponse, report: Report, show_tokens: bool
) -> None:
    """Set `adaptive` on every choice of a whole answer."""
    for choice in answer.choices:
        choice.adaptive = report[choice.index].describe(show_tokens)


def shows_tokens(request: Any, report: Report, parser: object | None) -> bool:
    """Whether to list a temperature a token. Hidden reasoning hides what is said of its tokens."""
    is_hidden = not request.include_reasoning and parser is not None
    return report.detail == "tokens" and not is_hidden
