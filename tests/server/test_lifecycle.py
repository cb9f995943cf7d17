"""Signals at every stage of a server's start and life: it ends, and so does all it has started."""

import os
import signal
import time

import psutil
import pytest

from tests.engine.tiny_model import make_tiny_model
from tests.leftovers import VARIABLE, find_processes
from tests.server.conftest import BIN, START_TIMEOUT_S, running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2 * START_TIMEOUT_S)]

OPTIONS = (
    "--skip-tokenizer-init",
    "--dtype=float32",
    "--max-model-len=256",
    "--max-num-seqs=16",
    "--block-size=32",
    f"--kv-cache-memory-bytes={1 << 26}",
    "--no-verify-base",
    # For what is running; a start and an idle server are not to wait for it.
    "--shutdown-timeout=1000",
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ENDED_S = 60
# A process of that name exists, or all are ready.
STAGES = ("started", "EngineCore", "Worker", "ready")


@pytest.fixture
def start(tmp_path):
    """Starts a server with a tiny model."""
    model = make_tiny_model(tmp_path / "tiny")

    def run(*options):
        command = [str(BIN / "adaptive-serve"), str(model), *OPTIONS, *options]
        return running(command, tmp_path / "log.txt", **ENVIRONMENT)

    return run


def wait_for_stage(server, stage: str) -> None:
    if stage == "ready":
        return server.wait_until_ready()
    deadline = time.monotonic() + START_TIMEOUT_S
    while not has_come_to(server, stage):
        assert server.process.poll() is None and time.monotonic() < deadline, server.read_log()
        time.sleep(0.05)


def has_come_to(server, stage: str) -> bool:
    children = psutil.Process(server.process.pid).children(recursive=True)
    try:
        return bool(children) and (
            stage == "started" or any(stage in child.name() for child in children)
        )
    except psutil.NoSuchProcess:
        return False


def assert_ends(server, number: int, process=None) -> int:
    """Send a signal to one of a server's processes; its exit code, once all are gone.

    Args:
        process: the API process without one.
    """
    (process or server.process).send_signal(number)
    code = server.process.wait(ENDED_S)
    deadline = time.monotonic() + ENDED_S
    while left := find_processes(os.environ[VARIABLE]):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return code


def test_nothing_outlives_an_api_process_that_is_killed(start):
    with start() as server:
        wait_for_stage(server, "ready")
        assert assert_ends(server, signal.SIGKILL) == -signal.SIGKILL


def test_sigterm_ends_a_start_while_the_model_loads(start):
    with start() as server:
        wait_for_stage(server, "Worker")
        assert assert_ends(server, signal.SIGTERM) == 143


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EngineCore", "Worker"])
def test_a_server_ends_with_a_process_of_its_engine(start, name):
    with start() as server:
        wait_for_stage(server, "ready")
        (process,) = [child for child in server.children if name in child.name()]
        assert assert_ends(server, signal.SIGKILL, process) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", [(), ("--data-parallel-size=2",)], ids=["one", "several"])
def test_nothing_is_left_at_any_stage(start, options, number, stage):
    with start(*options) as server:
        wait_for_stage(server, stage)
        code = assert_ends(server, number)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    elif stage == "ready" or options:
        assert code == 0
    else:
        assert code == 128 + number
