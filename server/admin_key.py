"""ASGI middleware: changes at run time need the admin key, which is looked at before the body.

An API key does not replace it, nor the other way round: a server with both wants both.
"""

import asyncio
import hmac
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from adaptive_head.vllm.limits import Limits
from adaptive_head.vllm.settings import ADMIN_KEY_VARIABLE
from server.admission import AdaptiveState
from server.keys import READING_METHODS, digest
from server.limits.refusal import Refusal, refuse_unread
from server.record import find_header, find_path

ADMIN_KEY_HEADER = "X-Admin-Key"
# Every route below it that is more than a look needs the admin key.
CONTROLLED_PATHS = "/v1/adaptive/"
# What a wrong key costs its sender. The right one never waits.
DELAY_S = 1.0
# So many wait at once. Beyond them, wrong keys are refused without a delay, and not kept.
MAX_DELAYED = 32


class AdminKey:
    """Hands a change on with `control` in its state; without the right key, refuses it."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._num_delayed = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_change(scope):
            return await self._app(scope, receive, send)
        state: AdaptiveState = scope["app"].state.adaptive
        if state.control is None:
            return await refuse_unread(receive, send, _OFF, self._limits)
        given = find_header(scope, ADMIN_KEY_HEADER.lower().encode())
        if hmac.compare_digest(digest(given), digest(state.control.admin_key.encode())):
            # The routes take it from here: they do nothing where this middleware is missing.
            scope.setdefault("state", {})["control"] = state.control
            return await self._app(scope, receive, send)
        state.metrics.count_change("key", "refused")
        await refuse_unread(receive, send, await self._delay(), self._limits)

    async def _delay(self) -> Refusal:
        """The refusal of a wrong key, once its time has come."""
        if self._num_delayed >= MAX_DELAYED:
            return _TOO_MANY
        self._num_delayed += 1
        try:
            await asyncio.sleep(DELAY_S)
        finally:
            self._num_delayed -= 1
        return _WRONG


def is_change(scope: Scope) -> bool:
    """Whether a request would change something that the operator decides."""
    return (
        scope["type"] == "http"
        and find_path(scope).startswith(CONTROLLED_PATHS)
        and scope["method"] not in READING_METHODS
    )


_OFF = Refusal(
    HTTPStatus.FORBIDDEN,
    "changes at run time are off; "
    f"start adaptive-serve with {ADMIN_KEY_VARIABLE} in the environment and --heads-dir",
)
_WRONG = Refusal(
    HTTPStatus.UNAUTHORIZED,
    f"the header {ADMIN_KEY_HEADER} must hold the admin key",
    challenge=ADMIN_KEY_HEADER,
)
_TOO_MANY = Refusal(
    HTTPStatus.TOO_MANY_REQUESTS, f"too many requests with a wrong {ADMIN_KEY_HEADER}"
)
