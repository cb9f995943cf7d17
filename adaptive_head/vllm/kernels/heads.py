"""From a head's logits to one temperature per row: the likeliest, a draw, the mean, or its fallback
where it is unsure."""

import torch
import triton
import triton.language as tl

from adaptive_head.abstention import StatisticIndex
from adaptive_head.head import MAX_NUM_TEMPERATURES
from adaptive_head.slots import Column, SelectionIndex, SlotTable
from adaptive_head.vllm.kernels.batch import FALLBACK_PICK, NO_PICK, Batch, Choices
from adaptive_head.vllm.kernels.temperatures import bound, prefer_chosen

_NO_PICK = tl.constexpr(NO_PICK)
_FALLBACK_PICK = tl.constexpr(FALLBACK_PICK)
_NUM_COLUMNS = tl.constexpr(len(Column))
_SELECTION = tl.constexpr(int(Column.SELECTION))
_SAMPLE = tl.constexpr(float(SelectionIndex.SAMPLE))
_MEAN = tl.constexpr(float(SelectionIndex.MEAN))
_THRESHOLD = tl.constexpr(int(Column.THRESHOLD))
_FALLBACK = tl.constexpr(int(Column.FALLBACK))
_STATISTIC = tl.constexpr(int(Column.STATISTIC))
_MARGIN = tl.constexpr(float(StatisticIndex.MARGIN))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_MAX_CHOICES = tl.constexpr(MAX_NUM_TEMPERATURES)
# The constants of SplitMix64, as in `adaptive_head.head`.
_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _gumbel_noise(seed, position, lane):
    """As `adaptive_head.head.gumbel_noise`: the same draws in any batch, at any batch size."""
    row = _mix(_mix(seed.to(tl.uint64) + _STEP) + position.to(tl.uint64) * _STEP)
    bits = _mix(row + (lane + 1).to(tl.uint64) * _STEP)
    uniform = ((bits >> 40).to(tl.int64).to(tl.float64) + 0.5) * 5.9604644775390625e-08
    return -tl.log(-tl.log(uniform)).to(tl.float32)


@triton.jit
def _is_unsure(scores, lane, threshold, statistic):
    """1 where a distribution's statistic is below the threshold, else 0.

    Args:
        scores: float32 [64], -inf where the head has no temperature.
    """
    peak = tl.max(scores, axis=0)
    total = tl.sum(tl.exp(scores - peak), axis=0)
    others = tl.where(lane == tl.argmax(scores, axis=0), float("-inf"), scores)
    second = tl.exp(tl.max(others, axis=0) - peak)
    value = tl.where(statistic == _MARGIN, 1.0 - second, 1.0) / total
    return (value < threshold).to(tl.int32)


@triton.jit(do_not_specialize=["head_index", "num_choices"])
def _choose_by_head_kernel(
    micros_ptr,
    picks_ptr,
    slots_ptr,
    starts_ptr,
    logits_indices_ptr,
    positions_ptr,
    policies_ptr,
    options_ptr,
    seeds_ptr,
    chosen_ptr,
    has_abstained_ptr,
    scores_ptr,
    temperatures_ptr,
    head_index,
    num_choices,
):
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    if tl.load(policies_ptr + slot) != head_index:
        return
    first_row = tl.load(starts_ptr + request)
    end_row = tl.load(starts_ptr + request + 1)
    chosen = tl.load(chosen_ptr + slot)
    seed = tl.load(seeds_ptr + slot)
    options_ptr += slot * _NUM_COLUMNS
    selection = tl.load(options_ptr + _SELECTION)
    threshold = tl.load(options_ptr + _THRESHOLD)
    fallback = tl.load(options_ptr + _FALLBACK)
    statistic = tl.load(options_ptr + _STATISTIC)
    has_abstained = tl.load(has_abstained_ptr + slot) != 0
    earlier_pick = tl.where(has_abstained, _FALLBACK_PICK, _NO_PICK)
    lane = tl.arange(0, _MAX_CHOICES)
    is_choice = lane < num_choices
    temperatures = tl.load(temperatures_ptr + lane, mask=is_choice, other=0.0)

    for row in range(first_row, end_row):
        scores = tl.load(scores_ptr + row * num_choices + lane, mask=is_choice, other=0.0)
        # A broken hidden state must become neither an index out of bounds nor NaN.
        scores = tl.where(scores == scores, scores, -_LARGEST)
        scores = tl.minimum(tl.maximum(scores, -_LARGEST), _LARGEST)
        scores = tl.where(is_choice, scores, float("-inf"))
        is_unsure = tl.full((), 0, tl.int32)
        if threshold > 0.0:
            is_unsure = _is_unsure(scores, lane, threshold, statistic)
        if selection == _MEAN:
            weights = tl.exp(scores - tl.max(scores, axis=0))
            temperature = tl.sum(weights * temperatures, axis=0) / tl.sum(weights, axis=0)
            pick = tl.full((), _NO_PICK, tl.int32)
        else:
            if selection == _SAMPLE:
                position = tl.load(positions_ptr + tl.load(logits_indices_ptr + row))
                scores = scores + _gumbel_noise(seed, position, lane)
            pick = tl.argmax(scores, axis=0)
            temperature = tl.load(temperatures_ptr + pick)
        temperature = tl.where(is_unsure != 0, fallback, temperature)
        pick = tl.where(is_unsure != 0, _FALLBACK_PICK, pick)
        micro = bound(temperature, options_ptr)
        tl.store(micros_ptr + row, prefer_chosen(chosen, micro))
        tl.store(picks_ptr + row, tl.where(chosen == chosen, earlier_pick, pick))


def choose_by_head(
    choices: Choices,
    batch: Batch,
    table: SlotTable,
    head_index: int,
    scores: torch.Tensor,
    temperatures: torch.Tensor,
) -> None:
    """Choose for the rows of one head's requests; leaves the others alone.

    Args:
        scores: float32 [at least rows, K], contiguous, the head's logits for all rows.
        temperatures: float32 [K].
    """
    _choose_by_head_kernel[(batch.num_requests,)](
        choices.micros,
        choices.picks,
        batch.slots,
        batch.starts,
        batch.logits_indices,
        batch.positions,
        table.policies,
        table.options,
        table.seeds,
        table.chosen,
        table.has_abstained.view(torch.uint8),
        scores,
        temperatures,
        head_index,
        len(temperatures),
        num_warps=1,
    )
