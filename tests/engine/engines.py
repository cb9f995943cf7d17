"""Tiny engines in processes of their own, under both model runners."""

import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from adaptive_head import HeadConfig
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from tests.background import HANG_S, Background
from tests.engine.tiny_model import HIDDEN_SIZE, make_tiny_model
from tests.heads import save_strong_head
from tests.leftovers import find_cause, run

ROOT = Path(__file__).parents[2]
INTERPRETED = Path(__file__).parent / "interpreted_triton"
TEMPERATURES = (0.0, 0.3, 0.7, 1.1, 1.6)

WORKERS = {
    ("v1", "adaptive"): WORKER_CLS,
    ("v1", "stock"): "auto",
    ("v2", "adaptive"): "v2_worker.AdaptiveWorker",
    ("v2", "stock"): "v2_worker.StockWorker",
    ("v2", "ranks"): "rank_worker.RankWorker",
}


class Engines:
    """Runs batches of requests through tiny engines, once for each configuration.

    Engines of a group share a process, which imports vLLM once.

    Attributes:
        model: a tiny one.
        heads: for it, one of each level.
    """

    def __init__(self, background: Background) -> None:
        self._background = background
        self.model = make_tiny_model(background.folder / "tiny")
        config = HeadConfig(HIDDEN_SIZE, TEMPERATURES, (32, 32))
        self.heads = {
            name: save_strong_head(background.folder / name, self.model, config, level, seed)
            for name, level, seed in [("tok", "token", 0), ("seq", "sequence", 1)]
        }
        # By configuration: the process that runs it, and which of its results it is.
        self._places: dict[str, tuple[str, int]] = {}

    def begin(self, runner: str, worker: str, *group: tuple[list, dict]) -> None:
        """Begin a process that runs engines one after the other.

        Args:
            group: the batches of each engine, and its settings.
        """
        scenarios = [
            {"engine": self.make_config(runner, worker) | engine, "batches": batches}
            for batches, engine in group
        ]
        keys = [make_key(runner, worker, batches, engine) for batches, engine in group]
        self.begin_module(keys[0], "tests.engine.scenario", runner, scenarios)
        self._places |= {key: (keys[0], index) for index, key in enumerate(keys)}

    def __call__(self, runner: str, worker: str, batches: list, **engine: object) -> dict:
        """The result of an engine, of `tests.engine.scenario`."""
        key = make_key(runner, worker, batches, engine)
        if key not in self._places:
            self.begin(runner, worker, (batches, engine))
        process, index = self._places[key]
        result = self._background.wait(process)[index]
        assert "error" not in result, find_cause(result["error"])
        return result

    def begin_module(self, key: str, module: str, runner: str, scenario: object) -> None:
        """Begin a process of another module, whose result `wait` returns."""
        environment, folder = make_environment(runner), self._background.folder
        self._background.begin(key, run_module, module, environment, scenario, folder)

    def wait(self, key: str) -> Any:
        return self._background.wait(key)

    def make_config(self, runner: str, worker: str) -> dict:
        """The arguments of an engine: a single process, until others replace that."""
        config = {
            "model": str(self.model),
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
            paths = {name: str(folder) for name, folder in self.heads.items()}
            config["scheduler_cls"] = SCHEDULER_CLS
            config["additional_config"] = {"adaptive": {"heads": paths}}
        return config


get_engines = cache(Engines)


def make_key(runner: str, worker: str, batches: list, engine: dict) -> str:
    return json.dumps([runner, worker, batches, engine])


def run_module(module: str, environment: dict[str, str], scenario: object, folder: Path) -> Any:
    """Run a scenario in a process of its own; what it has written."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".json") as result:
        command = [sys.executable, "-m", module, result.name]
        run(command, environment, HANG_S, json.dumps(scenario), cwd=ROOT)
        return json.load(result)


def make_environment(runner: str) -> dict[str, str]:
    environment = os.environ | {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
        # By itself vLLM wants a NUMA node a worker.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Everything in one process: every further process would import vLLM again.
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
