"""The division of logits by their rows' temperatures. Ordinary rows are not read."""

import torch
import triton
import triton.language as tl

from adaptive_head.decision import MILLION

# As vLLM's own kernel for fixed temperatures.
_BLOCK = 8192
_MILLION = tl.constexpr(float(MILLION))


@triton.jit(do_not_specialize=["first_row"])
def _scale_kernel(
    logits_ptr,
    logits_stride,
    micros_ptr,
    peaks_ptr,
    peak_tokens_ptr,
    first_row,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    micro = tl.load(micros_ptr + first_row + row)
    if (micro < 0) | (micro == _MILLION):
        return
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    place = logits_ptr + row * logits_stride + token
    logits = tl.load(place, mask=is_token, other=float("-inf"))
    if micro > 0:
        # As in vLLM's own kernel, so that 0.7 is 0.7 whoever has chosen it.
        temperature = tl.div_rn(micro.to(tl.float32), _MILLION)
        tl.store(place, logits / temperature, mask=is_token)
    else:
        # NaN breaks the index of a maximum.
        logits = tl.where(logits == logits, logits, float("-inf"))
        peak, index = tl.max(logits, axis=0, return_indices=True)
        part = row * tl.num_programs(1) + block
        tl.store(peaks_ptr + part, peak)
        tl.store(peak_tokens_ptr + part, block * BLOCK + index)
        tl.store(place, tl.full((BLOCK,), float("-inf"), tl.float32), mask=is_token)


@triton.jit(do_not_specialize=["first_row"])
def _keep_peak_kernel(
    logits_ptr,
    logits_stride,
    micros_ptr,
    peaks_ptr,
    peak_tokens_ptr,
    first_row,
    num_blocks,
    MAX_NUM_BLOCKS: tl.constexpr,
):
    """Put a greedy row's maximum back, the first of equals."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(micros_ptr + first_row + row) != 0:
        return
    block = tl.arange(0, MAX_NUM_BLOCKS)
    part_ptr = peaks_ptr + row * num_blocks + block
    peaks = tl.load(part_ptr, mask=block < num_blocks, other=float("-inf"))
    peak, index = tl.max(peaks, axis=0, return_indices=True)
    token = tl.load(peak_tokens_ptr + row * num_blocks + index)
    tl.store(logits_ptr + row * logits_stride + token, peak)


def scale_logits(logits: torch.Tensor, micros: torch.Tensor, first_row: int) -> None:
    """Divide rows by their temperatures, in place.

    A temperature of 0 leaves only a row's maximum, the first of equals, so that whatever is sampled
    is the greedy token. Ordinary rows stay as they are.

    Args:
        logits: float32 [some rows, vocabulary], of the rows from `first_row` on.
        micros: int32 [rows of the step], see `Choices`.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    peaks = logits.new_empty(num_rows, num_blocks)
    peak_tokens = torch.empty_like(peaks, dtype=torch.int32)
    _scale_kernel[(num_rows, num_blocks)](
        logits,
        logits.stride(0),
        micros,
        peaks,
        peak_tokens,
        first_row,
        vocab_size,
        BLOCK=_BLOCK,
    )
    _keep_peak_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        micros,
        peaks,
        peak_tokens,
        first_row,
        num_blocks,
        MAX_NUM_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
