"""What torch reports about processors that the tests do not run on."""

import pytest
import torch

_AVX2 = {"architecture": "x86_64", "avx2": True, "fma3": True, "avx512_f": False}
_AVX512 = _AVX2 | {"avx512_f": True, "avx512_bw": True, "avx512_vnni": True, "avx512_fp16": False}
_ARM = {"architecture": "arm64", "neon": True, "fp16_arith": True, "dot": True}

# The flags that matter are false, or missing as for another architecture.
WITHOUT_BFLOAT16 = {
    "AVX2 only": _AVX2 | {"avx512_bf16": False, "amx_bf16": False, "amx_tile": False},
    "Skylake": _AVX512 | {"avx512_vnni": False, "avx512_bf16": False, "amx_bf16": False},
    "Cascade Lake": _AVX512 | {"avx512_bf16": False, "amx_bf16": False},
    "Graviton 2": _ARM | {"bf16": False, "sve": False, "sve_bf16": False},
    "POWER": {"architecture": "ppc64"},
}
WITH_BFLOAT16 = {
    "Zen 4": _AVX512 | {"avx512_bf16": True, "amx_bf16": False, "amx_tile": False},
    "Sapphire Rapids": _AVX512 | {"avx512_bf16": True, "amx_bf16": True, "amx_tile": True},
    "AMX, AVX-512 BF16 hidden": _AVX512 | {"avx512_bf16": False, "amx_bf16": True},
    "Graviton 3": _ARM | {"bf16": True, "sve": True, "sve_bf16": True},
}
PROCESSORS = WITHOUT_BFLOAT16 | WITH_BFLOAT16


def run_on(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    """Let torch report another processor, and no GPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: PROCESSORS[processor])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
