"""The routes: vLLM's own handlers behind them, temperatures added to what they answer."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.models import api_router as models
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from server.admission import AdaptiveState, admit
from server.protocol import (
    AdaptiveChatCompletionRequest,
    AdaptiveCompletionRequest,
    AdaptiveFields,
    AdaptiveResponsesRequest,
)
from server.report import Report
from server.stream import write_chunks

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
MODELS_PATH = "/v1/models"
HEADS_PATH = "/v1/adaptive/heads"

Handle = Callable[[Any, Request], Awaitable[Any]]


def make_router() -> APIRouter:
    """Routes that take the place of vLLM's, and the list of heads."""
    router = APIRouter()
    for path, endpoint, stock in (
        (CHAT_PATH, create_chat_completion, chat.router),
        (COMPLETION_PATH, create_completion, completion.router),
        (RESPONSES_PATH, create_response, responses.router),
    ):
        route = find_route(stock, path)
        router.post(path, dependencies=route.dependencies, responses=route.responses)(endpoint)
    router.get(MODELS_PATH)(show_models)
    router.get(HEADS_PATH)(show_heads)
    return router


def find_route(router: APIRouter, path: str) -> APIRoute:
    """vLLM's POST route for a path."""
    return next(
        route
        for route in router.routes
        if isinstance(route, APIRoute) and route.path == path and "POST" in route.methods
    )


async def create_chat_completion(
    request: AdaptiveChatCompletionRequest, raw_request: Request
) -> Response:
    """OpenAI's chat completions; `temperature` may be "adaptive"."""
    if not admit(request, raw_request):
        return await chat.create_chat_completion(request, raw_request)
    return await _answer_chat(request, raw_request)


async def create_completion(request: AdaptiveCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's completions; `temperature` may be "adaptive"."""
    if not admit(request, raw_request):
        return await completion.create_completion(request, raw_request)
    return await _answer_completion(request, raw_request)


async def create_response(request: AdaptiveResponsesRequest, raw_request: Request) -> Response:
    """OpenAI's responses; `temperature` may be "adaptive"."""
    if not admit(request, raw_request):
        return await responses.create_responses(request, raw_request)
    return await _answer_response(request, raw_request)


async def show_models(raw_request: Request) -> Response:
    """The served models, each also under its name with `:adaptive`."""
    state: AdaptiveState = raw_request.app.state.adaptive
    served = await models.models(raw_request).show_available_models()
    served.data += [
        card.model_copy(update={"id": state.adaptive_name(card.id), "parent": card.id})
        for card in served.data
        if card.id in state.served_names
    ]
    return JSONResponse(content=served.model_dump())


async def show_heads(raw_request: Request) -> dict[str, Any]:
    """The loaded heads with their metadata."""
    state: AdaptiveState = raw_request.app.state.adaptive
    return {
        "object": "list",
        "data": [
            {"id": name, "default": name == state.default_head, **head.model_dump(mode="json")}
            for name, head in state.heads.items()
        ],
    }


@with_cancellation
@load_aware_call
async def _answer_chat(request: AdaptiveChatCompletionRequest, raw_request: Request) -> Response:
    handler = chat.chat(raw_request)
    if handler is None:
        raise NotImplementedError("The model does not support Chat Completions API")
    # Hidden reasoning hides what is said of its tokens.
    is_hidden = not request.include_reasoning and handler.parser_cls is not None
    return await _answer(
        request, raw_request, handler.create_chat_completion, show_tokens=not is_hidden
    )


@with_cancellation
@load_aware_call
async def _answer_completion(request: AdaptiveCompletionRequest, raw_request: Request) -> Response:
    handler = completion.completion(raw_request)
    if handler is None:
        raise NotImplementedError("The model does not support Completions API")
    return await _answer(request, raw_request, handler.create_completion, show_tokens=True)


@with_cancellation
@load_aware_call
async def _answer_response(request: AdaptiveResponsesRequest, raw_request: Request) -> Response:
    handler = responses.responses(raw_request)
    if handler is None:
        raise NotImplementedError("The model does not support Responses API")
    answer = await handler.create_responses(request, raw_request)
    if isinstance(answer, AsyncGenerator):
        return StreamingResponse(
            responses._convert_stream_to_sse_events(answer), media_type="text/event-stream"
        )
    code = answer.error.code if isinstance(answer, ErrorResponse) else 200
    return JSONResponse(answer.model_dump(mode="json", by_alias=True), status_code=code)


async def _answer(
    request: AdaptiveChatCompletionRequest | AdaptiveCompletionRequest,
    raw_request: Request,
    handle: Handle,
    *,
    show_tokens: bool,
) -> Response:
    report = _report_of(request)
    show_tokens = show_tokens and report.detail == "tokens"
    answer = await handle(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if not isinstance(answer, AsyncGenerator):
        _describe_choices(answer, report, show_tokens)
        load_format = raw_request.headers.get(chat.ENDPOINT_LOAD_METRICS_FORMAT_HEADER_LABEL, "")
        return JSONResponse(answer.model_dump(), headers=metrics_header(load_format))
    if report.detail != "none":
        answer = write_chunks(answer, report, show_tokens=show_tokens)
    interval = getattr(raw_request.app.state.args, "sse_keep_alive_interval", 0)
    return StreamingResponse(
        with_sse_keep_alive(answer, float(interval)), media_type="text/event-stream"
    )


def _describe_choices(answer: Any, report: Report, show_tokens: bool) -> None:
    if report.detail == "none":
        return
    for choice in answer.choices:
        choice_report = report[choice.index]
        choice.adaptive = choice_report.describe() if show_tokens else choice_report.summarise()


def _report_of(request: AdaptiveFields) -> Report:
    assert request.report is not None
    return request.report
