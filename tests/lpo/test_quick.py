"""Every experiment that ships, in its quick form, from nothing to a table, with the real model.

One is run as its user would, and killed on its way. Others follow one another in one process, which
imports vLLM once: this file as a script. `make test` runs the shortest.
"""

import json
import shlex
import sys
import time
import traceback
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from adaptive_head import cli
from adaptive_head.checkpoint import load_head
from adaptive_head.lpo.experiment import read_experiment
from adaptive_head.lpo.shards import read_shards
from tests.background import HANG_S, WAIT_S
from tests.engine.engines import make_environment, run_module
from tests.leftovers import run, started

pytestmark = [pytest.mark.engine, pytest.mark.timeout(WAIT_S)]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
KILLED = "voting"
SHORTEST = "repeats"
# What shares a process.
SLOW_NAMES = ("constrained", "losses", "mix")


def begin_processes(background):
    begin_group(background, (SHORTEST,))


def begin_slow_processes(background):
    begin_group(background, SLOW_NAMES)
    environment, folder = make_environment("v1"), background.folder
    background.begin("killed", kill_and_finish, folder / KILLED, environment)
    background.begin("inspect", inspect, folder, environment)


def begin_group(background, names: tuple[str, ...]) -> None:
    environment, folder = make_environment("v1"), background.folder
    scenario = {"names": names, "folder": str(folder)}
    background.begin(names, run_module, "tests.lpo.test_quick", environment, scenario, folder)


def kill_and_finish(folder: Path, environment: dict[str, str]) -> dict:
    """Kill a run, run it to its end and once more.

    Returns:
        What the finished run said, how many responses the killed one had written, and when files
        were written, before and after the last run.
    """
    program = [sys.executable, "-m", "adaptive_head.cli"]
    command = [*program, "run", str(FOLDER / f"{KILLED}.yaml"), "--quick", "--out", str(folder)]
    deadline = time.monotonic() + HANG_S
    with started(command, environment) as process:
        while not count_lines(folder):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    num_written = count_lines(folder)
    output = run(command, environment, HANG_S)
    before = list_files(folder)
    run(command, environment, HANG_S)
    after = list_files(folder)
    return {"output": output, "num_written": num_written, "before": before, "after": after}


def count_lines(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("rollouts/*/shard-*"))


def list_files(folder: Path) -> dict[Path, int]:
    paths = [*folder.glob("heads/*/head/*"), *folder.glob("rollouts/*/s*")]
    return {path: path.stat().st_mtime_ns for path in paths}


def inspect(folder: Path, environment: dict[str, str]) -> str:
    training = (ROOT / "docs" / "training.md").read_text()
    (line,) = [line for line in training.splitlines() if line.startswith("adaptive-head inspect")]
    _, *arguments = shlex.split(line)
    command = [sys.executable, "-m", "adaptive_head.cli", *arguments, "--max-tokens", "8"]
    return run(command, environment | {"PYTHONPATH": str(ROOT)}, HANG_S, cwd=folder)


@pytest.fixture(scope="module")
def begun(background):
    begin_slow_processes(background)


def test_the_shortest_runs_from_nothing_to_a_table(background):
    begin_processes(background)
    assert_run(SHORTEST, background.wait((SHORTEST,)), background.folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_NAMES)
def test_it_runs_from_nothing_to_a_table(name, background, begun):
    assert_run(name, background.wait(SLOW_NAMES), background.folder)


def assert_run(name: str, results: dict[str, dict], folder: Path) -> None:
    result = results[name]
    assert result["error"] is None, result["error"]
    assert_complete(name, folder / name, result["output"])


def assert_complete(name: str, out: Path, output: str) -> None:
    experiment = read_experiment(FOLDER / f"{name}.yaml").shrink()
    table = (out / "evaluation" / "results.md").read_text()
    results = json.loads((out / "evaluation" / "results.json").read_text())
    for head in experiment.heads:
        metadata = load_head(out / "heads" / head / "head").metadata
        assert metadata.training
        assert metadata.trained == (metadata.training["best_epoch"] > 0)
        assert metadata.training["provenance"]["experiment"]["name"] == name
        assert head in table
        assert head in output
        assert head in json.dumps(results)
        trained = results["heads"][head]["trained"]
        assert (trained[0], len(trained)) == (metadata.trained, experiment.num_training_seeds)
    assert "MeanShift" in table
    assert list((out / "evaluation").glob("*.png"))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_finished_one_does_nothing(background, begun):
    result, out = background.wait("killed"), background.folder / KILLED
    assert_complete(KILLED, out, result["output"])
    experiment = read_experiment(FOLDER / f"{KILLED}.yaml").shrink()
    num_prompts = sum(task.prompts.num_train for task in experiment.tasks.values())
    num_responses = num_prompts * experiment.rollouts.num_responses
    assert 0 < result["num_written"] < num_responses, "it was not killed on its way"
    for folder in (out / "rollouts").iterdir():
        keys = [response.key for response in read_shards(folder)]
        assert len(keys) == len(set(keys)) == num_responses
    assert result["before"]
    assert result["after"] == result["before"]


@pytest.mark.slow
def test_inspect_shows_an_answer_and_writes_the_page(background, begun):
    assert "8 tokens" in background.wait("inspect")
    page = (background.folder / "answer.html").read_text()
    assert "lighthouse" in page
    assert "://" not in page


def run_in_turn(names: list[str], folder: str) -> dict[str, dict]:
    """What the command prints for each experiment, and the error that ended it."""
    results = {}
    for name in names:
        output, error = StringIO(), None
        try:
            with redirect_stdout(output):
                out = Path(folder) / name
                cli.run(FOLDER / f"{name}.yaml", out, cli.StageOption.evaluate, quick=True)
        except Exception:
            error = traceback.format_exc()
        results[name] = {"output": output.getvalue(), "error": error}
    return results


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_in_turn(**json.load(sys.stdin))))
