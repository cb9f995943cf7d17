"""The model of a head's cost, the table that docs/scale.md makes of it, and a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaptive_head import AdaptiveHead, HeadConfig
from adaptive_head.vllm.head_runner import convert
from benchmarks.head import Cost, Rates, count_cost, predict
from tests.programs import HANG_S

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"
# Published for an H100 SXM: bytes and bfloat16 operations a second.
BANDWIDTH, ARITHMETIC = 3.35e12, 989e12


def test_a_heads_parameters_are_those_of_the_network():
    config = HeadConfig(64, (0.0, 0.5, 1.0), (32, 16))
    parameters = list(AdaptiveHead(config).parameters())
    cost = count_cost(config.widths, 2)
    assert cost.num_parameters == sum(parameter.numel() for parameter in parameters)
    assert cost.num_bytes == 2 * cost.num_parameters
    converted = convert(AdaptiveHead(config), torch.bfloat16).parameters()
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in converted)
    assert count_cost(config.widths, 2, 4).num_bytes == num_bytes
    assert cost.flops_per_row == 2 * (64 * 32 + 32 * 16 + 16 * 3)


def test_a_heads_kernels_are_what_torch_runs():
    config = HeadConfig(8, (0.0, 0.5), (4, 4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        convert(AdaptiveHead(config), torch.bfloat16)(torch.zeros(1, 8, dtype=torch.bfloat16))
    calls = {event.key: event.count for event in profile.key_averages()}
    num_casts = 1
    found = calls["aten::addmm"] + calls["aten::silu"] + num_casts
    assert count_cost(config.widths, 2).num_kernels == found


@pytest.mark.parametrize(("num_rows", "seconds"), [(1, 2.0 + 0.6), (10, 5.0 + 0.6)])
def test_memory_or_arithmetic_takes_the_time_and_each_kernel_some_more(num_rows, seconds):
    cost = Cost(num_parameters=100, num_bytes=200, flops_per_row=50, num_kernels=6)
    rates = Rates(bytes_per_s=100.0, flops_per_s=100.0, seconds_a_kernel=0.1)
    assert predict(cost, num_rows, rates) == pytest.approx(seconds)


def read_rows() -> list[list[str]]:
    table = PAGE.read_text(encoding="utf-8").split("| model | d |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def test_the_page_has_the_models_figures():
    rows = read_rows()
    assert len(rows) == 5
    for name, width, *numbers in rows:
        layers = (256, 256) if "shipped" in name else (2048, 2048)
        num_temperatures = 64 if "K = 64" in name else 6
        vocabulary, num_ranks = (49152, 1) if "SmolLM2" in name else (128256, 1)
        if found := re.search(r"TP (\d+)", name):
            num_ranks = int(found[1])
        head = count_cost((int(width), *layers, num_temperatures), 2, 4)
        lm_head_bytes = 2 * int(width) * vocabulary / num_ranks
        assert numbers == [
            f"{head.num_parameters:,}",
            f"{head.num_bytes / 1e6:.2f}",
            f"{head.flops_per_row / 1e6:.2f}",
            f"{head.num_bytes / BANDWIDTH * 1e6:.1f}",
            f"{head.flops_per_row * 256 / ARITHMETIC * 1e6:.1f}",
            f"{lm_head_bytes / 1e6:.1f}",
            f"{lm_head_bytes / BANDWIDTH * 1e6:.1f}",
        ], name


@pytest.mark.slow
def test_a_run_prints_what_was_predicted_and_measured():
    arguments = ["--hidden-size", "64", "--layers", "32", "--vocab-size", "256", "--rows", "1,4"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.head", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=HANG_S,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout)
    assert result["widths"] == [64, 32, 6]
    assert result["microseconds"].keys() == {"1", "4"}
    times = [time for step in result["microseconds"].values() for time in step.values()]
    assert all(time["predicted"] > 0 and time["measured"] > 0 for time in times)
