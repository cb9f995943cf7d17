import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adaptive_head import AdaptiveHead, HeadConfig, load_head
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from tests.engine.tiny_model import HIDDEN_SIZE, make_tiny_model
from tests.heads import save_strong_head
from tests.leftovers import survive

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INTERPRETED = HERE / "interpreted_triton"
TEMPERATURES = (0.0, 0.3, 0.7, 1.1, 1.6)
# A process of engines that takes longer hangs.
HANG_S = 480

WORKERS = {
    ("v1", "adaptive"): WORKER_CLS,
    ("v1", "stock"): "auto",
    ("v2", "adaptive"): "v2_worker.AdaptiveWorker",
    ("v2", "stock"): "v2_worker.StockWorker",
    ("v2", "ranks"): "rank_worker.RankWorker",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def heads(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """A head a level."""
    folder = tmp_path_factory.mktemp("heads")
    config = HeadConfig(HIDDEN_SIZE, TEMPERATURES, (32, 32))
    return {
        name: save_strong_head(folder / name, tiny_model, config, level, seed)
        for name, level, seed in [("tok", "token", 0), ("seq", "sequence", 1)]
    }


@pytest.fixture(scope="session")
def networks(heads) -> dict[str, AdaptiveHead]:
    return {name: load_head(folder).network for name, folder in heads.items()}


class Engines:
    """Runs batches of requests through tiny engines, once for each configuration.

    An engine keeps one core busy, so two run at a time: whatever a test will ask for can be begun
    while another one waits. Engines of a group share a process, which imports vLLM once.
    """

    def __init__(self, pool: Executor, model: Path, heads: dict[str, Path], folder: Path) -> None:
        self._pool, self._model, self._heads, self._folder = pool, model, heads, folder
        # By configuration: a process's results, and which of them is its own.
        self._results: dict[str, tuple[Future[list[dict]], int]] = {}
        self._num_processes = 0

    def begin(self, runner: str, worker: str, *group: tuple[list, dict]) -> None:
        """Start a process that runs engines one after the other.

        Args:
            group: the batches of each engine, and its settings.
        """
        scenarios = [
            {
                "engine": make_config(self._model, self._heads, runner, worker) | engine,
                "batches": batches,
            }
            for batches, engine in group
        ]
        result = self._folder / f"{self._num_processes}.json"
        self._num_processes += 1
        results = self._pool.submit(run_module, "tests.engine.scenario", runner, scenarios, result)
        for index, (batches, engine) in enumerate(group):
            self._results[make_key(runner, worker, batches, engine)] = results, index

    def __call__(self, runner: str, worker: str, batches: list, **engine: object) -> dict:
        key = make_key(runner, worker, batches, engine)
        if key not in self._results:
            self.begin(runner, worker, (batches, engine))
        results, index = self._results[key]
        result = results.result()[index]
        assert "error" not in result, find_cause(result["error"])
        return result


def make_key(runner: str, worker: str, batches: list, engine: dict) -> str:
    return json.dumps([runner, worker, batches, engine])


@pytest.fixture(scope="session")
def engine_pool() -> Iterator[Executor]:
    pool = ThreadPoolExecutor(2)
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def run_engine(engine_pool, tiny_model, heads, tmp_path_factory) -> Engines:
    return Engines(engine_pool, tiny_model, heads, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def is_whole(request) -> bool:
    """Whether all tests of a module run, and not one that somebody looks at."""
    return sum(item.path == request.path for item in request.session.items) > 3


def make_config(model: Path, heads: dict[str, Path], runner: str, worker: str) -> dict:
    """The arguments of an engine: a single process, until others replace that."""
    config = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 26,
        "disable_log_stats": False,
        "distributed_executor_backend": "uni",
        "worker_cls": WORKERS[runner, worker],
    }
    if worker != "stock":
        paths = {name: str(folder) for name, folder in heads.items()}
        config["scheduler_cls"] = SCHEDULER_CLS
        config["additional_config"] = {"adaptive": {"heads": paths}}
    return config


def run_module(module: str, runner: str, scenario: object, result: Path) -> Any:
    """Run a scenario in a process of its own; what it has written.

    The process may run for a later test than the one that begins it.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, str(result)],
        input=json.dumps(scenario),
        env=survive(make_environment(runner)),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=HANG_S,
    )
    assert process.returncode == 0, find_cause(process.stderr)
    return json.loads(result.read_text())


def make_environment(runner: str) -> dict[str, str]:
    environment = os.environ | {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
        # By itself vLLM wants a NUMA node a worker.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Everything in one process: each further one imports vLLM anew.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if runner == "v2":
        paths = [str(INTERPRETED), environment.get("PYTHONPATH", "")]
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
        }
    return environment


def find_cause(stderr: str) -> str:
    """The lines that name the error: vLLM prints the tracebacks of three processes around it."""
    lines = [line for line in stderr.splitlines() if "Error" in line]
    return "\n".join(lines[:20]) or stderr[-4000:]
