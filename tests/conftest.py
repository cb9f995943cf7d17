"""Triton's kernels run as Python in the process of the tests; reports name vLLM's version.

Triton decides so when it is first imported, and when a kernel is defined. The processes that tests
start may have a device, and decide for themselves.
"""

import gc
import os
import runpy
import signal
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"
import triton.experimental.gluon  # noqa: F401

import adaptive_head.vllm.kernels  # noqa: F401
import tests.engine.interpreted_triton.quick_patching  # noqa: F401

del os.environ["TRITON_INTERPRET"]

# A shell without job control ignores it in what it starts in the background, and programs that the
# tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.leftovers", "tests.background"]


@cache
def find_vllm_version() -> str:
    """Return the version of the vLLM on the path, without importing it, which takes seconds."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return "not installed"
    return runpy.run_path(str(Path(spec.origin).with_name("_version.py")))["version"]


def pytest_addoption(parser):
    parser.addoption("--minor", help="the vLLM to test, such as 0.33; another one is an error")


def pytest_configure(config):
    minor, version = config.getoption("--minor"), find_vllm_version()
    if minor is not None and not version.startswith(f"{minor}."):
        raise pytest.UsageError(f"--minor={minor}, but the vLLM on the path is {version}")


def pytest_collection_finish():
    """What the imports have made stays. To look through it again and again takes minutes."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    # Libraries say at the end of the process what was left to them.
    gc.unfreeze()


def pytest_report_header():
    return f"vLLM: {find_vllm_version()}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    if report.failed:
        report.sections.append(("vLLM", find_vllm_version()))
    return report


def pytest_terminal_summary(terminalreporter, exitstatus):
    if exitstatus:
        terminalreporter.write_line(f"on vLLM {find_vllm_version()}")
