"""The load tests against the real server: a short run, a comparison, and vLLM's own benchmark."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from server.cli import EMBEDDED_NAME
from tests.loadtests.document import BENCH
from tests.server.conftest import MODEL

pytestmark = pytest.mark.engine

LOADTESTS = [sys.executable, "-m", "loadtests"]


def run(*arguments) -> subprocess.CompletedProcess[str]:
    command = [*LOADTESTS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_smoke_scenario_goes_through(server):
    finished = run("run", "--url", server.url, "--scenario", "smoke", "--duration", 12)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for kind in ("batch", "chat", "leaving", "long_prompt"):
        assert re.search(rf"^request +{kind}, ", finished.stderr, re.MULTILINE)
    assert "Tokens: adaptive_temperature_count rose by" in finished.stderr


@pytest.mark.slow
def test_adaptive_and_fixed_are_compared(server, tmp_path):
    finished = run(
        *("compare", "--url", server.url, "--scenario", "saturation", "--scale", 0.06),
        *("--pairs", 1, "--requests", 1, "--out", tmp_path),
    )
    assert finished.returncode == 0, finished.stderr
    saved = json.loads((tmp_path / "measurements.json").read_text())
    assert saved["model"] == MODEL
    assert not saved["wrong_tokens"]
    assert "tok" in (tmp_path / "report.html").read_text()


def test_vllms_benchmark_counts_the_tokens_that_the_server_counts(server, model, tmp_path):
    """The document's command, smaller."""
    # One head's: the series of heads that other tests have removed leave after a while.
    before = server.sum_metric("adaptive_temperature_count", head="tok")
    changes = {
        "\\\n": " ",
        "http://127.0.0.1:8000": server.url,
        EMBEDDED_NAME: MODEL,
        "$(python -m adaptive_head.embedded_model)": str(model),
        "-input-len 64": "-input-len 16",
        "-output-len 32": "-output-len 8",
        "--num-prompts 20": "--num-prompts 3",
    }
    command = BENCH
    for old, new in changes.items():
        assert old in command
        command = command.replace(old, new)
    finished = run(
        *shlex.split(command)[3:],
        *("--ready-check-timeout-sec", 0, "--ignore-eos"),
        *("--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (3, 0, 24)
    assert server.sum_metric("adaptive_temperature_count", head="tok") - before == 24
