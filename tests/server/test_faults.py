"""What goes wrong around a server: clients that leave, signals, an engine that dies.

One server, with request log and tracing, is watched through all of it until it is told to stop.
"""

import asyncio
import json
import random
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import psutil
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.server.collector import ENVIRONMENT, collecting, read_attributes
from tests.server.conftest import BIN, ENGINE_OPTIONS, HANG_S, MODEL, running, wait_until

pytestmark = pytest.mark.engine

COUNT = "adaptive_temperature_count"
GRACE_S = 20
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
BODIES = {
    "/v1/completions": {"prompt": "Once upon"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Tell a story."}]},
    "/v1/responses": {"input": "Tell a story."},
}


def make_body(path="/v1/completions", max_tokens=8, **fields) -> dict:
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {"model": MODEL, limit: max_tokens, "ignore_eos": True, "temperature": "adaptive"}
    return body | BODIES[path] | fields


@pytest.fixture(scope="module")
def site(model, heads, tmp_path_factory):
    """A server, the file of its request log, and the receiver of its traces."""
    folder = tmp_path_factory.mktemp("faults")
    log = folder / "requests.jsonl"
    with collecting() as collector:
        options = [
            *(f"--head={name}={head}" for name, head in heads.items()),
            f"--request-log={log}",
            f"--otlp-traces-endpoint={collector.endpoint}",
            f"--shutdown-timeout={GRACE_S}",
        ]
        command = [str(BIN / "adaptive-serve"), str(model), *options, *ENGINE_OPTIONS]
        with running(command, folder / "log.txt", **ENVIRONMENT) as server:
            server.wait_until_ready()
            yield SimpleNamespace(server=server, log=log, collector=collector)


def read_lines(site, event="request") -> list[dict]:
    lines = [json.loads(line) for line in site.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def wait_for_line(site, request_id: str) -> dict:
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        for line in read_lines(site):
            if (line["request_id"] or "").endswith(request_id):
                return line
        time.sleep(0.05)
    raise AssertionError(f"no line for {request_id}")


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "streaming"])
@pytest.mark.parametrize("path", BODIES)
def test_a_request_is_logged_and_traced(site, path, stream):
    name = f"{path.split('/')[2]}-{stream}"
    headers = {
        "x-request-id": name,
        "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01",
        "content-type": "application/json",
    }
    body = make_body(path, adaptive={"head": "tok"}, seed=1, stream=stream)
    # A response's identifier is its own, whatever the header says.
    body |= {"request_id": f"resp_{name}"} if path == "/v1/responses" else {}
    response = site.server.http.post(path, json=body, headers=headers)
    assert response.is_success, response.text
    line = wait_for_line(site, name)
    assert line["duration_ms"] >= line["ttft_ms"] > 0
    assert line["prompt_tokens"] > 0
    adaptive = line["adaptive"]
    assert 0 <= adaptive["min"] <= adaptive["mean"] <= adaptive["max"] <= 1.3
    expected = {
        "level": "info",
        "status": 200,
        "path": path,
        "model": MODEL,
        "stream": stream,
        "completion_tokens": 8,
        "finish_reasons": ["length"],
        "aborted": False,
        "trace_id": TRACE_ID,
    }
    assert {key: line[key] for key in expected} == expected
    assert "story" not in json.dumps(line) and "Once" not in json.dumps(line)

    operation = "text_completion" if path == "/v1/completions" else "chat"
    ours = site.collector.wait_for(f"{operation} {MODEL}", gen_ai__response__id=line["request_id"])
    assert (ours.trace_id.hex(), ours.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    attributes = read_attributes(ours)
    assert attributes["gen_ai.usage.output_tokens"] == 8
    assert attributes["gen_ai.usage.input_tokens"] == line["prompt_tokens"]
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["adaptive.head"] == "tok"
    assert attributes["adaptive.temperature.mean"] == adaptive["mean"]
    (engines,) = wait_for_children(site, ours)
    assert engines.name == "llm_request"
    assert engines.trace_id == ours.trace_id
    assert read_attributes(engines)["gen_ai.usage.completion_tokens"] == 8


def wait_for_children(site, parent) -> list:
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        spans = [s for s in list(site.collector.spans) if s.parent_span_id == parent.span_id]
        if spans:
            return spans
        time.sleep(0.05)
    return []


def test_what_the_caller_does_not_sample_is_logged_and_not_traced(site):
    trace_id = "1" * 32
    headers = {"x-request-id": "unsampled", "traceparent": f"00-{trace_id}-{PARENT_ID}-00"}
    site.server.http.post("/v1/completions", json=make_body(), headers=headers)
    assert wait_for_line(site, "unsampled")["trace_id"] == trace_id
    site.server.http.post("/v1/completions", json=make_body(), headers={"x-request-id": "after"})
    site.collector.wait_for(f"text_completion {MODEL}", gen_ai__response__id="cmpl-after")
    assert trace_id not in {span.trace_id.hex() for span in site.collector.spans}


def test_refusals_and_ordinary_requests_are_logged_and_traced(site):
    def post(name, **fields):
        body, headers = make_body(**fields), {"x-request-id": name}
        return site.server.http.post("/v1/completions", json=body, headers=headers)

    assert post("ordinary", temperature=0.7).is_success
    assert post("wrong", adaptive={"level": "word"}).status_code == 400
    assert post("unknown", model="m" * 250).status_code == 404
    ordinary, wrong, unknown = (wait_for_line(site, n) for n in ("ordinary", "wrong", "unknown"))
    assert "adaptive" not in ordinary and ordinary["completion_tokens"] == 8
    assert wrong["error"] == {"type": "BadRequestError", "param": "adaptive.level"}
    assert (unknown["status"], unknown["model"]) == (404, "m" * 200)
    span = site.collector.wait_for("text_completion", http__response__status_code=400)
    assert span.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "streaming"])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_ends_its_request_and_what_it_cost_is_counted(site, path, stream):
    server, name = site.server, f"left-{path.split('/')[2]}-{stream}"
    before = server.sum_metric(COUNT), server.sum_metric("vllm:generation_tokens_total")
    num_lines = len(read_lines(site))
    with server.connect() as connection, ThreadPoolExecutor(1) as pool:
        body = make_body(path, max_tokens=1500, stream=stream)
        connection.timeout = 120 if stream else 1.5
        if stream:
            with connection.stream("POST", path, json=body) as response:
                lines = (line for line in response.iter_lines() if line.startswith("data:"))
                for _ in range(5):
                    next(lines)
        else:
            asked = pool.submit(connection.post, path, json=body, headers={"x-request-id": name})
            assert isinstance(asked.exception(), httpx.ReadTimeout)
    server.wait_until_idle()
    wait_until(lambda: len(read_lines(site)) > num_lines)
    (line,) = read_lines(site)[num_lines:]
    assert line["aborted"] and line["level"] == "info"
    assert line["status"] == (200 if stream else None)
    rise = server.sum_metric(COUNT) - before[0]
    assert rise == line["completion_tokens"]
    # Between what the client has received, which is nothing of a whole answer, and what was made.
    assert stream <= rise <= server.sum_metric("vllm:generation_tokens_total") - before[1] < 1500


