"""What a key covers, on the real front end over the mock engine, and by itself."""

import asyncio
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from adaptive_head.vllm.limits import Limits
from adaptive_head.vllm.settings import ADMIN_KEY_VARIABLE
from server.admin_key import ADMIN_KEY_HEADER
from server.cli import EMBEDDED_NAME
from server.head_routes import HEADS_PATH
from server.keys import READING_METHODS, ApiKeys, list_open_paths
from server.override_routes import OVERRIDE_PATH
from tests.loadtests.document import MOCK
from tests.programs import HANG_S
from tests.server.conftest import ADMIN_KEY, Server, make_environment, running

KEY = "first second"
OPEN = list_open_paths(["/playground"], metrics=False)
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Server]:
    """The mock server, with an API key and an admin key."""
    folder = tmp_path_factory.mktemp("keys")
    command = [sys.executable, "-m", "loadtests", *shlex.split(MOCK)[3:], f"--heads-dir={folder}"]
    environment = {"VLLM_API_KEY": KEY, ADMIN_KEY_VARIABLE: ADMIN_KEY}
    with running(command, folder / "log.txt", **environment) as server:
        server.wait_until_ready()
        server.http.headers = AUTHORIZED
        yield server


def exchange(server: Server, request: str, body: bytes = b"") -> tuple[int, str]:
    """Status and body of the answer to a request that may be wrong in any way."""
    head = f"{request} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S) as connection:
        connection.sendall(head.encode() + body)
        with connection.makefile("rb") as stream:
            status = int(stream.readline().split()[1])
            headers = {}
            while line := stream.readline().decode().strip():
                name, _, value = line.lower().partition(":")
                headers[name] = value.strip()
            # No further: a client that has promised more would be waited for.
            size = 0 if request.startswith("HEAD") else int(headers.get("content-length", 0))
            content = stream.read(size).decode()
    return status, content


def test_every_documented_route_needs_the_key(guarded):
    paths = guarded.get("/openapi.json").json()["paths"]
    assert {"/invocations", "/tokenize", "/v1/chat/completions", "/version"} <= paths.keys()
    with httpx.Client(base_url=guarded.url, timeout=HANG_S) as stranger:
        for path, methods in paths.items():
            for method in methods:
                response = stranger.request(method, path, json={})
                is_open = path in OPEN and method.upper() in READING_METHODS
                assert (response.status_code == 401) == (not is_open), (method, path)


@pytest.mark.parametrize("path", ["/health", "/ping", "/playground"])
def test_a_body_needs_the_key_wherever_it_is_sent(guarded, path):
    """No stranger makes the server parse one."""
    response = httpx.post(guarded.url + path, json=[[]], timeout=HANG_S)
    assert response.status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/playground", "/playground/stream.js"])
def test_probes_and_the_page_need_no_key(guarded, path):
    assert httpx.get(guarded.url + path, timeout=HANG_S).is_success


@pytest.mark.parametrize(
    "target",
    [
        "//health",
        "/health/",
        "/health/..",
        "/./health",
        "/HEALTH",
        "/health;x",
        "/health%2f..%2fv1%2fmodels",
        "/health/../v1/models",
        "//v1/models",
        "/V1/models",
        "/v1/../metrics",
        "/playground/..%2fmetrics",
        "/playground/unknown.js",
        "/metrics/",
        "/metricsx",
        "http://127.0.0.1/v1/models",
        "http://127.0.0.1/metrics",
        "/",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "BREW"])
def test_no_spelling_and_no_method_leads_around_the_key(guarded, method, target):
    status, _ = exchange(guarded, f"{method} {target}", b"content-length: 0\r\n\r\n")
    # 400: it is no request.
    assert status in (400, 401), status


def test_a_question_mark_does_not_close_an_open_path(guarded):
    assert exchange(guarded, "GET /health?verbose=1", b"\r\n")[0] == 200


def test_the_official_client_knows_what_is_wrong(guarded):
    def list_models(key):
        with OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as client:
            return [model.id for model in client.models.list()]

    assert EMBEDDED_NAME in list_models(KEY)
    with pytest.raises(AuthenticationError, match="wrong API key") as caught:
        list_models("first")
    assert caught.value.body["type"] == "AuthenticationError"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"


def test_the_key_serves_what_it_served_before(guarded):
    body = {"model": EMBEDDED_NAME, "prompt": "Hi", "max_tokens": 1}
    for path in ("/v1/completions", "/invocations"):
        assert guarded.post(path, body).is_success
    assert guarded.post("/v1/completions", body | {"temperature": "adaptive"}).is_success
    assert guarded.get("/metrics").is_success and guarded.get(HEADS_PATH).is_success


def test_refused_requests_are_counted(guarded):
    name = "adaptive_unauthorized_requests_total"
    before = guarded.sum_metric(name)
    assert httpx.get(f"{guarded.url}/version", timeout=HANG_S).status_code == 401
    assert guarded.sum_metric(name) == before + 1


