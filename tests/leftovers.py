"""End the processes that a test leaves running, after the test and when the session is interrupted.

pytest-timeout fails a test but knows nothing of what the test started: servers, engines and their
ranks would run beside the tests that follow. Each process inherits, in an environment variable,
the name of the test or of the fixture that started it, and so does everything that it starts
itself, in whatever session and under whatever parent.

A test's processes end with the test. Those of a fixture of a wider scope end with the session, or
as soon as the fixture fails. What runs for several tests without such a fixture has an environment
of `of_session`, or is `started` and ends with its block.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import psutil
import pytest

VARIABLE = "TESTS_PROCESS_OWNER"
# Of a session within another one's test, ends with the name of that test.
SESSION = f"{os.environ.get(VARIABLE, '')}/{os.getpid()}"
# Python's own; one serves all tests, and it ends with this process.
SHARED = "multiprocessing.resource_tracker"
KILL_TIMEOUT_S = 30
# After so long a process has its environment: between fork and exec it may show none.
STARTED_S = 60

_numbers = count()
# Processes that were looked at before and are not of this session.
_foreign: set[int] = set()


def of_session(environment: dict[str, str]) -> dict[str, str]:
    """An environment whose processes end with the session at the latest."""
    return environment | {VARIABLE: f"{SESSION}/session"}


@contextmanager
def started(
    command: list[str], environment: dict[str, str], **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process for more tests than the one that starts it, from any thread.

    Everything that it has started ends with the block.
    """
    owner = f"{SESSION}/started-{next(_numbers)}"
    environment = environment | {VARIABLE: owner}
    with subprocess.Popen(command, env=environment, text=True, **options) as process:
        try:
            yield process
        finally:
            end_processes(owner)


def run(
    command: list[str], environment: dict[str, str], timeout: float, input: str = "", **options: Any
) -> str:
    """Run a process as `started` does, for `timeout` seconds at most; its standard output."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with started(command, environment, **pipes, **options) as process:
        output, errors = process.communicate(input, timeout)
    assert process.returncode == 0, find_cause(errors)
    return output


def find_cause(stderr: str) -> str:
    """The lines that name the error: vLLM prints the tracebacks of three processes around it."""
    lines = [line for line in stderr.splitlines() if "Error" in line]
    return "\n".join(lines[:20]) or stderr[-4000:]


def pytest_configure() -> None:
    os.environ[VARIABLE] = f"{SESSION}/session"
    # Otherwise setproctitle, which vLLM calls, writes over the environment that we read.
    os.environ["SPT_NOENV"] = "1"
    # As after Ctrl-C: fixtures are torn down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_unconfigure() -> None:
    _foreign.clear()
    end_processes(SESSION)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    owner = f"{SESSION}/{next(_numbers)}"
    before, os.environ[VARIABLE] = os.environ[VARIABLE], owner
    try:
        return (yield)
    finally:
        os.environ[VARIABLE] = before
        end_processes(owner)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Iterator[None]:
    if fixturedef.scope == "function":
        return (yield)
    owner = f"{SESSION}/{fixturedef.argname}-{next(_numbers)}"
    before, os.environ[VARIABLE] = os.environ[VARIABLE], owner
    try:
        return (yield)
    except BaseException:
        end_processes(owner)
        raise
    finally:
        os.environ[VARIABLE] = before


def end_processes(owner: str) -> None:
    """Kill all processes of an owner, those too that they start meanwhile."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while processes := find_processes(owner):
        assert time.monotonic() < deadline, f"{processes} cannot be killed"
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.01)


def find_processes(owner: str) -> list[psutil.Process]:
    """The processes of an owner that have not ended, without the one that the session shares."""
    found = []
    for pid in set(psutil.pids()) - _foreign - {os.getpid()}:
        try:
            process = psutil.Process(pid)
            if is_owned(process, owner):
                found.append(process)
            elif time.time() - process.create_time() > STARTED_S and not is_owned(process, SESSION):
                _foreign.add(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def is_owned(process: psutil.Process, owner: str) -> bool:
    try:
        value = process.environ().get(VARIABLE, "")
        return f"{value}/".startswith(f"{owner}/") and SHARED not in " ".join(process.cmdline())
    except (psutil.AccessDenied, psutil.ZombieProcess):
        return False
