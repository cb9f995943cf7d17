"""Choose the dtype in which a model runs, by what the CPU computes fast."""

import torch

# AVX-512 BF16 (Intel Cooper Lake and Sapphire Rapids, AMD Zen 4), AMX, and Arm's FEAT_BF16. AVX-512
# alone does not help: without these instructions bfloat16 products are emulated.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def choose_dtype(requested: str = "auto", *, is_on_cpu: bool | None = None) -> str:
    """Return `float32` for `auto` where the model runs on a CPU without bfloat16 instructions.

    Anything else is returned as it is: an explicit dtype, and `auto`, which vLLM and transformers
    take for the dtype of the checkpoint.

    Args:
        requested: a dtype's name, or `auto`.
        is_on_cpu: whether the model runs on the CPU; None: it does where torch finds no GPU.
    """
    if is_on_cpu is None:
        is_on_cpu = not torch.cuda.is_available()
    if requested == "auto" and is_on_cpu and not has_fast_bfloat16():
        return "float32"
    return requested


def has_fast_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
