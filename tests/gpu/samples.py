"""Checks that end in every way, for the tests of what runs checks. They import nothing large."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.gpu.worker import Skipped


def succeed(device: str, value: float = 1.0) -> dict[str, Any]:
    return {"device": device, "value": value}


def show_limit(device: str, limit_s: float) -> dict[str, Any]:
    return {"limit_s": limit_s}


def fail(device: str) -> dict[str, Any]:
    print("before the failure")
    raise AssertionError("two\nlines")


def skip(device: str) -> dict[str, Any]:
    raise Skipped("no such thing here")


def die(device: str) -> dict[str, Any]:
    print("last words", flush=True)
    os._exit(3)


def hang(device: str, pid_file: str) -> dict[str, Any]:
    child = subprocess.Popen(["sleep", "100"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(100)
    return {}


def import_vllm(device: str) -> dict[str, Any]:
    import vllm  # noqa: F401

    return {}
