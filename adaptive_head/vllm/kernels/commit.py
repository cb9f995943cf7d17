"""What a step leaves behind: sequence-level choices, phases, counts."""

import torch
import triton
import triton.language as tl

from adaptive_head.decision import MILLION
from adaptive_head.head import MAX_NUM_TEMPERATURES
from adaptive_head.options import MAX_MARKER_TOKENS
from adaptive_head.slots import ORDINARY, Column, PolicyIndex, SlotTable
from adaptive_head.vllm.kernels.batch import FALLBACK_PICK, Batch, Choices
from adaptive_head.vllm.kernels.phases import load_window, read_token

_ORDINARY = tl.constexpr(ORDINARY)
_FALLBACK_PICK = tl.constexpr(FALLBACK_PICK)
_MILLION = tl.constexpr(float(MILLION))
_NUM_COLUMNS = tl.constexpr(len(Column))
_IS_SEQUENCE = tl.constexpr(int(Column.IS_SEQUENCE))
_TWO_PHASE = tl.constexpr(int(PolicyIndex.TWO_PHASE))
_WINDOW = tl.constexpr(MAX_MARKER_TOKENS)
_MAX_CHOICES = tl.constexpr(MAX_NUM_TEMPERATURES)


@triton.jit
def _commit_kernel(
    micros_ptr,
    picks_ptr,
    slots_ptr,
    starts_ptr,
    logits_indices_ptr,
    input_ids_ptr,
    positions_ptr,
    prefill_lens_ptr,
    num_sampled_ptr,
    policies_ptr,
    options_ptr,
    chosen_ptr,
    has_abstained_ptr,
    markers_ptr,
    recent_ptr,
    first_positions_ptr,
    is_answer_ptr,
    counts_ptr,
):
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    policy = tl.load(policies_ptr + slot)
    if policy == _ORDINARY:
        return
    first_row = tl.load(starts_ptr + request)
    if num_sampled_ptr is not None:
        num_sampled = tl.load(num_sampled_ptr + request).to(tl.int32)
    else:
        # One row: it becomes a token as soon as the prefill is over.
        position = tl.load(positions_ptr + tl.load(logits_indices_ptr + first_row))
        num_sampled = (position + 1 >= tl.load(prefill_lens_ptr + slot)).to(tl.int32)
    if num_sampled == 0:
        return

    # Eq. 8 of arXiv 2411.09661: the choice at the last prompt token holds for the answer.
    is_sequence = tl.load(options_ptr + slot * _NUM_COLUMNS + _IS_SEQUENCE) != 0.0
    chosen = tl.load(chosen_ptr + slot)
    first = tl.div_rn(tl.load(micros_ptr + first_row).to(tl.float32), _MILLION)
    is_new = is_sequence & (chosen != chosen)
    tl.store(chosen_ptr + slot, first, mask=is_new)
    has_abstained = tl.load(picks_ptr + first_row) == _FALLBACK_PICK
    tl.store(has_abstained_ptr + slot, has_abstained.to(tl.uint8), mask=is_new)

    for row in range(first_row, first_row + num_sampled):
        pick = tl.load(picks_ptr + row)
        place = counts_ptr + policy * _MAX_CHOICES + pick
        tl.atomic_add(place, tl.full((), 1, tl.int64), mask=pick >= 0, sem="relaxed")

    if policy == _TWO_PHASE:
        slot_markers_ptr = markers_ptr + slot * 2 * _WINDOW
        slot_recent_ptr = recent_ptr + slot * _WINDOW
        first_position = tl.load(first_positions_ptr + slot)
        is_answer = tl.load(is_answer_ptr + slot).to(tl.int32)
        for num_read in range(1, num_sampled + 1):
            is_answer = read_token(
                is_answer,
                slot_markers_ptr,
                slot_recent_ptr,
                logits_indices_ptr,
                input_ids_ptr,
                positions_ptr,
                first_position,
                first_row,
                num_read,
            )
        window = load_window(
            slot_recent_ptr,
            logits_indices_ptr,
            input_ids_ptr,
            positions_ptr,
            first_position,
            first_row,
            num_sampled,
        )
        # Each lane writes what another one reads.
        tl.debug_barrier()
        tl.store(slot_recent_ptr + tl.arange(0, _WINDOW), window)
        tl.store(is_answer_ptr + slot, is_answer.to(tl.uint8))


def commit(
    choices: Choices, batch: Batch, table: SlotTable, num_sampled: torch.Tensor | None
) -> None:
    """Advance each slot's state (sequence choice, phase, counts) by the accepted tokens.

    Args:
        num_sampled: int32 [requests], how many rows became tokens; None in a step without drafts,
            where a row does if its prefill is over.
    """
    phases = table.phases
    _commit_kernel[(batch.num_requests,)](
        choices.micros,
        choices.picks,
        batch.slots,
        batch.starts,
        batch.logits_indices,
        batch.input_ids,
        batch.positions,
        batch.prefill_lens,
        num_sampled,
        table.policies,
        table.options,
        table.chosen,
        table.has_abstained.view(torch.uint8),
        phases.markers,
        phases.recent,
        phases.first_positions,
        phases.is_answer.view(torch.uint8),
        table.counts,
        num_warps=1,
    )
