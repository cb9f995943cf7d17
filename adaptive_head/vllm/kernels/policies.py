"""The learning-free policies, but for entropy, which wants the logits: a temperature a row."""

import torch
import triton
import triton.language as tl

from adaptive_head.options import MAX_MARKER_TOKENS
from adaptive_head.parameters import MAX_LIST_LEN
from adaptive_head.slots import ORDINARY, Column, PolicyIndex, SlotTable
from adaptive_head.vllm.kernels.batch import NO_PICK, PENDING, Batch, Choices
from adaptive_head.vllm.kernels.phases import read_token
from adaptive_head.vllm.kernels.temperatures import bound, prefer_chosen

_ORDINARY = tl.constexpr(ORDINARY)
_PENDING = tl.constexpr(PENDING)
_NO_PICK = tl.constexpr(NO_PICK)
_NUM_COLUMNS = tl.constexpr(len(Column))
_PARAMETER_0 = tl.constexpr(int(Column.PARAMETER_0))
_PARAMETER_1 = tl.constexpr(int(Column.PARAMETER_1))
_PARAMETER_2 = tl.constexpr(int(Column.PARAMETER_2))
_ENTROPY = tl.constexpr(int(PolicyIndex.ENTROPY))
_SCHEDULE = tl.constexpr(int(PolicyIndex.SCHEDULE))
_TWO_PHASE = tl.constexpr(int(PolicyIndex.TWO_PHASE))
_LIST = tl.constexpr(int(PolicyIndex.LIST))
_FIRST_HEAD = tl.constexpr(int(PolicyIndex.FIRST_HEAD))
_LIST_LEN = tl.constexpr(int(Column.LIST_LEN))
_MAX_LIST_LEN = tl.constexpr(MAX_LIST_LEN)
_WINDOW = tl.constexpr(MAX_MARKER_TOKENS)


@triton.jit
def _choose_by_policy_kernel(
    micros_ptr,
    picks_ptr,
    slots_ptr,
    starts_ptr,
    logits_indices_ptr,
    input_ids_ptr,
    positions_ptr,
    prompt_lens_ptr,
    policies_ptr,
    options_ptr,
    chosen_ptr,
    lists_ptr,
    markers_ptr,
    recent_ptr,
    first_positions_ptr,
    is_answer_ptr,
):
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    first_row = tl.load(starts_ptr + request)
    end_row = tl.load(starts_ptr + request + 1)
    policy = tl.load(policies_ptr + slot)
    chosen = tl.load(chosen_ptr + slot)
    prompt_len = tl.load(prompt_lens_ptr + slot)
    first_position = tl.load(first_positions_ptr + slot)
    is_answer = tl.load(is_answer_ptr + slot).to(tl.int32)
    options_ptr += slot * _NUM_COLUMNS
    markers_ptr += slot * 2 * _WINDOW
    recent_ptr += slot * _WINDOW
    lists_ptr += slot * _MAX_LIST_LEN
    parameter_0 = tl.load(options_ptr + _PARAMETER_0)
    parameter_1 = tl.load(options_ptr + _PARAMETER_1)
    parameter_2 = tl.load(options_ptr + _PARAMETER_2)

    for row in range(first_row, end_row):
        temperature = parameter_0
        if policy == _SCHEDULE:
            position = tl.load(positions_ptr + tl.load(logits_indices_ptr + row))
            num_generated = (position + 1 - prompt_len).to(tl.float32)
            share = tl.minimum(tl.maximum(num_generated / parameter_2, 0.0), 1.0)
            # As torch.lerp, which is exact at both ends.
            span = parameter_1 - parameter_0
            rising = parameter_0 + span * share
            falling = parameter_1 - span * (1.0 - share)
            temperature = tl.where(share < 0.5, rising, falling)
        if policy == _LIST:
            position = tl.load(positions_ptr + tl.load(logits_indices_ptr + row))
            last = tl.load(options_ptr + _LIST_LEN).to(tl.int64) - 1
            place = tl.minimum(position + 1 - prompt_len, last)
            temperature = tl.load(lists_ptr + tl.maximum(place, 0))
        if policy == _TWO_PHASE:
            is_answer = read_token(
                is_answer,
                markers_ptr,
                recent_ptr,
                logits_indices_ptr,
                input_ids_ptr,
                positions_ptr,
                first_position,
                first_row,
                row - first_row + 1,
            )
            temperature = tl.where(is_answer != 0, parameter_1, parameter_0)
        # A head's kernel overwrites this, unless the head is gone and its request aborted.
        temperature = tl.where(policy >= _FIRST_HEAD, 1.0, temperature)
        micro = bound(temperature, options_ptr)
        micro = tl.where(policy == _ENTROPY, _PENDING, micro)
        micro = prefer_chosen(chosen, micro)
        tl.store(micros_ptr + row, tl.where(policy == _ORDINARY, _ORDINARY, micro))
        tl.store(picks_ptr + row, _NO_PICK)


def choose_by_policy(choices: Choices, batch: Batch, table: SlotTable) -> None:
    """Choose for every row of `batch`: ordinary rows, and those of the learning-free policies.

    Rows of the entropy policy become PENDING, those of heads 1, both unless a sequence-level
    choice has been made.
    """
    phases = table.phases
    _choose_by_policy_kernel[(batch.num_requests,)](
        choices.micros,
        choices.picks,
        batch.slots,
        batch.starts,
        batch.logits_indices,
        batch.input_ids,
        batch.positions,
        batch.prompt_lens,
        table.policies,
        table.options,
        table.chosen,
        table.lists,
        phases.markers,
        phases.recent,
        phases.first_positions,
        phases.is_answer.view(torch.uint8),
        num_warps=1,
    )
