"""Limits on connections: the size of a request's head, and the time until a request has arrived.

uvicorn closes a connection that idles after an answer (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`). It waits
without end for a request that has not begun or not ended, and its parser (httptools) keeps headers
of any size.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adaptive_head.vllm.limits import Limits
from server.limits.refusal import exceeds

_SWEEP_S = 1.0
# `Door` comes first where it waits for the body: it answers, which a closed connection does not.
_GRACE_S = 2.0


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's connection, which notes when a request begins and ends to arrive."""

    limits = Limits()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # A connection owes its first request.
        self._arriving_since: float | None = self.loop.time()
        self._num_head_bytes: int | None = 0
        self._is_refused = False

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        if self._num_head_bytes is not None:
            # The head has not ended with this data. One that has is checked in `Door`.
            self._num_head_bytes += len(data)
            if self._num_head_bytes > self.limits.max_header_bytes:
                self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arriving_since = self.loop.time()
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._arriving_since = None
        super().on_message_complete()

    def close_if_late(self, now: float) -> None:
        """Close a connection whose request does not arrive."""
        since = self._arriving_since
        if since is not None and now - since > self.limits.max_read_seconds + _GRACE_S:
            self.transport.close()

    def _refuse_head(self) -> None:
        """Answer; what still comes is dropped, until the client has read it or its time is up."""
        self._is_refused = True
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        refusal = exceeds(self.limits, "max_header_bytes", "headers", "bytes", status=status)
        body = refusal.encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()


@asynccontextmanager
async def bounded_connections(server: uvicorn.Server, limits: Limits) -> AsyncIterator[None]:
    """Within the block, connections to a server are bounded. Before it accepts the first."""
    protocol = server.config.http_protocol_class
    if protocol is not HttpToolsProtocol:
        # uvicorn's other parser is h11, which vLLM bounds by itself (--h11-max-...).
        yield
        return
    server.config.http_protocol_class = type(
        "BoundedProtocol", (BoundedProtocol,), {"limits": limits}
    )
    sweep = asyncio.create_task(close_late_connections(server))
    try:
        yield
    finally:
        sweep.cancel()
        with suppress(asyncio.CancelledError):
            await sweep


async def close_late_connections(server: uvicorn.Server) -> None:
    """Look again and again for connections whose requests do not arrive."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_S)
        now = loop.time()
        for connection in list(server.server_state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.close_if_late(now)
