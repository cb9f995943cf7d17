"""ASGI middleware: reads a request, within limits, before a route sees it."""

import asyncio
from http import HTTPStatus
from itertools import chain

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adaptive_head.vllm.limits import Limits
from server.limits.queue import ENGINE_PATHS, Queue
from server.limits.refusal import UNREAD, Refusal, exceeds, refuse_unread, send_refusal
from server.limits.shape import check_body
from server.record import find_header, find_path

# Those that have no body worth reading pass by.
BODY_METHODS = frozenset({"DELETE", "PATCH", "POST", "PUT"})
# A larger body is checked in a thread, so that others are served in between.
MAX_INLINE_BYTES = 1 << 18


class Door:
    """Refuses what exceeds the limits; all else goes on with its body read."""

    def __init__(self, app: ASGIApp, limits: Limits, queue: Queue) -> None:
        self._app = app
        self._limits = limits
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            declared_size = self._check_head(scope)
            if scope["method"] not in BODY_METHODS:
                return await self._app(scope, receive, send)
            self._check_size(declared_size)
            message = await self._read(receive)
            if find_path(scope) in ENGINE_PATHS:
                self._queue.check()
            await self._check_body(message.get("body", b""), is_json=says_json(scope))
        except Refusal as refusal:
            return await self._refuse(refusal, receive, send)
        await self._app(scope, replay(message, receive), send)

    def _check_head(self, scope: Scope) -> int:
        """The size that a request says its body has; 0 where it does not.

        Raises:
            Refusal: its headers, with its address, are too long.
        """
        headers = scope["headers"]
        size = len(scope["path"]) + len(scope["query_string"])
        size += sum(map(len, chain.from_iterable(headers)))
        if size > self._limits.max_header_bytes:
            raise exceeds(
                self._limits,
                "max_header_bytes",
                "headers",
                "bytes",
                size,
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            )
        for name, value in headers:
            if name == b"content-length" and value.isdigit():
                return int(value[:20])
        return 0

    def _check_size(self, size: int, *, is_known: bool = True) -> None:
        if size > self._limits.max_body_bytes:
            raise exceeds(
                self._limits,
                "max_body_bytes",
                "body",
                "bytes",
                size if is_known else None,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )

    async def _read(self, receive: Receive) -> Message:
        """The whole body as one message, or the one that says that the client has left.

        Raises:
            Refusal: it is too large, or takes too long.
        """
        # Most come at once, and a timer would cost more than all the rest of this. A connection on
        # which no body begins is closed by `connections`.
        message = await receive()
        if message.get("more_body", False):
            try:
                async with asyncio.timeout(self._limits.max_read_seconds):
                    message = await self._read_rest(message, receive)
            except TimeoutError:
                raise exceeds(
                    self._limits,
                    "max_read_seconds",
                    "body",
                    "seconds for a request to arrive",
                    status=HTTPStatus.REQUEST_TIMEOUT,
                ) from None
        self._check_size(len(message.get("body", b"")))
        return message

    async def _check_body(self, body: bytes, *, is_json: bool) -> None:
        if len(body) > MAX_INLINE_BYTES:
            await asyncio.to_thread(check_body, body, self._limits, is_json=is_json)
        elif body:
            check_body(body, self._limits, is_json=is_json)

    async def _read_rest(self, message: Message, receive: Receive) -> Message:
        parts = bytearray()
        while message["type"] == "http.request":
            parts += message.get("body", b"")
            self._check_size(len(parts), is_known=False)
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(parts), "more_body": False}
            message = await receive()
        return message

    async def _refuse(self, refusal: Refusal, receive: Receive, send: Send) -> None:
        # A client whose time is up has had its chance to finish.
        if refusal.status in UNREAD and refusal.status != HTTPStatus.REQUEST_TIMEOUT:
            return await refuse_unread(receive, send, refusal, self._limits)
        await send_refusal(send, refusal)


def says_json(scope: Scope) -> bool:
    """Whether a request's headers say that its body is JSON."""
    media_type = find_header(scope, b"content-type").split(b";", 1)[0].strip().lower()
    return media_type == b"application/json" or media_type.endswith(b"+json")


def replay(message: Message, receive: Receive) -> Receive:
    """`receive` of a request of which one message has been read."""
    pending: list[Message] = [message]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
