"""`benchmarks.engine`, shortened, and the ratios that are wanted of it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import PRESETS
from tests.gpu.checks import ROOT

RATIOS = ("again / ordinary", "ordinary / stock", "adaptive / ordinary")
ARMS = "stock,ordinary,again,adaptive"
# A model of 8 billion parameters, or its first layers where the device has no room for it.
PRESET, NUM_FEW_LAYERS, ROOMY_BYTES = "llama-3-8b", 4, 36 << 30
ON_GPU = [
    *("--batch", "1,32,256", "--prompt-len", "32", "--num-tokens", "32", "--num-pairs", "8"),
    *("--option", 'compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 256]}'),
    *("--option", "max_model_len=256"),
]
# So small that Triton's interpreter takes seconds for it.
ON_CPU = [
    *("--batch", "2", "--prompt-len", "4", "--num-tokens", "3", "--num-pairs", "2"),
    *("--head-layers", "16", "--option", "dtype=float32", "--option", "max_model_len=64"),
    *("--option", "block_size=32", "--option", "kv_cache_memory_bytes=1000000"),
]
# Replaces what the interpreter cannot run.
INTERPRETED = (
    "import typer, benchmarks.bench_engine\n"
    "benchmarks.bench_engine.WORKER_CLS = 'v2_worker.AdaptiveWorker'\n"
    "from benchmarks.engine import main\n"
    "typer.run(main)\n"
)


def run_benchmark(device: str, model: str | None, limit_s: float) -> dict[str, Any]:
    """Time per token at batch 1, 32 and 256: adaptive and ordinary requests, and stock vLLM.

    Args:
        model: a preset of `benchmarks.models`, a config.json, or a folder with one; None for the
            shape that fits the device.
        limit_s: after so many seconds it is stopped; batch sizes that are complete then count.

    Returns:
        By batch size: milliseconds per token, and each ratio with its interval.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = folder / "engine.json"
        start = ["-c", INTERPRETED] if device == "cpu" else ["-m", "benchmarks.engine"]
        arguments = ON_CPU if device == "cpu" else ON_GPU
        config = ["--config", model or _pick_config(device, folder)]
        command = [sys.executable, *start, *config, *arguments, "--arms", ARMS, "--out", str(out)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        assert code in (0, None), f"benchmarks.engine ended with code {code}; see the log"
        assert out.is_file(), f"no run was complete after {limit_s:.0f} s"
        result = json.loads(out.read_text())
    return summarise(result, is_whole=code == 0)


def summarise(result: dict[str, Any], is_whole: bool) -> dict[str, Any]:
    """The figures of a benchmark's results.

    Raises:
        AssertionError: it has measured something else, or not one batch size is complete.
    """
    assert result["model_runner"] == "V2", f"this is vLLM's {result['model_runner']} model runner"
    is_on_gpu = result["threads"] is None
    assert result["async_scheduling"] or not is_on_gpu, "scheduling is not asynchronous"
    ratios = result.get("ratios")
    assert ratios, "not one batch size is complete"
    figures: dict[str, Any] = {"config": result["config"], "whole": is_whole}
    for size in ratios[RATIOS[0]]:
        milliseconds = {
            arm: round(by_size[size]["tpot_s"] * 1e3, 4) for arm, by_size in result["arms"].items()
        }
        figures[f"batch {size}"] = {"tpot_ms": milliseconds} | {
            name: _describe(ratios[name][size]["tpot_s"]) for name in RATIOS
        }
    return figures | {"heads_memory_bytes": result["heads_memory_bytes"]}


def _describe(ratio: dict[str, Any]) -> list[float | None]:
    """Mean, and the ends of its interval where there are pairs enough for one."""
    return [ratio["mean"], *(ratio["interval_95"] or ())]


def _pick_config(device: str, folder: Path) -> str:
    if device == "cpu":
        return "tiny"
    if torch.cuda.get_device_properties(0).total_memory >= ROOMY_BYTES:
        return PRESET
    path = folder / "config.json"
    path.write_text(json.dumps(PRESETS[PRESET] | {"num_hidden_layers": NUM_FEW_LAYERS}))
    return str(path)
