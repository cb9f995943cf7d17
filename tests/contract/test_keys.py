"""With an API key every route that vLLM and we register needs it, except for a short list.

The application is the one that vLLM builds, for a model of all kinds at once. No engine.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import get_args

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Mount, WebSocketRoute
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.tasks import SupportedTask
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adaptive_head.vllm.moved import make_arg_parser
from server.cli import PLUGIN
from server.keys import ApiKeys, read_api_keys, replace_stock_check
from server.metrics import AdaptiveMetrics

KEY = "open sesame"
PAGE = {"/playground", "/playground/playground.js", "/playground/playground.css"}
OPEN = {"/health", "/ping"} | PAGE
# From all corners of vLLM: the walk has been everywhere.
GUARDED = {
    "/collective_rpc",
    "/detokenize",
    "/docs",
    "/fault_tolerance/status",
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
    "/load",
    "/metrics",
    "/openapi.json",
    "/pause",
    "/redoc",
    "/scale_elastic_ep",
    "/server_info",
    "/sleep",
    "/start_profile",
    "/tokenize",
    "/tokenizer_info",
    "/v1/adaptive/heads",
    "/v1/adaptive/override",
    "/v1/audio/transcriptions",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/v1/messages",
    "/v1/models",
    "/v1/realtime",
    "/version",
}
VARIABLES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_API_KEY": KEY,
    "VLLM_PLUGINS": PLUGIN,
    "VLLM_SERVER_DEV_MODE": "1",
}


def build(*options: str, tasks=("generate",), settings=None, **variables: str) -> FastAPI:
    """vLLM's application with our plugin, as it is before the first request."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    args.additional_config = {"adaptive": settings or {}}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (VARIABLES | variables).items():
            patch.setenv(name, value)
        app = build_app(args, tasks)
    app.state.adaptive = SimpleNamespace(metrics=AdaptiveMetrics("smol", {}, CollectorRegistry()))
    return app


def start(app: FastAPI) -> FastAPI:
    """Do what `init_state` does to the application once the engine is up."""
    replace_stock_check(app.state.application)
    return app


def list_tasks() -> tuple[str, ...]:
    """All that any model can do."""
    return tuple(task for kind in get_args(SupportedTask) for task in get_args(kind) or [kind])


@pytest.fixture(scope="module")
def app() -> FastAPI:
    options = ("--enable-tokenizer-info-endpoint", "--enable-fault-tolerance")
    profiler = "--profiler-config.profiler=cuda"
    return start(build(*options, profiler, tasks=list_tasks()))


def walk(app: FastAPI) -> Iterator[tuple[BaseRoute, str]]:
    """Every route, with a path that leads to it."""
    for route in app.routes:
        yield route, route.path.format_map(Blank())


class Blank(dict):
    """A value for each parameter of a path."""

    def __missing__(self, name: str) -> str:
        return "x"


