"""vLLM's handler of `/v1/responses`, whose answers and events say what their temperatures were."""

from collections.abc import AsyncGenerator, Coroutine
from contextlib import AbstractContextManager, aclosing
from copy import copy
from typing import Any

from openai.types.responses import ResponseErrorEvent
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.openai.responses import protocol
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from server.handlers import find_report, hold_head, name_model, shows_tokens
from server.report import Report

logger = init_logger("vllm.adaptive")

# The events whose tokens have temperatures: of each piece of a text, and of its end. The last token
# ends the answer and is in no piece.
_WITH_TOKENS = (".delta", "text.done", "arguments.done")

# Of no request: what they say is not looked at.
_ANY_PARAMS = SamplingParams(max_tokens=1)


class AdaptiveServingResponses(OpenAIServingResponses):
    """`/v1/responses`"""

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        """vLLM's, once it is known that there can be a response.

        Raises:
            VLLMValidationError: a field has a value that no response can repeat.
        """
        check_response(request)
        answer = await super().create_responses(request, raw_request)
        # The one that vLLM makes and stores before a background task begins.
        if isinstance(answer, ResponsesResponse) and find_report(request) is not None:
            answer.temperature = None
        return answer

    def _generate_with_builtin_tools(
        self, *args: Any, sampling_params: SamplingParams, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's, called before it answers, with parameters that its engine accepts.

        Raises:
            VLLMValidationError: it would refuse them, once a stream has begun.
        """
        self.engine_client.input_processor._validate_params(sampling_params, ("generate",))
        return super()._generate_with_builtin_tools(
            *args, sampling_params=sampling_params, **kwargs
        )

    def responses_stream_generator(
        self,
        request: Any,
        sampling_params: SamplingParams,
        result_generator: Any,
        context: Any,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        report = find_report(request)
        shown = sampling_params if report is None else without_temperature(sampling_params)
        name = name_model(model_name)
        events = super().responses_stream_generator(
            request, shown, result_generator, context, name, *args, **kwargs
        )
        if report is None:
            return events
        show_tokens = shows_tokens(request, report, self.parser)
        return write_events(events, report, show_tokens, hold_head(request, report))

    def responses_full_generator(
        self,
        request: Any,
        sampling_params: SamplingParams,
        result_generator: Any,
        context: Any,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Coroutine[Any, Any, ErrorResponse | ResponsesResponse]:
        report = find_report(request)
        shown = sampling_params if report is None else without_temperature(sampling_params)
        name = name_model(model_name)
        answer = super().responses_full_generator(
            request, shown, result_generator, context, name, *args, **kwargs
        )
        return answer if report is None else self._describe(answer, request, report)

    async def _describe(
        self, answer: Coroutine[Any, Any, Any], request: Any, report: Report
    ) -> ErrorResponse | ResponsesResponse:
        with hold_head(request, report):
            response = await answer
        if report.detail != "none" and isinstance(response, ResponsesResponse):
            response.adaptive = report[0].describe(shows_tokens(request, report, self.parser))
            if response.usage is not None:
                response.usage.adaptive = report.describe()
        return response


def check_response(request: Any) -> None:
    """Make sure that a response can repeat its request's fields, some of which may be null there.

    vLLM finds out when the response is made: in a stream, once it has begun.

    Raises:
        VLLMValidationError: names the first field that it cannot repeat.
    """
    try:
        ResponsesResponse.from_request(
            request, _ANY_PARAMS, model_name="", created_time=0, output=[], status="queued"
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        raise VLLMValidationError(f"{field}: {first['msg']}", parameter=field) from None


def without_temperature(params: SamplingParams) -> SamplingParams:
    """Sampling parameters for a response to show: no one temperature is an adaptive answer's."""
    shown = copy(params)
    shown.temperature = None
    return shown


def let_temperature_be_null() -> None:
    """Let a response have the temperature null, as OpenAI's may."""
    field = ResponsesResponse.model_fields["temperature"]
    if field.annotation is not float:
        return
    field.annotation = float | None
    ResponsesResponse.model_rebuild(force=True)
    # They have its schema within their own.
    for value in vars(protocol).values():
        if isinstance(value, type) and issubclass(value, BaseModel):
            response = value.model_fields.get("response")
            if response is not None and response.annotation is ResponsesResponse:
                value.model_rebuild(force=True)


async def write_events(
    events: AsyncGenerator[Any, None],
    report: Report,
    show_tokens: bool,
    holding: AbstractContextManager[None],
) -> AsyncGenerator[Any, None]:
    """The events of the Responses API, the last of which says so where the stream broke.

    vLLM says it in the other two streams; here it only closes the connection. The events of a
    text's pieces and of its end list the temperatures; the summary is on the completed response.

    Args:
        holding: entered for as long as there are events.
    """
    num_events = 0
    try:
        async with aclosing(events):
            with holding:
                async for event in events:
                    num_events += 1
                    has_tokens = show_tokens and event.type.endswith(_WITH_TOKENS)
                    if has_tokens and (temperatures := report[0].take_ready()):
                        event.adaptive = {"temperatures": temperatures}
                    yield event
    except VLLMClientError as error:
        yield ResponseErrorEvent(
            type="error",
            code="invalid_request_error",
            message=str(error.args[0]),
            param=getattr(error, "parameter", None),
            sequence_number=num_events,
        )
    except Exception as error:
        logger.exception("the stream of a response broke")
        yield ResponseErrorEvent(
            type="error",
            code="server_error",
            message=f"the server could not go on: {type(error).__name__}",
            sequence_number=num_events,
        )
