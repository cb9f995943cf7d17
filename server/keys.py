"""ASGI middleware: with an API key, every route needs it except those that are listed as open.

vLLM's own check covers a few prefixes (`/v1` and the like) and leaves all other routes open, such
as `/invocations`. This one takes its place. A route that nobody has thought of needs the key.
"""

import hashlib
import hmac
from argparse import Namespace
from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from adaptive_head.vllm.limits import Limits
from server.limits.refusal import Refusal, refuse_unread, send_refusal
from server.record import find_header, find_path
from server.shutdown import PROBES

METRICS_PATH = "/metrics"
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Of a connection that breaks the server's policy (RFC 6455).
_POLICY_VIOLATION = 1008
_MESSAGE = "missing or wrong API key: send it in the header `Authorization: Bearer KEY`"


def read_api_keys(args: Namespace) -> list[str]:
    """The keys that vLLM accepts: those of `--api-key`, else that of `VLLM_API_KEY`.

    An empty one is none, as it is for vLLM.
    """
    return [key for key in args.api_key or [envs.VLLM_API_KEY] if key]


def list_open_paths(page: Iterable[str], *, metrics: bool) -> frozenset[str]:
    """The paths that need no key to be looked at.

    Args:
        page: those of the playground's files.
        metrics: whether `/metrics` is among them.
    """
    return frozenset({*PROBES, *page, *([METRICS_PATH] if metrics else [])})


class ApiKeys:
    """Refuses requests without a key, before anything of their body is read."""

    def __init__(
        self, app: ASGIApp, keys: Collection[str], open_paths: frozenset[str], limits: Limits
    ) -> None:
        self._app = app
        self._digests = [digest(key.encode()) for key in keys]
        self._open_paths = open_paths
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope) or self._has_key(scope):
            return await self._app(scope, receive, send)
        scope["app"].state.adaptive.metrics.count_unauthorized()
        refusal = Refusal(HTTPStatus.UNAUTHORIZED, _MESSAGE, challenge="Bearer")
        if scope["type"] == "http":
            return await refuse_unread(receive, send, refusal, self._limits)
        if "websocket.http.response" in scope.get("extensions", {}):
            return await send_refusal(for_websocket(send), refusal)
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION})

    def _is_open(self, scope: Scope) -> bool:
        # Not with a method that has a body, which would be read. Compared as a whole, so that no
        # other spelling of a path passes for an open one.
        is_look = scope["type"] == "http" and scope["method"] in READING_METHODS
        return is_look and find_path(scope) in self._open_paths

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = find_header(scope, b"authorization").partition(b" ")
        # vLLM reads headers as Latin-1, as HTTP/1.1 has them.
        given = digest(key.decode("latin-1").encode())
        # All of them, so that the time does not say which one was nearly right.
        matches = [hmac.compare_digest(given, wanted) for wanted in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def replace_stock_check(app: Starlette) -> None:
    """Remove vLLM's own check of keys where `ApiKeys` is there, which covers all that it does.

    It would come first, and its refusals have neither OpenAI's form nor the headers that let a
    browser's scripts read them. Before the application starts.
    """
    classes: list[Any] = [entry.cls for entry in app.user_middleware]
    if ApiKeys in classes and AuthenticationMiddleware in classes:
        del app.user_middleware[classes.index(AuthenticationMiddleware)]
        # vLLM has built it already.
        app.middleware_stack = app.build_middleware_stack()


def digest(key: bytes) -> bytes:
    """A key's hash: comparing hashes takes the same time for keys of all lengths."""
    return hashlib.sha256(key).digest()


def for_websocket(send: Send) -> Send:
    """`send` for an ordinary answer to a request that asks for a websocket."""

    async def prefixed(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    return prefixed
