"""A server that is told to stop, with the mock engine: what keeps it, and what hurries it."""

import json
import shlex
import signal
import sys
import time

import pytest

from server.cli import EMBEDDED_NAME
from tests.loadtests.document import MOCK
from tests.server.conftest import begin_server, begun

# Far more than a stop may take that waits for nothing.
GRACE_S = 1000
ENDED_S = 90


def begin_processes(background):
    for name in ("failing", "hurried"):
        options = ["--ttft=0.01", "--itl=0.05", f"--shutdown-timeout={GRACE_S}"]
        command = [sys.executable, "-m", "loadtests", *shlex.split(MOCK)[3:], *options]
        begin_server(background, f"mock {name}", command)


@pytest.fixture
def server(request, background):
    begin_processes(background)
    with begun(background, f"mock {request.param}") as server:
        yield server


@pytest.mark.parametrize("server", ["failing"], indirect=True)
def test_requests_that_cannot_be_sent_do_not_count_as_running(server):
    for num_choices in (1, 2):
        # The message to the engine has no room for it.
        body = {"model": EMBEDDED_NAME, "prompt": "Hi", "priority": 10**30, "n": num_choices}
        assert server.post("/v1/completions", body).status_code == 400
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(ENDED_S) == 0


@pytest.mark.parametrize("server", ["hurried"], indirect=True)
def test_ctrl_c_twice_ends_answers_and_server(server):
    body = {"model": EMBEDDED_NAME, "prompt": "Hi", "max_tokens": 4000, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        # As fast as a finger.
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.4)
        *_, answer, done = lines
    assert done == "data: [DONE]"
    (choice,) = json.loads(answer.removeprefix("data: "))["choices"]
    assert choice["finish_reason"] == "abort"
    assert server.process.wait(ENDED_S) == 0
