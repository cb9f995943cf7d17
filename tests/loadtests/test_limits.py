"""One request, or one connection, does not stop the server: it answers others meanwhile.

The front end is the real one; the limits are the defaults, except for those that would take long.
"""

import json
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import httpx
import pytest

from server.cli import EMBEDDED_NAME
from tests.loadtests.document import MOCK
from tests.programs import HANG_S
from tests.server.conftest import Server, running

# A hang. A server that is well answers within milliseconds, but the machine may stand still for
# seconds.
HEALTH_S = 20
MAX_READ_S = 2
# Room for the feature probes of two heads, eight prompts each.
MAX_QUEUED = 16
OPTIONS = (
    "--ttft=0.01",
    "--itl=0.005",
    "--max-num-seqs=4",
    f"--max-num-queued-reqs={MAX_QUEUED}",
    f"--max-read-seconds={MAX_READ_S}",
    "--disable-uvicorn-access-log",
)
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
ROUTES = {
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {"messages": [CHAT["messages"]], "max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/v1/systemone": {"state": "hi", "questions": {}},
    "/v1/completions/render": {"prompt": "hi"},
    "/inference/v1/generate": {"token_ids": [1], "sampling_params": {"max_tokens": 1}},
    "/inference/v1/abort_requests": {"request_ids": []},
    "/generative_scoring": {"query": "hi", "items": ["a"], "label_token_ids": [1, 2]},
    "/invocations": CHAT,
}
# vLLM's sanitizer takes five minutes for it.
SLASHES = "/a" * 8000
ATTACKS = [
    {"model": SLASHES},
    # As many characters as a name may have.
    {"model": SLASHES[:256]},
    {"stop": SLASHES},
    {"stop": [SLASHES]},
    {"user": SLASHES, "request_id": SLASHES},
    {"temperature": SLASHES},
    {"tool_choice": SLASHES},
    {"tools": [{"type": "function", "function": {"name": SLASHES}}]},
    {"tools": [{"type": SLASHES}]},
    {"response_format": {"type": SLASHES}},
    {"structured_outputs": {"backend": SLASHES, "regex": SLASHES}},
    {"chat_template": SLASHES, "encoding_format": SLASHES},
    {SLASHES: SLASHES},
    {"adaptive": {"head": SLASHES}},
    {"adaptive": {SLASHES: 1}},
    {"messages": [{"role": SLASHES, "content": SLASHES}]},
    {"messages": [{"role": "user", "content": [{"type": SLASHES, "text": SLASHES}]}]},
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:9{SLASHES}"}}
                ],
            }
        ]
    },
    {"input": [{"type": SLASHES}]},
    {"prompt": [SLASHES] * 2, "n": SLASHES},
    {"request_ids": [SLASHES]},
    {"stop_token_ids": [-1] * 10_000},
    {"logit_bias": {str(-number): 1 for number in range(5000)}},
    {"allowed_token_ids": [10**9] * 5000},
    {"prompt": ["a"] * 1000, "n": 1000, "max_tokens": 1},
    {"prompt": ["a"] * 1000, "messages": [CHAT["messages"]] * 1000},
    {"n": 10**6},
    {"messages": [{"role": "user", "content": ""}] * 2000},
]
SLOW_SCHEMA = {"type": "string", "pattern": "a{1,8000}" * 50}


@pytest.fixture(scope="module")
def limited(tmp_path_factory) -> Iterator[Server]:
    command = [sys.executable, "-m", "loadtests", *shlex.split(MOCK)[3:], *OPTIONS]
    with running(command, tmp_path_factory.mktemp("limits") / "log.txt") as server:
        server.wait_until_ready()
        yield server


def answers_meanwhile(server: Server, attack: Callable[[], object]) -> object:
    """What an attack comes to, while `/health` is asked again and again."""
    with ThreadPoolExecutor(1) as pool:
        attacked = pool.submit(attack)
        with httpx.Client(base_url=server.url, timeout=HEALTH_S) as http:
            while not attacked.done():
                assert http.get("/health").is_success
                time.sleep(0.02)
            assert http.get("/health").is_success
    return attacked.result()


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_keeps_others_waiting(limited, path):
    def attack() -> None:
        for fields in ATTACKS:
            body = {"model": EMBEDDED_NAME} | ROUTES[path] | fields
            assert len(json.dumps(body)) < 70_000
            response = limited.post(path, body)
            # Where it is in OpenAI's form, it is short whatever was sent.
            if response.status_code == 400:
                assert len(response.content) < 5000, fields.keys()

    answers_meanwhile(limited, attack)


