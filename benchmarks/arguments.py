"""What `benchmarks.engine` is told on its command line, and sentences for what cannot be."""

import json
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from vllm import EngineArgs
from vllm.config import VllmConfig

from benchmarks.bench_engine import ARMS, ORDINARY, POLICIES

# What the benchmark sets itself.
_TAKEN = ("model", "worker_cls", "scheduler_cls", "additional_config")
_FORMATS = (".png", ".svg", ".pdf")


def read_sizes(option: str, text: str) -> list[int]:
    """Positive whole numbers between commas, none twice where they are batch sizes.

    Raises:
        typer.BadParameter: they are not.
    """
    try:
        sizes = [int(size) for size in text.split(",")] if text else []
    except ValueError:
        sizes = [0]
    if any(size < 1 for size in sizes):
        raise typer.BadParameter(f"{option} {text}: positive whole numbers with commas are wanted")
    return sizes


def read_batches(text: str) -> list[int]:
    """The batch sizes, in order.

    Raises:
        typer.BadParameter: there is none, or they are not positive whole numbers.
    """
    if not (sizes := sorted(set(read_sizes("--batch", text)))):
        raise typer.BadParameter("--batch: at least one batch size is wanted")
    return sizes


def read_arms(text: str, has_policies: bool) -> list[str]:
    """Names of arms between commas; the policies come on top.

    Raises:
        typer.BadParameter: there is no such arm, or nothing to divide by.
    """
    arms = [*dict.fromkeys(text.split(",")), *(POLICIES if has_policies else ())]
    if unknown := sorted(set(arms) - {*ARMS, *POLICIES}):
        raise typer.BadParameter(f"--arms: {unknown[0]} is none of {', '.join(ARMS + POLICIES)}")
    if ORDINARY not in arms or len(set(arms)) < 2:
        raise typer.BadParameter(f"--arms {text}: {ORDINARY} and another one are wanted")
    return list(dict.fromkeys(arms))


def read_options(pairs: list[str]) -> dict[str, Any]:
    """`NAME=JSON` each; a value that is not JSON is text.

    Raises:
        typer.BadParameter: one has no name, or is not one of vLLM's to be changed here.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.replace("-", "_")
        if not (name and equals):
            raise typer.BadParameter(f"--option {pair}: NAME=JSON is wanted")
        if name in _TAKEN:
            raise typer.BadParameter(f"--option {pair}: the benchmark sets {name} itself")
        if name not in {field.name for field in fields(EngineArgs)}:
            raise typer.BadParameter(f"--option {pair}: vLLM's EngineArgs have no {name}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def check_files(out: Path | None, plot: Path | None) -> None:
    """Can the results be written, once they are there?

    Raises:
        typer.BadParameter: a folder is missing, or what draws plots.
    """
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise typer.BadParameter(f"{option} {path}: not a file in a folder that exists")
    if plot is not None and plot.suffix not in _FORMATS:
        raise typer.BadParameter(f"--plot {plot}: its name must end with {', '.join(_FORMATS)}")
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install '.[loadtests]'")


def check_lengths(config: VllmConfig, max_batch: int, prompt_len: int, num_tokens: int) -> None:
    """Do the requests fit into the engine, all of a batch at once?

    Raises:
        typer.BadParameter: they do not.
    """
    max_len = config.model_config.max_model_len
    if prompt_len + num_tokens > max_len:
        raise typer.BadParameter(
            f"--prompt-len {prompt_len} and --num-tokens {num_tokens} are together more than the "
            f"{max_len} tokens that the model takes"
        )
    max_num_seqs = config.scheduler_config.max_num_seqs
    if max_batch > max_num_seqs:
        raise typer.BadParameter(
            f"--batch {max_batch} is more than the {max_num_seqs} requests that "
            "--option max_num_seqs lets run at once"
        )
