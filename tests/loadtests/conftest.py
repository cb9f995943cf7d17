import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loadtests.document import MOCK
from tests.server.conftest import Server, running

FAULTY_SERVER = "tests.loadtests.faulty_server"
FAST = ("--ttft=0.01", "--itl=0.005", "--jitter=0.5")


@pytest.fixture(scope="session")
def fault_file(tmp_path_factory) -> Path:
    """What it says is wrong with the mock server."""
    path = tmp_path_factory.mktemp("fault") / "fault.txt"
    path.write_text("")
    return path


@pytest.fixture(scope="session")
def mock_process(fault_file, tmp_path_factory) -> Iterator[Server]:
    """The document's command, faster."""
    options = [*FAST, "--disable-uvicorn-access-log", "--max-num-seqs=64"]
    arguments = shlex.split(MOCK)[3:]
    command = [sys.executable, "-m", FAULTY_SERVER, str(fault_file), *arguments, *options]
    with running(command, tmp_path_factory.mktemp("mock") / "log.txt") as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def mock(mock_process, fault_file) -> Iterator[Server]:
    """The mock server, without a fault unless the test writes one into `fault_file`."""
    yield mock_process
    fault_file.write_text("")
