"""However a request ends, it lets go of its head: by our routes, with vLLM's own around the answer.

No engine. The collector is off, so that nothing is let go by being collected.
"""

import asyncio
import gc
import json
from contextlib import suppress
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.sampling_params import SamplingParams

from server.engine_proxy import EngineProxy
from server.handlers import AdaptiveServingChat
from server.metrics import AdaptiveMetrics
from server.report import set_current_report
from server.responses import AdaptiveServingResponses
from server.routes import CHAT_PATH, RESPONSES_PATH, Holding, make_router
from tests.server.fakes import HEADS, make_output, make_report, make_state, sample
from tests.server.test_streams import MESSAGES, make_handler

PARAMS = SamplingParams(max_tokens=9)


class Engine:
    """Generates two tokens for each choice, the second when it may."""

    def __init__(self) -> None:
        self.may_begin = asyncio.Event()
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    async def generate(self, prompt, params, request_id):
        await self.may_begin.wait()
        if self.error is not None:
            raise self.error
        yield make_output(*[(index, [0.3], None) for index in range(params.n)])
        await self.may_end.wait()
        ends = [(index, [0.7], "stop", 1) for index in range(params.n)]
        yield make_output(*ends, finished=True)


class Server:
    """Our routes, and vLLM's handlers as ours extend them; only the way to the engine is short."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.registry = CollectorRegistry()
        self.adaptive = make_state(metrics=AdaptiveMetrics("smol", HEADS, self.registry))
        self.background: list[asyncio.Task] = []
        self.error: Exception | None = None
        chat = make_handler(AdaptiveServingChat, create_chat_completion=self.create_chat)
        self.responses = make_handler(
            AdaptiveServingResponses, create_responses=self.create_response, parser=None
        )
        self.app = FastAPI()
        self.app.include_router(make_router())
        self.app.add_middleware(Holding)
        init_exception_handler(self.app)
        for name, value in {
            "adaptive": self.adaptive,
            "openai_serving_models": SimpleNamespace(lora_requests={}),
            "openai_serving_chat": chat,
            "openai_serving_responses": self.responses,
            "engine_client": SimpleNamespace(
                errored=False, is_running=True, should_keep_api_server_alive=False
            ),
            "args": SimpleNamespace(log_error_stack=False, sse_keep_alive_interval=0),
        }.items():
            setattr(self.app.state, name, value)
        self.chat = chat

    @property
    def num_holders(self) -> int:
        return self.adaptive.heads.by_name["tok"].num_holders

    async def create_chat(self, request, raw_request):
        if self.error is not None:
            raise self.error
        params = request.to_sampling_params(9, {})
        outputs = EngineProxy(self.engine).generate("p", params, "r")
        make = self.chat.chat_completion_full_generator
        metadata = RequestResponseMetadata(request_id="r")
        if request.stream:
            make = self.chat.chat_completion_stream_generator
        answer = make(request, outputs, "r", "smol", MESSAGES, None, metadata)
        return answer if request.stream else await answer

    async def create_response(self, request, raw_request):
        handler = self.responses
        passed = PARAMS, self.engine, None, "smol"
        if not request.background:
            if request.stream:
                return handler.responses_stream_generator(request, *passed)
            return await handler.responses_full_generator(request, *passed)
        handler.event_store = {}
        run = handler._run_background_request
        if request.stream:
            run = handler._run_background_request_stream
        self.background.append(asyncio.create_task(run(request, *passed)))
        return ResponsesResponse.model_construct(id="r", status="queued")

    async def ask(self, connection, path=CHAT_PATH, **fields) -> None:
        """Send a request, as an ASGI server does for a connection."""
        body = {"messages": MESSAGES} if path == CHAT_PATH else {"input": "Hi"}
        connection.body = json.dumps({"temperature": "adaptive"} | body | fields).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "app": self.app,
        }
        await self.app(scope, connection.receive, connection.send)


class Connection:
    """What a client does: it leaves when it is told to, and reads unless it is slow."""

    def __init__(self, is_slow: bool = False, is_broken: bool = False) -> None:
        self.body = b""
        self.has_left = asyncio.Event()
        self.received: list[dict] = []
        self._is_slow = is_slow
        self._is_broken = is_broken

    async def receive(self) -> dict:
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.received.append(message)
        if self._is_broken:
            raise OSError("the connection is gone")
        if self._is_slow and message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    @property
    def status(self) -> int:
        return self.received[0]["status"]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.received).decode()


@pytest.fixture
def server():
    gc.collect()
    gc.disable()
    yield Server
    gc.enable()


async def wait_until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@STREAM
@pytest.mark.parametrize("n", [1, 3])
async def test_an_answer_holds_its_head_until_it_is_over(server, stream, n):
    server, connection = server(), Connection()
    asked = asyncio.create_task(server.ask(connection, stream=stream, n=n))
    await wait_until(lambda: server.num_holders == 1)
    server.engine.may_begin.set()
    await asyncio.sleep(0.01)
    assert server.num_holders == 1
    server.engine.may_end.set()
    await asked
    assert (connection.status, server.num_holders) == (200, 0)
    # Of each answer, and again in the usage or at the top of its last chunk.
    assert connection.text.count('"max":0.7') == 2 * n


@STREAM
@pytest.mark.parametrize("has_token", [False, True], ids=["before", "after"])
async def test_a_client_that_leaves_before_or_after_the_first_token(server, stream, has_token):
    server, connection = server(), Connection()
    asked = asyncio.create_task(server.ask(connection, stream=stream))
    if has_token:
        server.engine.may_begin.set()
    await wait_until(lambda: server.num_holders == 1)
    await asyncio.sleep(0.01)
    connection.has_left.set()
    await asked
    assert server.num_holders == 0


async def test_a_client_that_does_not_read_and_leaves(server):
    """Its generator stays open, since it waits for no token; what it has read is counted."""
    server, connection = server(), Connection(is_slow=True)
    for event in (server.engine.may_begin, server.engine.may_end):
        event.set()
    asked = asyncio.create_task(server.ask(connection, stream=True))
    await wait_until(lambda: len(connection.received) == 2)
    connection.has_left.set()
    await asked
    assert server.num_holders == 0
    assert sample(server.registry, "adaptive_temperature_count") == 1


async def test_a_stream_that_is_never_started(server):
    server, connection = server(), Connection(is_broken=True)
    with pytest.raises(BaseException) as caught:
        await server.ask(connection, stream=True)
    assert "the connection is gone" in repr(caught.value)
    assert len(connection.received) == 1
    assert server.num_holders == 0


@STREAM
@pytest.mark.parametrize("is_early", [True, False], ids=["vllm", "engine"])
async def test_an_error_on_the_way(server, stream, is_early):
    server, connection = server(), Connection()
    error = RuntimeError("boom")
    if is_early:
        server.error = error
    else:
        server.engine.error = error
        server.engine.may_begin.set()
    # Starlette raises it again, for the log, when it has answered.
    with suppress(RuntimeError):
        await server.ask(connection, stream=stream)
    assert connection.status == (200 if stream and not is_early else 500)
    assert server.num_holders == 0


async def test_requests_that_are_refused_or_ordinary_release_nothing_of_an_earlier_ones(server):
    """A task's context may be that of an earlier request of the same connection."""
    server, first = server(), Connection()
    asked = asyncio.create_task(server.ask(first, stream=True))
    await wait_until(lambda: server.num_holders == 1)
    head = server.adaptive.heads.by_name["tok"]
    answers = [Connection(), Connection()]
    for event in (server.engine.may_begin, server.engine.may_end):
        event.set()

    async def follow(connection, **fields) -> None:
        set_current_report(make_report(head=head))
        await server.ask(connection, **fields)

    for connection, temperature in zip(answers, (0.7, "hot"), strict=True):
        await asyncio.create_task(follow(connection, temperature=temperature))
    assert "adaptive" not in answers[0].text
    assert [connection.status for connection in answers] == [200, 400]
    await asked
    assert server.num_holders == 0


