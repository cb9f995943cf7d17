"""The mock server of these tests: with the flags for tools, and a head of an awkward name."""

import sys
from collections.abc import Iterator

import pytest

from adaptive_head.heads import SHIPPED_HEADS
from tests.server.conftest import Server, running

FAST = ("--ttft=0", "--itl=0", "--disable-uvicorn-access-log")
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")
AWKWARD = "fröhlich 50%"


@pytest.fixture(scope="session")
def mock(tmp_path_factory) -> Iterator[Server]:
    heads = {"sequence": SHIPPED_HEADS["sequence"], AWKWARD: SHIPPED_HEADS["token"]}
    options = [*FAST, *TOOLS, *(f"--head={name}={folder}" for name, folder in heads.items())]
    command = [sys.executable, "-m", "loadtests", "mock-server", *options]
    with running(command, tmp_path_factory.mktemp("clients") / "log.txt") as server:
        server.wait_until_ready()
        yield server
