"""How many requests the engine may have: vLLM's `--max-num-queued-reqs`, with a default.

vLLM counts and refuses; here a refusal says when to come again, and comes before the body is
looked at.
"""

from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from vllm.exceptions import GracefulHTTPError, MaxQueuedTokensError, QueueOverflowError

from server.limits.refusal import Refusal

# Routes that hand requests to the engine.
ENGINE_PATHS = frozenset(
    {
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1/systemone",
    }
)
OPTIONS = {
    QueueOverflowError: "--max-num-queued-reqs",
    MaxQueuedTokensError: "--max-num-queued-tokens",
}


class Queue:
    """The engine's queue, once there is an engine."""

    def __init__(self) -> None:
        self._engine_client: Any = None

    def watch(self, engine_client: Any) -> None:
        """Ask this engine client from now on."""
        self._engine_client = engine_client

    def check(self) -> None:
        """Check that the engine takes one more request.

        Raises:
            Refusal: it does not.
        """
        if self._engine_client is None:
            return
        try:
            self._engine_client.check_admission()
        except GracefulHTTPError as error:
            raise explain(error) from None


def explain(error: GracefulHTTPError) -> Refusal:
    """The refusal for what is raised where the server is too busy."""
    option = OPTIONS.get(type(error))
    message = f"{error} ({option} of the server)" if option else str(error)
    return Refusal(HTTPStatus(error.http_status), message)


async def refuse_full(_: Request, error: Exception) -> Response:
    """Exception handler: the answer where a route finds the server too busy, such as for its n."""
    assert isinstance(error, GracefulHTTPError)
    refusal = explain(error)
    return Response(
        refusal.encode(), refusal.status, refusal.headers, media_type="application/json"
    )