@pytest.fixture
def turns(monkeypatch):
    """vLLM's making of a response, as far as it matters here: two turns with a tool between."""
    tool = asyncio.Event()
    counts: list[int] = []

    async def generate(request, engine):
        params = request.to_sampling_params(9, {})
        for turn in range(2):
            async for _ in EngineProxy(engine).generate("p", params, "r"):
                yield SimpleNamespace(type="response.output_text.delta", model_dump_json=to_json)
            counts.append(turn)
            if turn == 0:
                await tool.wait()

    async def whole(handler, request, params, engine, *_):
        async for _ in generate(request, engine):
            pass
        return ResponsesResponse.model_construct()

    async def stream(handler, request, params, engine, *_):
        async for event in generate(request, engine):
            yield event

    def to_json(**kwargs):
        return "{}"

    monkeypatch.setattr(OpenAIServingResponses, "responses_full_generator", whole)
    monkeypatch.setattr(OpenAIServingResponses, "responses_stream_generator", stream)
    return SimpleNamespace(tool=tool, counts=counts)


@STREAM
async def test_calls_of_tools_hold_the_head(server, turns, stream):
    server, connection = server(), Connection()
    server.engine.may_begin.set()
    server.engine.may_end.set()
    asked = asyncio.create_task(server.ask(connection, RESPONSES_PATH, stream=stream))
    await wait_until(lambda: turns.counts == [0])
    await asyncio.sleep(0.01)
    assert server.num_holders == 1
    turns.tool.set()
    await asked
    assert (turns.counts, server.num_holders) == ([0, 1], 0)


@STREAM
@pytest.mark.parametrize("is_cancelled", [False, True], ids=["done", "cancelled"])
async def test_a_background_response_holds_its_head(server, turns, stream, is_cancelled):
    server, connection = server(), Connection()
    fields = {"background": True, "store": True, "stream": stream}
    await server.ask(connection, RESPONSES_PATH, **fields)
    (task,) = server.background
    await asyncio.sleep(0.01)
    assert not task.done() and server.num_holders == 1
    server.engine.may_begin.set()
    server.engine.may_end.set()
    await wait_until(lambda: turns.counts == [0])
    assert server.num_holders == 1
    if is_cancelled:
        task.cancel()
    turns.tool.set()
    await asyncio.wait([task])
    assert server.num_holders == 0
    assert task.cancelled() == is_cancelled
