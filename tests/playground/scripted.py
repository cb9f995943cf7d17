"""A server whose answers a test scripts, around the real playground."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.head_routes import describe
from server.heads import HeadRegistry
from server.playground import make_playground_router
from tests.server.fakes import HEADS, MODEL

# Everything is here too, as behind a proxy.
PREFIX = "/behind"
Script = Callable[[dict[str, Any]], "AsyncIterator[str | bytes] | Response"]


class ScriptedServer:
    """Answers every chat with `script`, called with the request's body.

    Attributes:
        bodies: the bodies of all chats, as they were sent.
        heads: the metadata of those that it lists, by name.
        key: what `Authorization` must bear, unless it is empty.
    """

    def __init__(self) -> None:
        self.script: Script = lambda body: stream(make_chunks(["Hi"], body))
        self.bodies: list[bytes] = []
        self.key = ""
        self.heads = HEADS
        app = FastAPI()
        app.include_router(make_playground_router())
        app.get("/v1/models")(self._show_models)
        app.get("/v1/adaptive/heads")(self._show_heads)
        app.post("/v1/chat/completions")(self._chat)
        app.mount(PREFIX, app)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    @property
    def url(self) -> str:
        (listening,) = self._server.servers
        return "http://127.0.0.1:{1}".format(*listening.sockets[0].getsockname())

    def answer(self, tokens: list[str | bytes], **options: Any) -> None:
        """Answer from now on with these tokens; `options` are those of `make_chunks`."""
        self.script = lambda body: stream(make_chunks(tokens, body, **options))

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Go away at once, in the middle of streams too."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _refuse(self, request: Request) -> Response | None:
        if request.headers.get("authorization", "") == (self.key and f"Bearer {self.key}"):
            return None
        return JSONResponse({"error": "Unauthorized"}, status_code=401)

    async def _show_models(self, request: Request) -> Response:
        cards = [{"id": MODEL}, {"id": f"{MODEL}:adaptive", "parent": MODEL}]
        return self._refuse(request) or JSONResponse({"data": cards})

    async def _show_heads(self, request: Request) -> Response:
        registry = HeadRegistry(self.heads, "seq")
        heads = [describe(head, registry) for head in registry]
        return self._refuse(request) or JSONResponse({"data": heads})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refuse(request):
            return refusal
        self.bodies.append(await request.body())
        answer = self.script(json.loads(self.bodies[-1]))
        if isinstance(answer, Response):
            return answer
        return StreamingResponse(answer, media_type="text/event-stream")


@contextmanager
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def make_token(token: str | bytes, logprob: float = -0.5) -> dict[str, Any]:
    """A token's entry among the logprobs."""
    raw = token.encode() if isinstance(token, str) else token
    return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": logprob}


def make_chunks(
    tokens: list[str | bytes],
    body: dict[str, Any],
    temperatures: list[float] | None = None,
    finish_reason: str = "stop",
) -> Iterator[dict[str, Any]]:
    """The chunks of an answer, a token each; those of a fixed temperature report none."""
    yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    temperatures = temperatures or [0.3] * len(tokens)
    for token, temperature in zip(tokens, temperatures, strict=True):
        entry = make_token(token)
        choice: dict[str, Any] = {
            "index": 0,
            "delta": {"content": entry["token"]},
            "logprobs": {"content": [entry | {"top_logprobs": [entry, make_token("an", -3)]}]},
        }
        if body["temperature"] == "adaptive":
            choice["adaptive"] = {"temperatures": [temperature]}
        yield {"choices": [choice]}
    yield {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": finish_reason}]}


async def stream(
    chunks: Iterator[dict[str, Any]], delay_s: float = 0.0, is_whole: bool = True
) -> AsyncIterator[str]:
    """Server-sent events of chunks; the last one only if the answer is whole."""
    for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n"
        await asyncio.sleep(delay_s)
    if is_whole:
        yield "data: [DONE]\n\n"
