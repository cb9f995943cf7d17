"""Starts and ends: the default command, several API processes, vLLM's own command, signals."""

import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from server.cli import EMBEDDED_NAME
from tests.leftovers import started
from tests.server.conftest import (
    BIN,
    ENGINE_OPTIONS,
    HANG_S,
    MODEL,
    START_TIMEOUT_S,
    begin_server,
    begun,
    make_environment,
    make_heads,
    running,
)

pytestmark = pytest.mark.engine

# What `vllm serve` runs; its console script cannot be relied on in the CPU wheel.
VLLM_SERVE = """
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adaptive_head.vllm.moved import cli_env_setup, make_arg_parser, validate_parsed_serve_args

cli_env_setup()
args = make_arg_parser(FlexibleArgumentParser()).parse_args()
validate_parsed_serve_args(args)
ServeSubcommand.cmd(args)
"""
COUNT = "adaptive_temperature_count"


def is_connected(process: psutil.Process, port: int) -> bool:
    """Whether a process holds a connection of a client's, which are kept for some seconds."""
    connections = process.net_connections("tcp")
    return any(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in connections)


def wait_until_all_answer(server, num_processes: int) -> None:
    """The first of several API processes answers for all; wait for the others."""
    deadline = time.monotonic() + START_TIMEOUT_S
    num_connected = 0
    while num_connected < num_processes:
        assert time.monotonic() < deadline, server.read_log()
        with ExitStack() as stack:
            for _ in range(12):
                stack.enter_context(server.connect()).get("/health")
            num_connected = sum(is_connected(child, server.port) for child in server.children)


def assert_ends(server, number: int) -> None:
    """Check that a signal ends the server with all its processes, and that it calls it success."""
    children = server.children
    assert len(children) >= 2
    assert server.stop(number) == 0
    _, alive = psutil.wait_procs(children, timeout=HANG_S)
    assert not alive


@pytest.fixture(scope="module", autouse=True)
def begin_both(background, model):
    """Two servers start at the same time."""
    begin_several(background, model)
    begin_without_worker(background, model)


def begin_several(background, model):
    """vLLM's own command with our options, and two API processes that share a request log."""
    settings = {
        "heads": {name: str(folder) for name, folder in make_heads(background).items()},
        "request_log": str(background.folder / "requests.jsonl"),
    }
    options = [
        "--api-server-count=2",
        "--shutdown-timeout=60",
        f"--worker-cls={WORKER_CLS}",
        f"--scheduler-cls={SCHEDULER_CLS}",
        f"--additional-config={json.dumps({'adaptive': settings})}",
    ]
    command = [sys.executable, "-c", VLLM_SERVE, str(model), *options, *ENGINE_OPTIONS]
    begin_server(background, "several", command, VLLM_PLUGINS="adaptive")


def begin_without_worker(background, model):
    entry = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*entry, "--model", str(model), *ENGINE_OPTIONS]
    environment = make_environment(VLLM_PLUGINS="adaptive")
    log = background.folder / "without worker.txt"
    background.begin("without worker", wait_for_end, command, environment, log)


def wait_for_end(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, str]:
    """The exit code of a server that does not start, and what it has written."""
    with log.open("w") as output, started(command, environment, stdout=output, stderr=output) as it:
        return it.wait(START_TIMEOUT_S), log.read_text()


@pytest.fixture(scope="module")
def several(background):
    with begun(background, "several") as server:
        wait_until_all_answer(server, 2)
        yield server


def test_several_api_processes_report_and_count_together(several):
    body = {"model": MODEL, "prompt": "Once upon", "temperature": "adaptive", "ignore_eos": True}
    with ThreadPoolExecutor(12) as pool:
        answers = [
            pool.submit(several.post, "/v1/completions", body | {"max_tokens": 3 + number})
            for number in range(12)
        ]
    choices = [future.result().json()["choices"][0] for future in answers]
    assert [choice["adaptive"]["tokens"] for choice in choices] == [*range(3, 15)]
    for _ in range(4):
        assert several.sum_metric(COUNT) == sum(range(3, 15))
        assert several.sum_metric("adaptive_requests_total") == 12
        assert several.sum_metric("adaptive_head_info") == 2


def test_several_api_processes_end_together_when_their_answers_have(several):
    body = {"model": MODEL, "prompt": "Once upon", "temperature": "adaptive", "ignore_eos": True}
    body |= {"max_tokens": 60}
    with ThreadPoolExecutor(6) as pool:
        with several.beginning(6):
            answers = [pool.submit(several.post, "/v1/completions", body) for _ in range(6)]
        assert_ends(several, signal.SIGTERM)
        for answer in answers:
            (choice,) = answer.result().json()["choices"]
            assert (choice["finish_reason"], choice["adaptive"]["tokens"]) == ("length", 60)
    lines = several.log.with_name("requests.jsonl").read_text().splitlines()
    counted = [json.loads(line)["completion_tokens"] for line in lines]
    assert sorted(counted) == [*range(3, 15), *[60] * 6]


@pytest.mark.slow
def test_the_bare_command_serves_the_embedded_model_until_interrupted_twice(tmp_path):
    command = [str(BIN / "adaptive-serve"), "--adaptive-default", "--dtype=float32"]
    with running(command, tmp_path / "log.txt", VLLM_LOGGING_LEVEL="INFO") as server:
        server.wait_until_ready()
        assert f'"adaptive", or model "{EMBEDDED_NAME}:adaptive"' in server.read_log()
        body = {"model": EMBEDDED_NAME, "prompt": "Once upon", "max_tokens": 4}
        (choice,) = server.post("/v1/completions", body).json()["choices"]
        assert choice["adaptive"]["head"] == "sequence"
        assert ask(server, "What is 37 + 58?") + 0.3 < ask(server, STORY)
        body |= {"stream": True, "max_tokens": 4000, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGINT)
            # Soon after the first, a second one passes for the same.
            time.sleep(1.5)
            assert server.process.poll() is None
            assert_ends(server, signal.SIGINT)
            *_, answer, done = lines
        assert done == "data: [DONE]"
        assert '"finish_reason":"abort"' in answer


STORY = "Write a short story about a lighthouse."


def ask(server, question: str) -> float:
    """The mean temperature of the answer to a question."""
    message = {"role": "user", "content": question}
    body = {"model": EMBEDDED_NAME, "messages": [message], "max_tokens": 8}
    (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
    return choice["adaptive"]["mean"]


def test_the_plugin_without_its_worker_says_so_and_does_not_start(background):
    code, log = background.wait("without worker")
    assert code != 0
    assert f"the adaptive plugin needs --worker-cls {WORKER_CLS}, found" in log
