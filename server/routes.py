"""The routes: admission, and then vLLM's own. What answers say is in `server.handlers`."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.models import api_router as models
from vllm.entrypoints.openai.responses import api_router as responses

from server.admission import AdaptiveState, admit
from server.protocol import (
    AdaptiveChatCompletionRequest,
    AdaptiveCompletionRequest,
    AdaptiveResponsesRequest,
)
from server.record import note_request
from server.report import current_report, set_current_report

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
MODELS_PATH = "/v1/models"


class AdaptiveRoute(APIRoute):
    """A route of requests that may be adaptive."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; an adaptive one holds its head until the response is over."""
        # The context may be that of an earlier request of the same connection.
        set_current_report(None)
        try:
            await super().handle(scope, receive, send)
        finally:
            if (report := current_report()) is not None:
                report.release()


def make_router() -> APIRouter:
    """Routes that replace vLLM's."""
    router = APIRouter(route_class=AdaptiveRoute)
    for path, endpoint, stock in (
        (CHAT_PATH, create_chat_completion, chat.router),
        (COMPLETION_PATH, create_completion, completion.router),
        (RESPONSES_PATH, create_response, responses.router),
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
    return await chat.create_chat_completion(request, raw_request)


async def create_completion(request: AdaptiveCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's completions; `temperature` may be "adaptive"."""
    note_request(request)
    admit(request, raw_request)
    return await completion.create_completion(request, raw_request)


async def create_response(request: AdaptiveResponsesRequest, raw_request: Request) -> Response:
    """OpenAI's responses; `temperature` may be "adaptive"."""
    note_request(request)
    admit(request, raw_request)
    return await responses.create_responses(request, raw_request)


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
