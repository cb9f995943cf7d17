"""`benchmarks.engine`: a short real run, and the order of its arms."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.bench_engine import ADAPTIVE, ARMS, ORDINARY, Run
from benchmarks.engine import measure
from tests.engine.engines import make_environment
from tests.programs import HANG_S

ROOT = Path(__file__).parent.parent.parent


def run_benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.engine", *arguments],
        # vLLM says more than usual, none of it where the results go.
        env=make_environment("v1") | {"VLLM_LOGGING_LEVEL": "INFO", "COLUMNS": "200"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    process = run_benchmark(
        *("--batch", "1,4", "--num-pairs", "2", "--num-tokens", "20", "--head-layers", "16"),
        *("--num-heads", "2", "--policies", "--prompt-len", "8"),
        *("--out", str(folder / "x.json"), "--plot", str(folder / "x.svg")),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process, folder


@pytest.mark.engine
@pytest.mark.slow
def test_results_are_alone_on_the_standard_output(short_run):
    process, _ = short_run
    result = json.loads(process.stdout)
    assert "INFO" in process.stderr
    assert (result["config"], result["model_runner"], result["num_heads"]) == ("tiny", "V1", 2)
    assert result["head"] == {
        "widths": [64, 16, 6],
        "num_parameters": 64 * 16 + 16 + 16 * 6 + 6,
        "num_bytes": 4 * (64 * 16 + 16 + 16 * 6 + 6),
        "flops_per_row": 2 * (64 * 16 + 16 * 6),
        "num_kernels": 4,
    }
    assert set(result["arms"]) == {*ARMS, "entropy", "schedule", "constant"}
    assert len(result["ratios"]) == 8
    for by_size in result["ratios"].values():
        assert list(by_size) == ["1", "4"]
        for by_measure in by_size.values():
            assert all(share["mean"] > 0 for share in by_measure.values())


@pytest.mark.engine
@pytest.mark.slow
def test_every_run_is_kept_and_the_plot_drawn(short_run):
    process, folder = short_run
    result = json.loads((folder / "x.json").read_text())
    runs = result.pop("runs")
    assert result == json.loads(process.stdout)
    assert {size: len(pairs) for size, pairs in runs.items()} == {"1": 2, "4": 2}
    for size, pairs in runs.items():
        for run in (run for pair in pairs for run in pair.values()):
            # The whole is no less than its parts; of geometric means it may be more.
            seconds = int(size) * 20 / run["tokens_per_s"]
            assert 0 < run["ttft_s"] + 19 * run["tpot_s"] <= seconds * 1.000001
    assert sorted(path.name for path in folder.iterdir()) == ["x.json", "x.svg"]
    assert "<svg" in (folder / "x.svg").read_text()


@pytest.mark.engine
@pytest.mark.slow
def test_what_the_engine_refuses_is_a_sentence():
    speculation = 'speculative_config={"method": "ngram", "num_speculative_tokens": 2}'
    process = run_benchmark("--batch", "1", "--option", speculation)
    assert process.returncode == 2
    assert process.stdout == ""
    assert "adaptive temperatures do not work with --speculative-config" in process.stderr
    assert "Traceback" not in process.stderr


def test_arms_meet_each_other_in_every_order():
    calls = []

    class FakeEngine:
        def run(self, arm, batch, prompt_len, num_tokens):
            calls.append((arm, num_tokens))
            return Run(1.0, float(len(calls)), 2.0)

    pairs = [*measure(FakeEngine(), list(ARMS), 8, prompt_len=32, num_tokens=128, num_pairs=40)]
    assert len(pairs) == 40
    warm_ups, timed = calls[:10], [arm for arm, _ in calls[10:]]
    assert warm_ups == [(arm, 32) for arm in ARMS] * 2
    for start in range(0, len(timed), 10):
        there, back = timed[start : start + 5], timed[start + 5 : start + 10]
        assert sorted(there) == sorted(ARMS)
        assert back == there[::-1]
    firsts = Counter(timed[::10])
    assert set(firsts) == set(ARMS)
    assert max(firsts.values()) < 20
    # There and back: a drift in a straight line is the same for all, but for the geometric mean.
    assert all(0.9 < pair[ADAPTIVE].tpot_s / pair[ORDINARY].tpot_s < 1.1 for pair in pairs[10:])


@pytest.mark.engine
@pytest.mark.slow
def test_every_arm_runs_on_v2():
    """Through Triton's interpreter, which says nothing of times."""
    code = (
        "import typer, benchmarks.bench_engine\n"
        "benchmarks.bench_engine.WORKER_CLS = 'v2_worker.AdaptiveWorker'\n"
        "from benchmarks.engine import main\n"
        "typer.run(main)\n"
    )
    arguments = ("--batch", "2", "--prompt-len", "4", "--num-tokens", "3", "--num-pairs", "2")
    options = (
        "dtype=float32",
        "max_model_len=64",
        "block_size=32",
        "kv_cache_memory_bytes=1000000",
    )
    environment = make_environment("v2")
    environment["PYTHONPATH"] = f"{ROOT}:{environment['PYTHONPATH']}"
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--head-layers", "16"]
        + [word for option in options for word in ("--option", option)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads(process.stdout)
    assert result["model_runner"] == "V2"
    assert set(result["arms"]) == set(ARMS)
    assert result["heads_memory_bytes"] is not None
    # Adaptive and mixed, twice as warm-up and twice in each of two pairs.
    assert sum(result["choices"].values()) == 6 * (2 + 1) * 3
