"""The entropy policy (EDT, arXiv 2403.14541): two passes, one block by block, one row by row.

A row that does not wait for it is not read.
"""

import math

import torch
import triton
import triton.language as tl

from adaptive_head.policies import EDT_BASE
from adaptive_head.slots import Column, SlotTable
from adaptive_head.vllm.kernels.batch import PENDING, Choices
from adaptive_head.vllm.kernels.temperatures import bound

_BLOCK = 8192
_PENDING = tl.constexpr(PENDING)
_NUM_COLUMNS = tl.constexpr(len(Column))
_T0 = tl.constexpr(int(Column.PARAMETER_0))
_THETA = tl.constexpr(int(Column.PARAMETER_1))
_LOG_EDT_BASE = tl.constexpr(math.log(EDT_BASE))


@triton.jit(do_not_specialize=["first_row"])
def _measure_kernel(
    logits_ptr,
    logits_stride,
    micros_ptr,
    parts_ptr,
    first_row,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Of a PENDING row's blocks: the maximum m, and the sums of e^(l - m) and (l - m) e^(l - m)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(micros_ptr + first_row + row) != _PENDING:
        return
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(
        logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf")
    )
    peak = tl.max(logits, axis=0)
    # What is masked is -inf, and would make NaN of a difference or a product with 0.
    is_there = logits > float("-inf")
    shift = tl.where(peak > float("-inf"), peak, 0.0)
    below = tl.where(is_there, logits, shift) - shift
    weight = tl.where(is_there, tl.exp(below), 0.0)
    part_ptr = parts_ptr + (row * tl.num_programs(1) + block) * 3
    tl.store(part_ptr, peak)
    tl.store(part_ptr + 1, tl.sum(weight, axis=0))
    tl.store(part_ptr + 2, tl.sum(below * weight, axis=0))


@triton.jit(do_not_specialize=["first_row"])
def _choose_by_entropy_kernel(
    micros_ptr,
    row_slots_ptr,
    options_ptr,
    parts_ptr,
    first_row,
    num_blocks,
    MAX_NUM_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(micros_ptr + first_row + row) != _PENDING:
        return
    block = tl.arange(0, MAX_NUM_BLOCKS)
    part_ptr = parts_ptr + (row * num_blocks + block) * 3
    is_there = block < num_blocks
    peaks = tl.load(part_ptr, mask=is_there, other=float("-inf"))
    weights = tl.load(part_ptr + 1, mask=is_there, other=0.0)
    moments = tl.load(part_ptr + 2, mask=is_there, other=0.0)
    peak = tl.max(peaks, axis=0)
    shift = tl.where(peak > float("-inf"), peak, 0.0)
    below = tl.where(peaks > float("-inf"), peaks, shift) - shift
    shares = tl.exp(below)
    total = tl.sum(weights * shares, axis=0)
    moment = tl.sum((moments + below * weights) * shares, axis=0)
    # A row that is masked as a whole has no entropy, and is sampled greedily.
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    entropy = tl.where(is_empty, 0.0, tl.log(total) - moment / total)

    slot = tl.load(row_slots_ptr + first_row + row).to(tl.int64)
    options_ptr += slot * _NUM_COLUMNS
    exponent = tl.load(options_ptr + _THETA) / tl.maximum(entropy, 1e-9)
    temperature = tl.load(options_ptr + _T0) * tl.exp(exponent * _LOG_EDT_BASE)
    tl.store(micros_ptr + first_row + row, bound(temperature, options_ptr))


def choose_by_entropy(
    choices: Choices,
    row_slots: torch.Tensor,
    table: SlotTable,
    logits: torch.Tensor,
    first_row: int,
) -> None:
    """Give the PENDING rows among some rows of a step their temperatures (EDT, arXiv 2403.14541).

    Args:
        row_slots: int [rows of the step].
        logits: float32 [some rows, vocabulary], of the rows from `first_row` on.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    parts = logits.new_empty(num_rows, num_blocks, 3)
    _measure_kernel[(num_rows, num_blocks)](
        logits, logits.stride(0), choices.micros, parts, first_row, vocab_size, BLOCK=_BLOCK
    )
    _choose_by_entropy_kernel[(num_rows,)](
        choices.micros,
        row_slots,
        table.options,
        parts,
        first_row,
        num_blocks,
        MAX_NUM_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
