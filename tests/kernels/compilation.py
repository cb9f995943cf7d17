"""Compiles every kernel for a GPU, in a process in which Triton is not interpreted. Needs none.

Prints the size of each kernel's machine code as JSON.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adaptive_head.vllm.kernels import entropy, heads, policies, scale
from adaptive_head.vllm.kernels.commit import _commit_kernel

# As vLLM's V2 runner hands them over.
TYPES = {
    "chosen_ptr": "*fp32",
    "counts_ptr": "*i64",
    "first_positions_ptr": "*i64",
    "first_row": "i32",
    "has_abstained_ptr": "*u8",
    "head_index": "i32",
    "input_ids_ptr": "*i32",
    "is_answer_ptr": "*u8",
    "lists_ptr": "*fp32",
    "logits_indices_ptr": "*i64",
    "logits_ptr": "*fp32",
    "logits_stride": "i32",
    "markers_ptr": "*i64",
    "micros_ptr": "*i32",
    "num_blocks": "i32",
    "num_choices": "i32",
    "num_sampled_ptr": "*i32",
    "options_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "peak_tokens_ptr": "*i32",
    "peaks_ptr": "*fp32",
    "picks_ptr": "*i32",
    "policies_ptr": "*i32",
    "positions_ptr": "*i64",
    "prefill_lens_ptr": "*i32",
    "prompt_lens_ptr": "*i32",
    "recent_ptr": "*i64",
    "row_slots_ptr": "*i64",
    "scores_ptr": "*fp32",
    "seeds_ptr": "*i64",
    "slots_ptr": "*i64",
    "starts_ptr": "*i32",
    "temperatures_ptr": "*fp32",
    "vocab_size": "i32",
}
SMALL = {"num_warps": 1}
# Kernel, constants, options.
KERNELS = [
    (policies._choose_by_policy_kernel, {}, SMALL),
    (heads._choose_by_head_kernel, {}, SMALL),
    (_commit_kernel, {}, SMALL),
    (_commit_kernel, {"num_sampled_ptr": None}, SMALL),
    (entropy._measure_kernel, {"BLOCK": 8192}, {}),
    (entropy._choose_by_entropy_kernel, {"MAX_NUM_BLOCKS": 16}, SMALL),
    (scale._scale_kernel, {"BLOCK": 8192}, {}),
    (scale._keep_peak_kernel, {"MAX_NUM_BLOCKS": 16}, SMALL),
]


def compile_all(capability: int) -> dict[str, int]:
    sizes = {}
    for kernel, constants, options in KERNELS:
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else TYPES[n] for n in names}
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        sizes[kernel.__name__] = len(compiled.asm["cubin"])
    return sizes


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