def test_addresses_are_quoted_no_further(limited):
    def attack() -> None:
        for path in (f"/v1/responses/{SLASHES[:9000]}", f"/v1/models{SLASHES[:9000]}"):
            assert limited.get(path).status_code in (400, 404)

    answers_meanwhile(limited, attack)


def test_many_answers_to_one_request_are_refused(limited):
    body = {"model": EMBEDDED_NAME, "prompt": ["a"] * 1000, "n": 1000, "max_tokens": 1}
    labels = {"handler": "/v1/completions", "status": "4xx"}
    before = limited.sum_metric("http_requests_total", **labels)
    response = answers_meanwhile(limited, lambda: limited.post("/v1/completions", body))
    assert response.status_code == 400
    assert limited.sum_metric("http_requests_total", **labels) == before + 1
    assert response.json()["error"]["param"] == "prompt"
    assert "at most 256 prompts × n, got 1000000" in response.json()["error"]["message"]


def test_a_slow_grammar_is_refused_while_others_are_answered(limited):
    body = {"model": EMBEDDED_NAME, "prompt": "a", "structured_outputs": {"json": SLOW_SCHEMA}}
    response = answers_meanwhile(limited, lambda: limited.post("/v1/completions", body))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "structured_outputs"
    good = {"model": EMBEDDED_NAME, "prompt": "a", "structured_outputs": {"regex": "[ab]+"}}
    assert limited.post("/v1/completions", good).is_success


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S)


def read_answer(connection: socket.socket, *, may_be_reset: bool = False) -> tuple[int, dict]:
    """Status and error of an answer that ends with its connection.

    Args:
        may_be_reset: for a client that goes on sending after the server has closed.
    """
    answer = b""
    with suppress(ConnectionResetError) if may_be_reset else nullcontext():
        while part := connection.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    # Between the sizes of chunks, or alone.
    content = body[body.index(b"{") : body.rindex(b"}") + 1]
    return int(head.split()[1]), json.loads(content)["error"]


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("extra", [b"", b"connection: close\r\n"], ids=["kept", "closed"])
@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
def test_a_client_that_sends_all_of_a_large_body_first_reads_the_413(limited, is_declared, extra):
    size, part = 40_000_000, b"x" * 1_000_000
    with connect(limited) as connection:
        if is_declared:
            connection.sendall(HEAD + extra + b"content-length: %d\r\n\r\n" % size)
        else:
            connection.sendall(HEAD + extra + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(size // len(part)):
            connection.sendall(part if is_declared else b"%x\r\n%b\r\n" % (len(part), part))
        if not is_declared:
            connection.sendall(b"0\r\n\r\n")
        status, error = read_answer(connection)
    assert (status, error["param"], error["code"]) == (413, "body", 413)
    assert "at most 16000000 bytes" in error["message"]


def test_a_body_that_does_not_end_is_given_up(limited):
    with connect(limited) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n")
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.2):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            status, error = read_answer(connection, may_be_reset=True)
        finally:
            stop.set()
            sender.join()
    assert status == 408
    assert f"at most {MAX_READ_S}.0 seconds" in error["message"]


NOT_BEGUN = HEAD + b"content-length: 9\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/comp", HEAD, NOT_BEGUN],
    ids=["nothing", "line", "headers", "no body"],
)
def test_a_connection_on_which_nothing_more_comes_is_closed(limited, sent):
    with connect(limited) as connection:
        connection.sendall(sent)
        assert connection.recv(1000) == b""


@pytest.mark.parametrize("size", [40_000, 400_000])
@pytest.mark.parametrize("ends", [True, False], ids=["whole", "endless"])
def test_long_headers_are_refused(limited, size, ends):
    with connect(limited) as connection:
        head = b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * size
        connection.sendall(head + b"\r\nconnection: close\r\n\r\n" * ends)
        status, error = read_answer(connection)
    assert (status, error["param"]) == (431, "headers")


def test_requests_beyond_the_queue_are_told_to_come_again(limited):
    limited.wait_until_idle()
    body = {"model": EMBEDDED_NAME, "prompt": "a", "ignore_eos": True, "max_tokens": 2000}
    streams = [
        limited.connect().stream("POST", "/v1/completions", json=body | {"stream": True})
        for _ in range(MAX_QUEUED)
    ]
    for stream in streams:
        assert stream.__enter__().is_success
    try:
        response = limited.post("/v1/completions", body)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["type"] == "ServiceUnavailableError"
        assert limited.get("/health").is_success
        assert limited.post("/tokenize", {"prompt": "a"}).is_success
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    limited.wait_until_idle()
    response = limited.post("/v1/completions", body | {"n": MAX_QUEUED + 1})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
