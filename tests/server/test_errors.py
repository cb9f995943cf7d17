"""What a route raises is answered in the form of its clients, and blamed on who is to blame."""

import json
from types import ModuleType, SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_fastapi_instrumentator.metrics import requests
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.errors import ErrorNet, answer_http_error
from server.limits import mistakes
from server.limits.mistakes import create_blaming_response, watch_engine

CHAT = "/v1/chat/completions"


def make_vllms(error: Exception):
    """A function that raises, as one of vLLM's modules."""
    module = ModuleType("vllm.somewhere")
    module.error = error
    exec("def fail():\n    raise error", vars(module))
    return module.fail


def make_app(handle, path=CHAT) -> FastAPI:
    app = FastAPI()
    app.add_middleware(ErrorNet)
    app.exception_handler(HTTPException)(answer_http_error)
    app.api_route(path, methods=["GET", "POST"])(handle)
    return app


async def ask(app, method="POST", path=CHAT) -> httpx.Response:
    """Raises what the server would log, and reset the connection for."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.request(method, path)


async def test_what_a_route_raises_is_a_500_that_raises_no_further():
    async def handle(request: Request):
        raise RuntimeError("boom")

    response = await ask(make_app(handle))
    error = response.json()["error"]
    assert response.status_code == error["code"] == 500
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/nowhere", "POST", 404), (CHAT, "DELETE", 405)]
)
async def test_where_no_route_takes_a_request_the_error_has_openais_form(path, method, status):
    response = await ask(make_app(lambda: None), method, path)
    error = response.json()["error"]
    assert response.status_code == error["code"] == status
    assert f"{method} {path}" in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
async def test_a_stream_that_breaks_ends_as_its_clients_read_it(path):
    async def events():
        yield 'data: {"begun": true}\n\n'
        raise RuntimeError("boom")

    async def handle(request: Request):
        return StreamingResponse(events(), media_type="text/event-stream")

    text = (await ask(make_app(handle, path), path=path)).text
    begun, *ends = text.strip().split("\n\n")
    assert begun == 'data: {"begun": true}'
    event = json.loads(ends[0].rpartition("data: ")[2])
    if path == CHAT:
        assert event["error"]["code"] == 500 and ends[1:] == ["data: [DONE]"]
    else:
        assert ends[0].startswith("event: error\n") and event["type"] == "error"
        assert len(ends) == 1
    assert "boom" not in text


async def test_an_answer_of_another_kind_that_breaks_is_cut():
    async def parts():
        yield "a"
        raise RuntimeError("boom")

    async def handle(request: Request):
        return StreamingResponse(parts(), media_type="text/plain")

    with pytest.raises(RuntimeError, match="boom"):
        await ask(make_app(handle))


async def test_a_client_that_has_left_is_no_fault_of_the_server(caplog):
    async def app(scope, receive, send):
        raise ClientDisconnect

    registry = CollectorRegistry()
    watched = PrometheusInstrumentatorMiddleware(
        ErrorNet(app), instrumentations=[requests(registry=registry)], registry=registry
    )
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await watched(scope | {"app": FastAPI()}, None, send)
    assert b"5xx" not in generate_latest(registry)
    assert sent[0]["status"] == 499 and not caplog.records


@pytest.mark.parametrize(
    ("method", "error", "has_engine", "status"),
    [
        ("POST", AttributeError("no field"), False, 400),
        ("POST", KeyError("role"), False, 400),
        # Nothing of the client's was read; a request without a body; the server's own trouble.
        ("POST", AttributeError("no field"), True, 500),
        ("GET", AttributeError("no field"), False, 500),
        ("POST", OSError("disk"), False, 500),
    ],
    ids=lambda value: repr(value),
)
async def test_what_vllm_could_not_read_is_the_clients_mistake(method, error, has_engine, status):
    fail = make_vllms(error)

    async def add_request():
        return "added"

    engine = SimpleNamespace(add_request=add_request)
    watch_engine(engine)

    async def handle(request: Request):
        if has_engine:
            await engine.add_request()
        try:
            fail()
        except Exception as caught:
            answer = create_blaming_response(caught)
            return PlainTextResponse(answer.error.message, answer.error.code)

    response = await ask(make_app(handle), method)
    assert response.status_code == status


async def test_our_own_mistakes_are_never_the_clients():
    mistakes.begin_request(has_body=True)
    module = ModuleType("server.somewhere")
    exec("def fail():\n    raise AttributeError('ours')", vars(module))
    try:
        module.fail()
    except AttributeError as error:
        assert create_blaming_response(error).error.code == 500


async def test_what_cannot_be_sent_to_the_engine_is_the_clients_mistake():
    error = OverflowError("no room for the number")
    fail = make_vllms(error)

    async def add_request():
        fail()

    engine = SimpleNamespace(add_request=add_request)
    watch_engine(engine)
    with pytest.raises(OverflowError):
        await engine.add_request()

    async def handle(request: Request):
        try:
            await engine.add_request()
        except Exception as caught:
            answer = create_blaming_response(caught)
            return PlainTextResponse(answer.error.message, answer.error.code)

    assert (await ask(make_app(handle))).status_code == 400
