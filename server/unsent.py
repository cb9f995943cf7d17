"""Requests that do not reach the engine are forgotten.

vLLM notes a request before it sends it. One that cannot be sent, such as one whose id has no UTF-8
encoding, is answered with HTTP 500, but counts as running forever: in `--max-num-queued-reqs`, and
when the server stops.
"""

from contextlib import suppress
from typing import Any


def forget_unsent(engine_client: Any) -> None:
    """Let an engine client forget requests whose sending fails or is cancelled."""
    send = engine_client.engine_core.add_request_async

    async def send_or_forget(request: Any) -> None:
        try:
            await send(request)
        except BaseException:
            # The engine may have it already, so it is told as well, if it can be.
            with suppress(Exception):
                await engine_client.abort(request.request_id, internal=True)
            raise

    engine_client.engine_core.add_request_async = send_or_forget