async def send(app: FastAPI, method: str, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.request(method, path, headers=headers)


async def ask_for_websocket(app: FastAPI, path: str, extensions: dict) -> list[dict]:
    """What the application sends before the handshake is over."""
    scope = {
        "type": "websocket",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [],
        "extensions": extensions,
        "subprotocols": [],
    }
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def note(message):
        sent.append(message)

    await app(scope, receive, note)
    return sent


def assert_unauthorized(response: httpx.Response, where: object) -> None:
    assert response.status_code == 401, where
    assert response.headers["www-authenticate"] == "Bearer"
    if response.request.method != "HEAD":
        error = response.json()["error"]
        assert "API key" in error["message"] and error["code"] == 401, where


def test_the_walk_meets_all_kinds_of_routes(app):
    found = {path for _, path in walk(app)}
    assert found >= GUARDED | OPEN
    for kind in (Mount, WebSocketRoute):
        assert any(isinstance(route, kind) for route, _ in walk(app))


async def test_every_route_but_those_of_the_list_needs_the_key(app):
    num_asked = 0
    for route, path in walk(app):
        if path in OPEN or path.startswith("/playground/"):
            continue
        for below in ("", "/x") if isinstance(route, Mount) else ("",):
            for method in {"GET", "HEAD", "POST", "OPTIONS", *(getattr(route, "methods", 0) or ())}:
                response = await send(app, method, path + below)
                assert_unauthorized(response, (method, path))
                num_asked += 1
    assert num_asked > 200


async def test_the_list_needs_no_key(app):
    for path in OPEN:
        with pytest.MonkeyPatch.context() as patch:
            # Behind the key there is no engine to ask.
            patch.setattr(app.state, "engine_client", None, raising=False)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                assert (await client.get(path)).status_code != 401, path


async def test_metrics_are_open_where_the_operator_says_so():
    app = start(build(settings={"metrics_without_key": True}))
    assert (await send(app, "GET", "/metrics")).status_code == 200
    for path in ("/metricsx", "/metrics/x", "/version"):
        assert_unauthorized(await send(app, "GET", path), path)


async def test_the_page_needs_the_key_where_there_is_none():
    app = start(build(settings={"playground": False}))
    for path in PAGE:
        assert_unauthorized(await send(app, "GET", path), path)


async def test_the_documentation_that_works_offline_needs_the_key():
    app = start(build("--enable-offline-docs"))
    for path in ("/docs", "/static/x.js", "/docs/oauth2-redirect"):
        assert_unauthorized(await send(app, "GET", path), path)


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/unknown", "/health/x"])
async def test_a_websocket_needs_the_key(app, path):
    extension = {"websocket.http.response": {}}
    first, last = await ask_for_websocket(app, path, extension)
    assert (first["type"], first["status"]) == ("websocket.http.response.start", 401)
    assert last["type"] == "websocket.http.response.body" and b'{"error": {' in last["body"]
    assert await ask_for_websocket(app, path, {}) == [{"type": "websocket.close", "code": 1008}]


async def test_a_browser_may_ask_what_it_may_send_and_reads_the_refusal():
    origin = "https://page.example"
    app = start(build("--allowed-origins", f'["{origin}"]'))
    asked = {"origin": origin, "access-control-request-method": "POST"}
    response = await send(app, "OPTIONS", "/v1/chat/completions", **asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    # Not a way around the key: the answer is the middleware's, whatever the route.
    assert (await send(app, "OPTIONS", "/metrics", **asked)).text == response.text
    response = await send(app, "POST", "/v1/chat/completions", origin=origin)
    assert_unauthorized(response, "with an origin")
    assert response.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("path", ["/v1/models", "/version"])
async def test_the_key_of_vllms_option_opens_the_routes(path):
    app = start(build("--api-key", "first", "second"))
    for key in ("first", "second"):
        response = await send(app, "GET", "/v1/models", authorization=f"Bearer {key}")
        assert response.status_code == 500, "there is no engine"
    for key in (KEY, "firs", "first second"):
        response = await send(app, "GET", path, authorization=f"Bearer {key}")
        assert_unauthorized(response, key)


@pytest.mark.parametrize("given", [(), ("--api-key", ""), ("--api-key", "a", "", "b")])
@pytest.mark.parametrize("variable", ["", "c"])
def test_the_keys_are_those_that_vllm_takes(given, variable):
    app = build(*given, VLLM_API_KEY=variable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", variable)
        keys = read_api_keys(app.state.args)
    theirs = [entry for entry in app.user_middleware if entry.cls is AuthenticationMiddleware]
    assert [entry.kwargs["tokens"] for entry in theirs] == ([keys] if keys else [])
    start(app)
    classes = [entry.cls for entry in app.user_middleware]
    assert AuthenticationMiddleware not in classes
    assert classes.count(ApiKeys) == bool(keys)
    # What answers is what these say.
    stack, built = app.middleware_stack, []
    while stack is not None:
        built.append(type(stack))
        stack = getattr(stack, "app", None) or getattr(stack, "_app", None)
    assert [kind for kind in built if kind in classes] == classes


def test_keys_are_looked_at_behind_the_headers_for_browsers_and_before_all_else_of_ours(app):
    classes = [entry.cls for entry in app.user_middleware]
    ours = [entry for entry in classes if entry.__module__.startswith("server.")]
    assert ours[0] is ApiKeys
    assert classes.index(CORSMiddleware) == classes.index(ApiKeys) - 1
