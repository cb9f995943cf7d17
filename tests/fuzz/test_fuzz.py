"""Whatever comes, the server answers it, and others meanwhile: no 5xx, no cut stream, no stall.

The front end is the real one; the engine is the mock one.
"""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from server.cli import EMBEDDED_NAME
from tests.fuzz.documented import ask_documented, list_fields
from tests.fuzz.hostile import BODIES, hostile_cases
from tests.fuzz.sending import Case, Watch, send
from tests.loadtests.document import MOCK
from tests.server.conftest import Server, running

# With short contexts, an answer of any length is over at once.
OPTIONS = (
    "--ttft=0",
    "--itl=0",
    "--max-model-len=256",
    "--max-num-seqs=64",
    "--max-choices=16",
    "--enable-scale-out",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--disable-uvicorn-access-log",
)
SEED = 14
MAX_SHOWN = 10


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Iterator[Server]:
    command = [sys.executable, "-m", "loadtests", *shlex.split(MOCK)[3:], *OPTIONS]
    environment = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    log = tmp_path_factory.mktemp("fuzz") / "log.txt"
    with running(command, log, **environment) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def document(fuzzed) -> dict[str, Any]:
    return fuzzed.get("/openapi.json").json()


def fuzz(server: Server, ask_all: Callable[[Callable[[Case], None]], None]) -> None:
    """Send requests, one after the other; fails with the first few that were answered wrongly.

    Prints what `pytest -s` shows: how many there were, and how long `/health` took at most.
    """
    findings: dict[str, Case] = {}
    num_asked = 0
    start = time.perf_counter()
    with Watch(server.port) as watch, server.connect() as http:

        def ask(case: Case) -> None:
            nonlocal num_asked
            assert watch.failure is None, f"/health: {watch.failure}, before {case}"
            num_asked += 1
            if finding := send(http, case):
                findings.setdefault(f"{case.path.partition('?')[0]} {finding[:120]}", case)

        ask_all(ask)
    seconds = time.perf_counter() - start
    print(f"\n{num_asked} requests in {seconds:.0f} s, /health at most {watch.longest_s:.3f} s")
    shown = [f"{finding}\n  {case}" for finding, case in [*findings.items()][:MAX_SHOWN]]
    assert not findings, "\n".join([f"{len(findings)} kinds of wrong answers:", *shown])
    assert watch.failure is None
    # Nothing is left in the engine, and nothing else was broken.
    server.wait_until_idle()
    body = {"model": EMBEDDED_NAME, "prompt": "Hi", "temperature": "adaptive", "max_tokens": 3}
    assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("num_examples", "has_all"),
    [(4, False), pytest.param(30, True, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_documented_requests(fuzzed, document, num_examples, has_all):
    def ask_all(ask: Callable[[Case], None]) -> None:
        ask_documented(document, num_examples, SEED, ask, has_all=has_all)

    fuzz(fuzzed, ask_all)


@pytest.mark.parametrize(
    "num_cases", [2000, pytest.param(40_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_hostile_requests(fuzzed, document, num_cases):
    fields = {path: list_fields(document, path) for path in BODIES}

    def ask_all(ask: Callable[[Case], None]) -> None:
        for case in hostile_cases(Random(SEED), EMBEDDED_NAME, fields, num_cases):
            ask(case)

    fuzz(fuzzed, ask_all)
