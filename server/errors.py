"""Errors in OpenAI's form, on a connection that stays open."""

import json
from collections.abc import Awaitable
from http import HTTPStatus

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.logger import init_logger

from server.limits.door import BODY_METHODS
from server.limits.mistakes import begin_request
from server.record import find_header, find_path
from server.routes import MESSAGES_PATH, RESPONSES_PATH

logger = init_logger("vllm.adaptive")

# As proxies have it: HTTP has no status for it.
CLIENT_LEFT = 499
TYPES = {
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.METHOD_NOT_ALLOWED: "MethodNotAllowedError",
}
_BROKEN = "the server could not go on: an internal error"


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler: the answer where no route takes a request.

    FastAPI's own has another form; vLLM replaces it only for what routes raise.
    """
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    message = f"{error.detail}: {request.method} {find_path(request.scope)}"
    answer = error_response.create_error_response(message, TYPES.get(status, status.phrase), status)
    return JSONResponse(answer.model_dump(), status, error.headers)


class ErrorNet:
    """ASGI middleware, the innermost: answers what a route raises and no handler takes.

    Starlette answers it, too, but raises again, and uvicorn then resets the connection, with the
    requests that follow on it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin_request(has_body=scope["method"] in BODY_METHODS)
        start: Message | None = None

        # Called for every chunk, so it awaits nothing itself.
        def watched(message: Message) -> Awaitable[None]:
            nonlocal start
            if start is None:
                start = message
            return send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            # Nobody is left to read it, but metrics count a request without an answer as a 5xx.
            if start is None:
                await Response(status_code=CLIENT_LEFT)(scope, receive, send)
        except Exception as error:
            if start is None:
                await self._answer(error, scope, receive, send)
            elif is_event_stream(start):
                logger.exception("a stream broke")
                await send(make_last_event(scope))
            else:
                # Only a connection that ends shows that an answer is not whole.
                raise

    async def _answer(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        answer = error_response.create_error_response(error)
        status: int = answer.error.code
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.exception("a request failed")
        await JSONResponse(answer.model_dump(), status)(scope, receive, send)


def is_event_stream(start: Message) -> bool:
    """Whether a response consists of server-sent events."""
    return find_header(start, b"content-type").startswith(b"text/event-stream")


def make_last_event(scope: Scope) -> Message:
    """The end of a stream that broke, as the clients of its route read it."""
    error: dict[str, object] = {"message": _BROKEN, "param": None}
    path = find_path(scope)
    if path.startswith(MESSAGES_PATH):
        message = {"type": "error", "error": {"type": "api_error", "message": _BROKEN}}
        body = f"event: error\ndata: {json.dumps(message)}\n\n"
    elif path.startswith(RESPONSES_PATH):
        event = {"type": "error", "code": "server_error", "sequence_number": 0} | error
        body = f"event: error\ndata: {json.dumps(event)}\n\n"
    else:
        error |= {"type": "InternalServerError", "code": 500}
        body = f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"
    return {"type": "http.response.body", "body": body.encode(), "more_body": False}
