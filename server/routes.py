"""The routes: admission, and then vLLM's own. What answers say is in `server.handlers`."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.anthropic import api_router as messages
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.models import api_router as models
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.exceptions import VLLMValidationError

from server.admission import AdaptiveState, admit
from server.answer_headers import add_headers
from server.protocol import (
    AdaptiveBatchRequest,
    AdaptiveChatCompletionRequest,
    AdaptiveCompletionRequest,
    AdaptiveMessagesRequest,
    AdaptiveResponsesRequest,
)
from server.record import note_request
from server.report import current_report, set_current_report

CHAT_PATH = "/v1/chat/completions"
BATCH_PATH = "/v1/chat/completions/batch"
COMPLETION_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
MESSAGES_PATH = "/v1/messages"
# SageMaker's; see `server.invocations`.
INVOCATIONS_PATH = "/invocations"
MODELS_PATH = "/v1/models"
ADAPTIVE_PATHS = (
    CHAT_PATH,
    BATCH_PATH,
    COMPLETION_PATH,
    RESPONSES_PATH,
    MESSAGES_PATH,
    INVOCATIONS_PATH,
)


class Holding:
    """ASGI middleware: an adaptive request holds its head until the response is over.

    Inside of any middleware that calls what it stands before in a task of its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # The context may be that of an earlier request of the same connection.
        set_current_report(None)
        try:
            await self._app(scope, receive, send)
        finally:
            if (report := current_report()) is not None:
                report.release()


def make_router() -> APIRouter:
    """Routes that replace vLLM's."""
    router = APIRouter()
    for path, endpoint, stock in (
        (CHAT_PATH, create_chat_completion, chat.router),
        (BATCH_PATH, create_batch, chat.router),
        (COMPLETION_PATH, create_completion, completion.router),
        (RESPONSES_PATH, create_response, responses.router),
        (MESSAGES_PATH, create_message, messages.router),
    ):
        route: Any = next(route for route in stock.routes if getattr(route, "path", "") == path)
        router.post(path, dependencies=route.dependencies, responses=route.responses)(endpoint)
    router.get(MODELS_PATH)(show_models)
    return router


async def create_chat_completion(
    request: AdaptiveChatCompletionRequest, raw_request: Request
) -> Response:
    """OpenAI's chat completions; `temperature` may be "adaptive"."""
    note_request(request)
    admit(request, raw_request)
    return say_how(await chat.create_chat_completion(request, raw_request))


async def create_batch(request: AdaptiveBatchRequest, raw_request: Request) -> Response:
    """Several conversations at once; `temperature` may be "adaptive"."""
    note_request(request)
    admit(request, raw_request)
    return say_how(await chat.create_batch_chat_completion(request, raw_request))


async def create_completion(request: AdaptiveCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's completions; `temperature` may be "adaptive"."""
    note_request(request)
    admit(request, raw_request)
    return say_how(await completion.create_completion(request, raw_request))


async def create_response(request: AdaptiveResponsesRequest, raw_request: Request) -> Response:
    """OpenAI's responses; `temperature` may be "adaptive"."""
    note_request(request)
    admit(request, raw_request)
    return say_how(await responses.create_responses(request, raw_request))


async def create_message(request: AdaptiveMessagesRequest, raw_request: Request) -> Response:
    """Anthropic's messages; `temperature` may be "adaptive"."""
    note_request(request)
    try:
        admit(request, raw_request)
    except VLLMValidationError as error:
        return messages.translate_error_response(error_response.create_error_response(error))
    return say_how(await messages.create_messages(request, raw_request))


def say_how(response: Response | None) -> Response:
    """The answer to the current request, with headers if it is adaptive.

    vLLM has none for a client that has left.
    """
    if response is None:
        return Response()
    if (report := current_report()) is not None:
        add_headers(response, report)
    return response


async def show_models(raw_request: Request) -> Response:
    """The served models, each also under its name with `:adaptive`."""
    state: AdaptiveState = raw_request.app.state.adaptive
    served = await models.models(raw_request).show_available_models()
    for card in served.data:
        card.parent = state.strip_adaptive_name(card.id) or card.parent
    return JSONResponse(content=served.model_dump())
