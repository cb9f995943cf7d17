"""Every experiment that ships, in its quick form, from nothing to a table, with the real model."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_head.checkpoint import load_head
from adaptive_head.lpo.experiment import read_experiment
from adaptive_head.lpo.shards import read_shards

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FOLDER = Path(__file__).parents[2] / "experiments"
# The bound for the quick form; a run that takes longer hangs.
TIMEOUT_S = 300


def start(name: str, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "adaptive_head.cli", "run", str(FOLDER / f"{name}.yaml")]
    command += ["--quick", "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    return output


# The fifth, voting, is killed first: see below.
@pytest.mark.parametrize("name", ["constrained", "losses", "mix", "repeats"])
def test_it_runs_from_nothing_to_a_table(name: str, tmp_path: Path) -> None:
    assert_complete(name, tmp_path, finish(start(name, tmp_path)))


def assert_complete(name: str, out: Path, output: str) -> None:
    experiment = read_experiment(FOLDER / f"{name}.yaml").shrink()
    table = (out / "evaluation" / "results.md").read_text()
    results = json.loads((out / "evaluation" / "results.json").read_text())
    for head in experiment.heads:
        metadata = load_head(out / "heads" / head / "head").metadata
        assert metadata.trained
        assert metadata.training
        assert metadata.training["provenance"]["experiment"]["name"] == name
        assert head in table
        assert head in output
        assert head in json.dumps(results)
    assert "MeanShift" in table
    assert list((out / "evaluation").glob("*.png"))


def test_a_killed_run_goes_on_and_a_finished_one_does_nothing(tmp_path: Path) -> None:
    process = start("voting", tmp_path)
    deadline = time.monotonic() + TIMEOUT_S
    while not list(tmp_path.glob("rollouts/*/shard-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert_complete("voting", tmp_path, finish(start("voting", tmp_path)))
    experiment = read_experiment(FOLDER / "voting.yaml").shrink()
    num_prompts = sum(task.prompts.num_train for task in experiment.tasks.values())
    for folder in (tmp_path / "rollouts").iterdir():
        keys = [response.key for response in read_shards(folder)]
        assert len(keys) == len(set(keys)) == num_prompts * experiment.rollouts.num_responses

    def list_files() -> dict[Path, int]:
        heads = tmp_path.glob("heads/*/head/*")
        return {path: path.stat().st_mtime_ns for path in [*heads, *tmp_path.glob("rollouts/*/s*")]}

    before = list_files()
    finish(start("voting", tmp_path))
    assert list_files() == before


def test_inspect_shows_an_answer_and_writes_the_page(tmp_path: Path) -> None:
    training = (FOLDER.parent / "docs" / "training.md").read_text()
    (line,) = [line for line in training.splitlines() if line.startswith("adaptive-head inspect")]
    _, _, *arguments = shlex.split(line)
    command = [sys.executable, "-m", "adaptive_head.cli", "inspect", *arguments]
    command += ["--max-tokens", "8"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "8 tokens" in result.stdout
    page = (tmp_path / "answer.html").read_text()
    assert "lighthouse" in page
    assert "://" not in page
