"""Processes end with the one that started them, without vLLM; with it: test_lifecycle.py."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.server.conftest import HANG_S, wait_until

# Starts a process that writes down its id and stays, either in its function or in its import.
PROGRAM = """
import multiprocessing, os, sys, time
from server.lifetime import end_with_parent

end_with_parent()


def stay():
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[2]).Process(target=stay).start()
elif sys.argv[3:] == ["import"]:
    stay()
"""


def start_family(folder, *arguments: str, plugins: str = "other,adaptive"):
    """A process that has started another one, and that one."""
    script, pid_file = folder / "program.py", folder / "pid"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(pid_file), *arguments]
    paths = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "VLLM_PLUGINS": plugins,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    parent = subprocess.Popen(command, env=environment)
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), seconds=HANG_S)
    return parent, psutil.Process(int(pid_file.read_text()))


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    "arguments", [["fork"], ["spawn"], ["forkserver"], ["spawn", "import"]], ids=" ".join
)
def test_a_process_ends_when_its_parent_is_killed(tmp_path, arguments):
    parent, child = start_family(tmp_path, *arguments)
    time.sleep(0.5)
    assert is_alive(child), "its parent lives"
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(child), seconds=60)


def test_processes_of_others_are_left_alone(tmp_path):
    parent, child = start_family(tmp_path, "spawn", plugins="other")
    parent.kill()
    parent.wait()
    time.sleep(2)
    assert is_alive(child)


def test_the_plugin_costs_vllms_processes_next_to_nothing():
    program = "import sys, server.lifetime as l; l.end_with_parent(); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"torch", "vllm", "pydantic", "adaptive_head"} & set(modules)
