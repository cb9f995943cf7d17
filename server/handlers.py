"""vLLM's own request handlers, whose answers say what their temperatures were.

Overrides where an answer is made, and not wrappers of the routes: stored and background responses
never pass through one, and vLLM's routes keep their cancellation, keep-alive and error forms. An
ordinary request gets from an override what vLLM's method returns, and nothing around it.
"""

from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm import __version_tuple__
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from server.report import Report, current_report
from server.stream import ChunkWriter, write_chunks

# vLLM 0.33 makes a chat's chunks as objects first; 0.32 only as text.
HAS_CHUNK_OBJECTS = __version_tuple__[:2] >= (0, 33)


class AdaptiveServingChat(OpenAIServingChat):
    """`/v1/chat/completions`"""

    def chat_completion_stream_generator(
        self,
        request: Any,
        result_generator: Any,
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        name = name_model(model_name)
        chunks = super().chat_completion_stream_generator(
            request, result_generator, request_id, name, *args, **kwargs
        )
        writer = None if HAS_CHUNK_OBJECTS else make_writer(request, self.parser_cls)
        return write_chunks(chunks, writer.write_text) if writer else chunks

    def chat_completion_stream_generator_raw(
        self,
        request: Any,
        result_generator: Any,
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        name = name_model(model_name)
        chunks = super().chat_completion_stream_generator_raw(
            request, result_generator, request_id, name, *args, **kwargs
        )
        writer = make_writer(request, self.parser_cls)
        return write_chunks(chunks, writer.write_object) if writer else chunks

    def chat_completion_full_generator(
        self,
        request: Any,
        result_generator: Any,
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Coroutine[Any, Any, ErrorResponse | ChatCompletionResponse]:
        name = name_model(model_name)
        answer = super().chat_completion_full_generator(
            request, result_generator, request_id, name, *args, **kwargs
        )
        if (report := find_shown_report(request)) is None:
            return answer
        return describe_chat(answer, report, shows_tokens(request, report, self.parser_cls))


class AdaptiveServingChatBatch(OpenAIServingChatBatch):
    """`/v1/chat/completions/batch`"""

    def chat_completion_full_generator_batch(
        self,
        request: Any,
        generators: Any,
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Coroutine[Any, Any, ErrorResponse | ChatCompletionResponse]:
        name = name_model(model_name)
        answer = super().chat_completion_full_generator_batch(
            request, generators, request_id, name, *args, **kwargs
        )
        if (report := find_shown_report(request)) is None:
            return answer
        return describe_chat(answer, report, shows_tokens(request, report, self.parser_cls))


class AdaptiveServingCompletion(OpenAIServingCompletion):
    """`/v1/completions`"""

    def completion_stream_generator(
        self,
        request: Any,
        engine_inputs: Sequence[Any],
        result_generator: AsyncGenerator[Any, None],
        request_id: str,
        created_time: int,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        report = find_shown_report(request)
        if report is not None and report.detail == "tokens" and len(engine_inputs) > 1:
            result_generator = report.follow(result_generator)
        name = name_model(model_name)
        chunks = super().completion_stream_generator(
            request,
            engine_inputs,
            result_generator,
            request_id,
            created_time,
            name,
            *args,
            **kwargs,
        )
        writer = make_writer(request)
        return write_chunks(chunks, writer.write_text) if writer else chunks

    def request_output_to_completion_response(
        self,
        final_res_batch: Any,
        request: Any,
        request_id: str,
        created_time: int,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> CompletionResponse:
        name = name_model(model_name)
        answer = super().request_output_to_completion_response(
            final_res_batch, request, request_id, created_time, name, *args, **kwargs
        )
        if (report := find_shown_report(request)) is not None:
            describe_choices(answer, report, report.detail == "tokens")
        return answer


def hold_head(request: Any, report: Report) -> AbstractContextManager[None]:
    """Hold the head for a background response, which outlives its route.

    The route holds the head of any other: the generator of a stream whose client has left may stay
    open until it is collected.
    """
    return report.held() if request.background else nullcontext()


async def describe_chat(
    answer: Coroutine[Any, Any, Any], report: Report, show_tokens: bool
) -> ErrorResponse | ChatCompletionResponse:
    """Set `adaptive` on usage and choices of a whole answer, unless it is an error."""
    response = await answer
    if isinstance(response, ChatCompletionResponse):
        describe_choices(response, report, show_tokens)
    return response


def describe_choices(
    answer: ChatCompletionResponse | CompletionResponse, report: Report, show_tokens: bool
) -> None:
    """Set `adaptive` on usage and choices of a whole answer."""
    for choice in answer.choices:
        choice.adaptive = report[choice.index].describe(show_tokens)
    answer.usage.adaptive = report.describe()


def name_model(model_name: str) -> str:
    """The model's name in the current answer: the alias where that was asked for, else vLLM's."""
    report = current_report()
    return model_name if report is None or report.alias is None else report.alias


def make_writer(request: Any, parser: object | None = None) -> ChunkWriter | None:
    """What writes the temperatures of a stream into its chunks; None where they are not shown."""
    if (report := find_shown_report(request)) is None:
        return None
    return ChunkWriter(report, shows_tokens(request, report, parser))


def shows_tokens(request: Any, report: Report, parser: object | None) -> bool:
    """Whether to list one temperature per token. Where reasoning is hidden, so are its tokens'."""
    is_hidden = parser is not None and not request.include_reasoning
    return report.detail == "tokens" and not is_hidden


def find_report(request: Any) -> Report | None:
    """The report of an adaptive request; None for an ordinary one, and for vLLM's own classes."""
    report = getattr(request, "report", None)
    return report if isinstance(report, Report) else None


def find_shown_report(request: Any) -> Report | None:
    """The report that the answer to a request is to show, if any."""
    report = find_report(request)
    return None if report is None or report.detail == "none" else report
