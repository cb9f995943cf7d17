"""Both tiers, where there is a GPU."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.gpu.checks import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("tier", ["tier1", "tier2"])
def test_no_check_fails(tier):
    if tier == "tier2" and find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    process = subprocess.run(
        [sys.executable, "-m", f"tests.gpu.{tier}"], cwd=ROOT, capture_output=True, text=True
    )
    print(process.stdout)
    assert process.returncode == 0, process.stdout + process.stderr
