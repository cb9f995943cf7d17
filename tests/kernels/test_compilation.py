"""The interpreter takes what the compiler may refuse. Compiling for a GPU needs none."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compilation import KERNELS
from tests.programs import HANG_S

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton ships ptxas for x86-64 here")
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles_for_a_gpu(capability, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compilation", str(capability)],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        text=True,
        capture_output=True,
        timeout=HANG_S,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    sizes = json.loads(process.stdout)
    assert sizes.keys() == {kernel.__name__ for kernel, _, _ in KERNELS}
    assert all(sizes.values())