def test_a_websocket_is_refused_before_it_is_one(guarded):
    upgrade = (
        b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    status, content = exchange(guarded, "GET /v1/realtime", upgrade)
    assert status == 401 and '{"error": {' in content


def test_keys_are_looked_at_before_the_body_is_read(guarded):
    """None of the body is sent, so nobody can have waited for it."""
    promise = b"content-type: application/json\r\ncontent-length: 1000000\r\n"
    status, content = exchange(guarded, "POST /invocations", promise + b"\r\n")
    assert status == 401 and "error" in json.loads(content)
    promise += f"authorization: Bearer {KEY}\r\n{ADMIN_KEY_HEADER}: wrong\r\n\r\n".encode()
    status, content = exchange(guarded, f"POST {HEADS_PATH}", promise)
    assert status == 401 and ADMIN_KEY_HEADER in json.loads(content)["error"]["message"]


def test_a_client_that_sends_all_of_its_body_first_reads_the_refusal(guarded):
    size = 20_000_000
    promise = f"content-type: application/json\r\ncontent-length: {size}\r\n\r\n".encode()
    status, content = exchange(guarded, "POST /invocations", promise + b"x" * size)
    assert status == 401 and "error" in json.loads(content)


def test_a_server_with_both_keys_wants_both(guarded):
    def switch_off(**headers):
        return httpx.delete(guarded.url + OVERRIDE_PATH, headers=headers, timeout=HANG_S)

    admin = {ADMIN_KEY_HEADER: ADMIN_KEY}
    assert switch_off(**AUTHORIZED, **admin).is_success
    for headers in ({}, AUTHORIZED, admin, AUTHORIZED | {ADMIN_KEY_HEADER: KEY}):
        assert switch_off(**headers).status_code == 401
    by_admin_key = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert switch_off(**by_admin_key, **admin).status_code == 401


@pytest.mark.parametrize("key", [KEY, "wrong", ""])
def test_a_load_test_takes_the_key_from_the_environment(guarded, key):
    command = [sys.executable, "-m", "loadtests", "run", "--url", guarded.url, "--scenario=smoke"]
    done = subprocess.run(
        [*command, "--duration=2"],
        env=make_environment(VLLM_API_KEY=key),
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    if key == KEY:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert "wants an API key" in done.stderr and "VLLM_API_KEY" in done.stderr


@pytest.fixture
def ask():
    """Ask for a path, with these headers; True where the application got the request."""

    async def run(path="/v1/models", headers=(), keys=(KEY, "other"), root_path=""):
        reached, sent = [], []

        async def app(scope, receive, send):
            reached.append(scope)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        metrics = SimpleNamespace(count_unauthorized=lambda: None)
        state = SimpleNamespace(state=SimpleNamespace(adaptive=SimpleNamespace(metrics=metrics)))
        scope = {"type": "http", "method": "GET", "path": path, "root_path": root_path}
        scope |= {"headers": list(headers), "app": state}
        await ApiKeys(app, keys, OPEN, Limits())(scope, receive, send)
        assert bool(reached) != bool(sent)
        return bool(reached)

    return run


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bEARER {KEY}", "Bearer other"])
async def test_any_of_the_keys_will_do(ask, value):
    assert await ask(headers=[(b"authorization", value.encode())])


@pytest.mark.parametrize(
    "value",
    [
        "",
        KEY,
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        f"Bearer  {KEY}",
        f"Bearer {KEY} ",
        f"Bearer {KEY}other",
        f"Bearer {KEY.upper()}",
        "Bearer first",
        "Bearer \x80",
    ],
)
async def test_nothing_else_will(ask, value):
    assert not await ask(headers=[(b"authorization", value.encode("latin-1"))])
    assert not await ask(headers=[(b"authorization", b"Bearer no"), (b"authorization", b"other")])


async def test_a_key_beyond_ascii_is_sent_as_http_has_it(ask):
    header = (b"authorization", "Bearer schlüssel".encode("latin-1"))
    assert await ask(headers=[header], keys=["schlüssel"])


async def test_the_prefix_of_a_proxy_is_not_part_of_a_path(ask):
    assert await ask("/prefix/health", root_path="/prefix")
    assert await ask("/health", root_path="/prefix")
    # As the router, which looks for a path that ends in the slash.
    assert await ask("/health", root_path="/")
    for path in ("/prefix/v1/models", "/prefixhealth", "/prefix/prefix/health", "/prefix"):
        assert not await ask(path, root_path="/prefix")


async def test_what_is_no_request_passes():
    async def app(scope, receive, send):
        return scope["type"]

    scope = {"type": "lifespan"}
    async with asyncio.timeout(HANG_S):
        assert await ApiKeys(app, [KEY], OPEN, Limits())(scope, None, None) == "lifespan"
