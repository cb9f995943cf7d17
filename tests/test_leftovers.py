"""Whatever ends a test, nothing that it started goes on running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 120

SUITE = """
import subprocess
import time
from pathlib import Path

import psutil
import pytest

FOLDER = Path(__file__).parent
# In a session of its own, and without a parent once the shell has ended.
ORPHAN = "setsid sh -c 'echo $$ > NAME.new; mv NAME.new NAME.pid; exec sleep 1000' &"


def start(name):
    subprocess.run(["sh", "-c", ORPHAN.replace("NAME", name)], cwd=FOLDER, check=True)
    while not (pid := FOLDER / f"{name}.pid").exists():
        time.sleep(0.01)
    assert is_running(name)


@pytest.fixture(scope="module")
def server():
    start("server")


@pytest.fixture(scope="module")
def broken():
    start("broken")
    raise ValueError


def is_running(name):
    pid = int((FOLDER / f"{name}.pid").read_text())
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_test_forgets_a_process(server):
    start("forgotten")


def test_a_fixtures_process_lives_for_the_next_test(server):
    assert is_running("server") and not is_running("forgotten")


def test_a_fixture_breaks(broken):
    pass


def test_nothing_is_left_of_it():
    assert not is_running("broken")


@pytest.mark.timeout(LIMIT)
def test_a_test_hangs(server):
    child = subprocess.Popen(["sh", "-c", "sleep 1000; true"])
    (FOLDER / "child.pid").write_text(str(child.pid))
    start("hanging")
    child.wait()


def test_nothing_is_left_of_that_either():
    assert not is_running("child") and not is_running("hanging")
    assert is_running("server")
"""


def start_suite(folder: Path, limit_s: int) -> subprocess.Popen[str]:
    (folder / "test_suite.py").write_text(SUITE.replace("LIMIT", str(limit_s)))
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={folder}"]
    command += ["-p", "tests.leftovers", "-p", "no:cacheprovider", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def list_running(folder: Path) -> list[str]:
    names = {int(path.read_text()): path.stem for path in folder.glob("*.pid")}
    assert sorted(names.values()) == ["broken", "child", "forgotten", "hanging", "server"]
    states = {process.pid: process.status() for process in psutil.process_iter()}
    return [name for pid, name in names.items() if states.get(pid, "zombie") != "zombie"]


def test_a_test_that_times_out_leaves_no_process_to_the_next(tmp_path):
    output, _ = start_suite(tmp_path, limit_s=2).communicate(timeout=LIMIT_S)
    assert "1 failed, 4 passed, 1 error" in output, output
    assert "Timeout (>2.0s)" in output
    assert not list_running(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_session_that_is_interrupted_leaves_no_process(number, tmp_path):
    suite = start_suite(tmp_path, limit_s=1000)
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / "hanging.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    suite.send_signal(number)
    output, _ = suite.communicate(timeout=LIMIT_S)
    assert suite.returncode == pytest.ExitCode.INTERRUPTED, output
    assert not list_running(tmp_path)
