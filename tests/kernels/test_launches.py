"""How many Triton kernels a step launches: the table in docs/scale.md."""

import re
from pathlib import Path

import pytest
import torch

from adaptive_head.vllm.kernels import commit, entropy, heads, policies, scale, scale_logits
from tests.kernels.test_selector_v2 import OneRowSelector
from tests.selection import CPU, HEADS, VOCABULARY, add, make_options, make_step

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
KERNELS = [
    (heads, "_choose_by_head_kernel"),
    (policies, "_choose_by_policy_kernel"),
    (entropy, "_measure_kernel"),
    (entropy, "_choose_by_entropy_kernel"),
    (scale, "_scale_kernel"),
    (scale, "_keep_peak_kernel"),
]
BATCHES = {
    "ordinary requests only": [None, None],
    "one head's requests only": [make_options("head", "first")] * 2,
    "one head's and ordinary requests": [make_options("head", "first"), None],
    "two heads' requests": [make_options("head", "first"), make_options("head", "second")],
    "a policy without a head (not entropy)": [make_options("schedule"), make_options("two_phase")],
    "the entropy policy": [make_options("entropy"), None],
}


class Counting:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launches: list[str]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel.fn.__name__)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    names: list[str] = []
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Counting(getattr(module, name), names))
    module = commit.__globals__
    monkeypatch.setitem(module, "_commit_kernel", Counting(module["_commit_kernel"], names))
    return names


def read_table() -> dict[str, int]:
    page = PAGE.read_text(encoding="utf-8")
    table = page.split("| the batch holds | launches |")[1].split("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"\| ([^|]+) \| (\d+) \|", table)}


def test_the_page_describes_every_batch_that_is_counted():
    assert read_table().keys() == BATCHES.keys()


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_launches_what_the_page_says(name, launches):
    selector = OneRowSelector(HEADS, 2, CPU)
    rows = [add(selector, slot, options) for slot, options in enumerate(BATCHES[name])]
    selector.select(make_step(rows))
    if launches:
        micros = torch.tensor([500_000, 0], dtype=torch.int32)
        scale_logits(torch.zeros(2, VOCABULARY), micros, 0)
    assert len(launches) == read_table()[name]
