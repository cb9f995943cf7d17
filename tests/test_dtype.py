import platform
from pathlib import Path

import pytest
import torch

from adaptive_head.dtype import choose_dtype, has_fast_bfloat16
from tests.processors import WITH_BFLOAT16, WITHOUT_BFLOAT16, run_on


@pytest.mark.parametrize("processor", WITHOUT_BFLOAT16)
def test_a_processor_without_bfloat16_instructions_gets_float32(processor, monkeypatch):
    run_on(monkeypatch, processor)
    assert choose_dtype() == choose_dtype("auto", is_on_cpu=True) == "float32"


@pytest.mark.parametrize("processor", WITH_BFLOAT16)
def test_a_processor_with_bfloat16_instructions_gets_the_checkpoints_dtype(processor, monkeypatch):
    run_on(monkeypatch, processor)
    assert choose_dtype() == choose_dtype("auto", is_on_cpu=True) == "auto"


@pytest.mark.parametrize("requested", ["bfloat16", "float16", "half", "float32"])
def test_an_explicit_dtype_wins(requested, monkeypatch):
    run_on(monkeypatch, "Skylake")
    assert choose_dtype(requested) == choose_dtype(requested, is_on_cpu=True) == requested


def test_a_gpu_beside_a_processor_without_bfloat16_gets_the_checkpoints_dtype(monkeypatch):
    run_on(monkeypatch, "Skylake")
    assert choose_dtype(is_on_cpu=False) == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_dtype() == "auto"


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="flags of Linux"
)
def test_the_answer_for_this_processor_agrees_with_the_flags_that_linux_lists():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    assert has_fast_bfloat16() == bool({"avx512_bf16", "amx_bf16"} & set(flags))