def test_requests_of_one_name_are_aborted_one_at_a_time(site):
    headers = {"x-request-id": "twins"}
    with ThreadPoolExecutor(2) as pool, site.server.connect() as leaving:
        leaving.timeout = 1.0
        stays = pool.submit(
            site.server.http.post, "/v1/completions", json=make_body(max_tokens=80), headers=headers
        )
        leaves = pool.submit(
            leaving.post, "/v1/completions", json=make_body(max_tokens=1500), headers=headers
        )
        assert isinstance(leaves.exception(), httpx.ReadTimeout)
        assert stays.result().json()["usage"]["completion_tokens"] == 80
    site.server.wait_until_idle()


def connect_slowly(server, body: dict) -> socket.socket:
    """Send a request for a stream, and read nothing of it."""
    content = json.dumps(body | {"stream": True}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + content)
    return connection


def test_a_slow_reader_gets_everything_and_holds_up_nobody(site):
    server = site.server
    before = server.sum_metric(COUNT)
    body = make_body(max_tokens=60, n=4, logprobs=20, adaptive={"report": "tokens"})
    with connect_slowly(server, body) as connection:
        wait_until(lambda: server.sum_metric(COUNT) > before)
        server.wait_until_idle()
        assert server.post("/v1/completions", make_body()).is_success
        received = b""
        while b"data: [DONE]" not in received:
            received += connection.recv(1 << 16)
    chunks = [
        json.loads(line[len(b"data: ") :])
        for line in received.split(b"\n")
        if line.startswith(b"data: {")
    ]
    temperatures = [
        value
        for chunk in chunks
        for choice in chunk["choices"]
        for value in choice["adaptive"].get("temperatures", ())
    ]
    assert len(temperatures) == 4 * 60
    assert server.sum_metric(COUNT) - before == 4 * 60 + 8


