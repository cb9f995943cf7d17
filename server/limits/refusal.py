"""A refusal, in the form of OpenAI's errors."""

import asyncio
import json
from http import HTTPStatus

from starlette.types import Receive, Send

from adaptive_head.vllm.limits import Limits, option_name

MAX_PARAM_LEN = 100
RETRY_AFTER_S = 5
TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.REQUEST_TIMEOUT: "RequestTimeoutError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "HeadersTooLargeError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}
# With these, a request is refused before all of it has been read.
UNREAD = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
)


class Refusal(Exception):
    """A request is not taken: it exceeds a limit, lacks a key, or cannot be read.

    Attributes:
        param: the field that is the reason, in the body; or "body", "headers".
        challenge: of a 401: the kind of key that the server wants.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        param: str | None = None,
        challenge: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.challenge = challenge

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers, except for its body's type and length."""
        if self.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
            return {"retry-after": str(RETRY_AFTER_S)}
        if self.challenge is not None:
            return {"www-authenticate": self.challenge}
        # What still comes of the request must not pass for the next one.
        return {"connection": "close"} if self.status in UNREAD else {}

    def encode(self) -> bytes:
        """The response's body."""
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, self.status.phrase),
            "param": self.param,
            "code": self.status.value,
        }
        return json.dumps({"error": error}).encode()


def bound_param(param: str) -> str:
    """A field's path, cut to a length that can be read."""
    return param if len(param) <= MAX_PARAM_LEN else param[:MAX_PARAM_LEN] + "…"


def exceeds(
    limits: Limits,
    limit: str,
    param: str,
    what: str,
    found: object = None,
    status: HTTPStatus = HTTPStatus.BAD_REQUEST,
) -> Refusal:
    """The refusal of a request in which `param` has more of something than it may.

    Args:
        limit: the field of `limits` that is exceeded.
        what: of what there is too much, in the plural.
        found: how many there are, where that is known.
    """
    param = bound_param(param)
    got = "" if found is None else f", got {found}"
    maximum = getattr(limits, limit)
    message = f"{param}: at most {maximum} {what}{got} ({option_name(limit)} of the server)"
    return Refusal(status, message, param)


async def send_refusal(send: Send, refusal: Refusal, *, is_last: bool = True) -> None:
    """Send a refusal.

    Args:
        is_last: whether nothing follows. Otherwise the caller ends the response.
    """
    body = refusal.encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    headers += [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    start = {"type": "http.response.start", "status": refusal.status.value, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


async def refuse_unread(receive: Receive, send: Send, refusal: Refusal, limits: Limits) -> None:
    """Refuse a request whose body has not been read, and let its client finish sending.

    A connection that is closed with data unread is reset, and the answer lost.
    """
    await send_refusal(send, refusal, is_last=False)
    try:
        async with asyncio.timeout(limits.max_read_seconds):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
