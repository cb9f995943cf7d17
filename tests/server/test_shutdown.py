"""What happens when the server is told to stop, without an engine; with one: test_faults.py."""

import asyncio
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from vllm.entrypoints.launchers.launcher import NoSignalServer

from server.shutdown import Drain, DrainingClient, Gate, bound_closing, note_end
from server.signals import HURRIED_S

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Engine:
    """Remembers how it was shut down. Aborted requests end the drain.

    It has a request for each that the server answers, unless it is told another number.
    """

    errored = False

    def __init__(self, drain, num_requests=None):
        self.drain = drain
        self.num_requests = num_requests
        self.output_processor = self
        self.aborted = []
        self.timeouts = []

    @property
    def request_states(self):
        number = self.drain.num_running if self.num_requests is None else self.num_requests
        return dict.fromkeys("ab"[:number])

    async def abort(self, request_ids, internal):
        assert internal
        self.aborted += request_ids
        self.drain.num_running = 0

    def shutdown(self, timeout):
        self.timeouts.append(timeout)


@pytest.fixture
def drain():
    return Drain()


def catch_handlers(monkeypatch) -> dict[int, Callable[[], None]]:
    """What the loop would do at each signal."""
    handlers = {}

    def add(number, function, *arguments):
        handlers[number] = partial(function, *arguments)

    monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", add)
    return handlers


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """In how many seconds this process would have ended, and after which signals."""
    ends = []
    monkeypatch.setattr("server.shutdown.end_within", lambda *end: ends.append(end))
    return ends


@pytest.fixture
async def stop(drain, monkeypatch):
    """Stops a server as vLLM's launcher does; returns its engine, and what to do at a signal."""
    monkeypatch.setattr("server.shutdown._ONE_SIGNAL_S", dict.fromkeys(SIGNALS, 0))
    handlers = catch_handlers(monkeypatch)
    loop = asyncio.get_running_loop()

    async def run(timeout, num_running=0, during=None, num_requests=None):
        drain.num_running = num_running
        engine = Engine(drain, num_requests)
        client = DrainingClient(engine, drain)
        stopping = loop.run_in_executor(None, client.shutdown, timeout)
        if during is not None:
            while not (drain.is_on and handlers):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert not engine.timeouts and not engine.aborted
            during(engine, handlers)
        await asyncio.wait_for(stopping, 30)
        return engine

    return run


async def test_an_idle_server_stops_at_once(stop):
    engine = await stop(timeout=1000)
    assert not engine.aborted
    assert engine.timeouts[0] > 900


async def test_running_requests_end_first(stop, drain):
    def finish(engine, handlers):
        drain.num_running = 0

    engine = await stop(timeout=1000, num_running=2, during=finish)
    assert not engine.aborted
    assert len(engine.timeouts) == 1


async def test_a_client_that_does_not_read_is_not_waited_for(stop, monkeypatch):
    monkeypatch.setattr("server.shutdown._SETTLE_S", 0.2)
    engine = await stop(timeout=1000, num_running=1, num_requests=0)
    assert not engine.aborted
    assert engine.timeouts[0] > 900


async def test_background_responses_end_first(stop):
    def finish(engine, handlers):
        engine.num_requests = 0

    engine = await stop(timeout=1000, num_requests=1, during=finish)
    assert not engine.aborted
    assert engine.timeouts[0] > 900


@pytest.mark.parametrize("timeout", [None, 0, 0.2])
async def test_what_runs_at_the_end_of_the_grace_time_is_aborted(stop, timeout):
    engine = await stop(timeout, num_running=2)
    assert engine.aborted == ["a", "b"]
    assert engine.timeouts == [1.0]


@pytest.mark.parametrize("number", SIGNALS)
async def test_a_second_signal_aborts_at_once(stop, ends, number):
    engine = await stop(1000, num_running=2, during=lambda _, handlers: handlers[number]())
    assert engine.aborted == ["a", "b"]
    assert engine.timeouts == [1.0]
    assert ends == [(HURRIED_S, number)]


async def test_a_dead_engine_is_not_waited_for(stop):
    engine = await stop(1000, num_running=2, during=lambda engine, _: set_dead(engine))
    assert not engine.aborted
    assert len(engine.timeouts) == 1


def set_dead(engine):
    engine.errored = True


@pytest.mark.parametrize("number", SIGNALS)
async def test_one_signal_that_arrives_twice_is_one(drain, monkeypatch, ends, number):
    monkeypatch.setattr("server.shutdown._ONE_SIGNAL_S", dict.fromkeys(SIGNALS, 60))
    handlers = catch_handlers(monkeypatch)
    drain.num_running = 1
    client = DrainingClient(Engine(drain), drain)
    thread = threading.Thread(target=client.shutdown, args=(1000,))
    thread.start()
    while number not in handlers:
        await asyncio.sleep(0.01)
    handlers[number]()
    await asyncio.sleep(0.2)
    assert thread.is_alive()
    drain.num_running = 0
    await asyncio.to_thread(thread.join)
    assert not ends


async def test_everything_else_is_the_engine_clients(drain):
    engine = Engine(drain)
    assert DrainingClient(engine, drain).output_processor is engine.output_processor


@pytest.fixture
async def client(drain):
    """A server behind the gate, whose answers say how many requests it is counting."""

    async def answer(request):
        return PlainTextResponse(str(drain.num_running))

    app = Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "POST"])])
    transport = httpx.ASGITransport(Gate(app, drain))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_requests_are_counted_while_they_run(client, drain):
    assert (await client.post("/v1/completions")).text == "1"
    assert (await client.get("/metrics")).text == "0"
    assert drain.num_running == 0


async def test_a_stopping_server_takes_no_request_and_is_not_ready_but_can_be_watched(
    client, drain
):
    drain.is_on = True
    refused = [await client.post("/v1/chat/completions"), await client.post("/v1/messages")]
    for response in [*refused, await client.get("/health"), await client.get("/ping")]:
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.headers["connection"] == "close"
        assert response.json()["error"]["code"] == 503
    assert (await client.get("/metrics")).is_success
    assert (await client.get("/v1/models")).is_success


def test_the_death_of_the_engine_is_remembered_unless_the_server_was_told_to_stop(drain):
    state = SimpleNamespace(engine_client=SimpleNamespace(errored=False))
    note_end(state, drain)
    assert not drain.has_engine_died
    state.engine_client.errored = True
    note_end(state, drain)
    assert drain.has_engine_died
    stopping = Drain()
    stopping.is_on = True
    note_end(state, stopping)
    assert not stopping.has_engine_died


async def test_a_reader_that_is_stuck_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("server.shutdown._CLOSE_CONNECTIONS_S", 0.2)
    num_sent = 0

    async def endless():
        nonlocal num_sent
        while True:
            yield b"x" * 100_000
            num_sent += 1

    app = Starlette(routes=[Route("/", lambda request: StreamingResponse(endless()))])
    server = NoSignalServer(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    bound_closing(SimpleNamespace(server=server))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    (listener,) = server.servers[0].sockets
    _, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    before = -1
    while num_sent != before:
        before = num_sent
        await asyncio.sleep(0.3)
    assert num_sent > 0
    server.should_exit = True
    await asyncio.wait_for(serving, 20)
    writer.close()