@pytest.mark.slow
def test_a_crowd_that_comes_and_goes_leaves_nothing_behind_and_is_counted_right(site):
    server, draw = site.server, random.Random(0)
    before, num_lines = server.sum_metric(COUNT), len(read_lines(site))

    async def ask(client, number) -> str:
        path = draw.choice([*BODIES])
        temperature = draw.choice(["adaptive", 0.7])
        body = make_body(
            path, draw.randint(1, 12), temperature=temperature, stream=draw.random() < 0.5
        )
        patience = draw.choice([0.3, 2.0, HANG_S, HANG_S, HANG_S])
        try:
            response = await asyncio.wait_for(client.post(path, json=body), patience)
            return str(response.status_code)
        except TimeoutError:
            return "left"

    async def leave(client) -> str:
        """Leave in the middle of an answer."""
        body = make_body(max_tokens=1000, stream=True)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                return "left"
        return "ended"

    async def crowd() -> Counter:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=HANG_S, limits=limits) as client:
            crowd = [ask(client, number) for number in range(197)]
            crowd += [leave(client) for _ in range(3)]
            return Counter(await asyncio.gather(*crowd))

    results = asyncio.run(crowd())
    assert results.keys() == {"200", "left"}, results
    assert results["200"] > 50 and results["left"] > 10
    server.wait_until_idle()
    time.sleep(1)
    lines = read_lines(site)[num_lines:]
    # Some left when their answer was on its way, and some before they were heard at all.
    complete = [line for line in lines if line["status"] == 200 and not line["aborted"]]
    assert results["200"] <= len(complete) <= len(lines) <= 200
    assert any(line["aborted"] for line in lines)
    tokens = sum(line["completion_tokens"] for line in lines if "adaptive" in line)
    assert server.sum_metric(COUNT) - before == tokens
    assert server.sum_metric("adaptive_request_log_lost_total") == 0
    assert server.post("/v1/completions", make_body()).is_success


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"[" * 5_000_000, "application/json"),
        (b'{"model": "smol", "prompt": "\xff\xfe"}', "application/json"),
        (b'{"model": "smol", "prompt": "hi", "max_tokens": 1}', "text/plain"),
        (b"model=smol&prompt=hi", "application/x-www-form-urlencoded"),
        (b'{"model": "smol", "prompt": "' + b"x" * 100_000_000 + b'"}', "application/json"),
    ],
    ids=["nested", "utf-8", "text", "form", "huge"],
)
def test_a_wrong_body_is_refused_and_the_server_goes_on(site, content, content_type):
    headers = {"content-type": content_type}
    response = site.server.http.post("/v1/completions", content=content, headers=headers)
    assert 400 <= response.status_code < 500
    assert len(response.content) < 2000
    assert site.server.post("/v1/completions", make_body()).is_success


def test_a_server_that_is_told_to_stop_lets_answers_end_and_takes_no_new_ones(site):
    server = site.server
    children = server.children
    # How a reader whose buffers are full is left: test_shutdown.py.
    slow_body = make_body(max_tokens=1900, n=8, logprobs=20)
    with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
        chat = "/v1/chat/completions"
        with server.beginning(2):
            long = pool.submit(stream, server, chat, make_body(chat, max_tokens=1900))
            stack.enter_context(connect_slowly(server, slow_body))
        body = make_body(max_tokens=10)
        with server.beginning(2):
            short = pool.submit(stream, server, "/v1/completions", body)
            whole = pool.submit(server.post, "/v1/completions", body)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/health").status_code == 503)
        refused = server.post("/v1/completions", make_body())
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert short.result()[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in short.result()[-2]
        assert whole.result().json()["usage"]["completion_tokens"] == 10
        assert server.process.wait(GRACE_S + HANG_S) == 0
        assert long.result()[-1] == "data: [DONE]"
        assert '"finish_reason":"abort"' in long.result()[-2]
    _, alive = psutil.wait_procs(children, timeout=HANG_S)
    assert not alive
    assert sorted(line["status"] for line in read_lines(site)[-5:]) == [200] * 4 + [503]


def stream(server, path: str, body: dict) -> list[str]:
    """The lines of a stream, to its end."""
    body = body | {"stream": True}
    with server.connect() as connection, connection.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        return [line for line in response.iter_lines() if line]


def test_an_engine_that_dies_ends_its_streams_and_the_server(ending_server):
    server = ending_server
    with ThreadPoolExecutor(4) as pool:
        with server.beginning(3):
            open_streams = [
                pool.submit(stream, server, path, make_body(path, max_tokens=1500))
                for path in BODIES
            ]
        (worker,) = [child for child in server.children if "Worker" in child.name()]
        worker.kill()
        ends = ["".join(future.result()[-3:]) for future in open_streams]
    completion, chat, response = ends
    assert "InternalServerError" in completion and completion.endswith("data: [DONE]")
    assert "InternalServerError" in chat and chat.endswith("data: [DONE]")
    assert "event: error" in response and "EngineDeadError" in response
    assert server.process.wait(HANG_S) == 1
    _, alive = psutil.wait_procs(server.children, timeout=HANG_S)
    assert not alive
    assert "adaptive-serve: the engine died" in server.read_log()
