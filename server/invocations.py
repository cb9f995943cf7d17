"""SageMaker's `/invocations`, whose chats and completions may be adaptive.

vLLM tries which kind of request a body is, with its own classes, which know no `adaptive`.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.responses import Response
from starlette.routing import BaseRoute
from vllm.exceptions import VLLMValidationError

from server.admission import AdaptiveState
from server.protocol import (
    ADAPTIVE,
    AdaptiveChatCompletionRequest,
    AdaptiveCompletionRequest,
)
from server.routes import INVOCATIONS_PATH, create_chat_completion, create_completion

Handler = Callable[[Request], Awaitable[Response]]
# By what no other kind of request has; in the order in which vLLM tries them.
_KINDS: dict[type[AdaptiveChatCompletionRequest | AdaptiveCompletionRequest], set[str]] = {
    AdaptiveChatCompletionRequest: {"messages"},
    AdaptiveCompletionRequest: {"prompt", "prompt_embeds"},
}


def make_invocations_router(routes: Sequence[BaseRoute]) -> APIRouter:
    """The route that replaces vLLM's, if that is among `routes`.

    An operator's own handler replaces both.
    """
    router = APIRouter()
    for route in routes:
        if isinstance(route, APIRoute) and route.path == INVOCATIONS_PATH:
            form: Any = {"dependencies": route.dependencies, "responses": route.responses}
            router.post(INVOCATIONS_PATH, **form)(make_endpoint(route.endpoint))
    return router


def make_endpoint(stock: Handler) -> Handler:
    """An endpoint that leaves to `stock` what is neither a chat nor a completion."""
    # Here, where vLLM has imported it: it changes the levels of logging, which vLLM restores.
    from model_hosting_container_standards import sagemaker

    adapter_header = sagemaker.SageMakerLoRAApiHeader.ADAPTER_IDENTIFIER

    @sagemaker.stateful_session_manager()
    async def invoke(raw_request: Request) -> Response:
        """A chat or a completion, as its body says; `temperature` may be "adaptive"."""
        try:
            body = await raw_request.json()
        except ValueError:
            # vLLM's handler says what is wrong with it.
            return await stock(raw_request)
        adapter = raw_request.headers.get(adapter_header)
        request = read_request(body, adapter, raw_request.app.state.adaptive)
        if isinstance(request, AdaptiveChatCompletionRequest):
            return await create_chat_completion(request, raw_request)
        if isinstance(request, AdaptiveCompletionRequest):
            return await create_completion(request, raw_request)
        return await stock(raw_request)

    endpoint: Handler = invoke
    return endpoint


def read_request(
    body: Any, adapter: str | None, state: AdaptiveState
) -> AdaptiveChatCompletionRequest | AdaptiveCompletionRequest | None:
    """The request that a body is, in the order in which vLLM tries.

    Args:
        adapter: the model's name in a header. Without one, SageMaker's library ignores a name in
            the body; here an adaptive one counts.

    Returns:
        None for a body that is another kind of request, or none.

    Raises:
        RequestValidationError: it is an adaptive one, and something else is wrong.
        VLLMValidationError: a field is wrong.
    """
    if not isinstance(body, dict):
        raise VLLMValidationError("body: must be a JSON object", parameter="body")
    model = body.get("model")
    is_adaptive_name = isinstance(model, str) and state.strip_adaptive_name(model) is not None
    body = {**body, "model": adapter or (model if is_adaptive_name else None)}
    is_asked_for = is_adaptive_name or body.get("temperature") == ADAPTIVE or "adaptive" in body
    wrong: ValidationError | None = None
    for kind, fields in _KINDS.items():
        if not fields & body.keys():
            continue
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            wrong = wrong or error
    if wrong is not None and is_asked_for:
        errors = wrong.errors(include_url=False)
        raise RequestValidationError(
            [{**error, "loc": ("body", *error["loc"])} for error in errors]
        )
    return None
