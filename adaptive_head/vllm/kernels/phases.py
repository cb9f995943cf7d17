"""Where a two-phase request is: device functions, as `adaptive_head.phases` for a row at a time."""

import triton
import triton.language as tl

from adaptive_head.options import MAX_MARKER_TOKENS
from adaptive_head.phases import END, NOTHING, START

_NOTHING = tl.constexpr(NOTHING)
_END = tl.constexpr(END)
_START = tl.constexpr(START)
_WINDOW = tl.constexpr(MAX_MARKER_TOKENS)


@triton.jit
def load_window(
    recent_ptr,
    logits_indices_ptr,
    input_ids_ptr,
    positions_ptr,
    first_position,
    first_row,
    num_read,
):
    """int64 [8]: a request's latest tokens, once `num_read` of the step's inputs have been read.

    Args:
        first_position: that of the first token that counts.
    """
    lane = tl.arange(0, _WINDOW)
    place = lane + num_read
    earlier = tl.load(recent_ptr + place, mask=place < _WINDOW, other=_NOTHING)
    is_input = place >= _WINDOW
    row = first_row + place - _WINDOW
    index = tl.load(logits_indices_ptr + row, mask=is_input, other=0)
    token = tl.load(input_ids_ptr + index, mask=is_input, other=0).to(tl.int64)
    position = tl.load(positions_ptr + index, mask=is_input, other=0)
    token = tl.where(position >= first_position, token, _NOTHING)
    return tl.where(is_input, token, earlier)


@triton.jit
def _ends_with(window, marker_ptr):
    """Whether the window ends with a marker; never with one that is empty."""
    marker = tl.load(marker_ptr + tl.arange(0, _WINDOW))
    is_match = (marker == window) | (marker == _NOTHING)
    has_marker = tl.load(marker_ptr + _WINDOW - 1) != _NOTHING
    return (tl.min(is_match.to(tl.int32), axis=0) != 0) & has_marker


@triton.jit
def read_token(
    is_answer,
    markers_ptr,
    recent_ptr,
    logits_indices_ptr,
    input_ids_ptr,
    positions_ptr,
    first_position,
    first_row,
    num_read,
):
    """1 if the token after `num_read` inputs of the step belongs to the answer, else 0.

    Args:
        is_answer: the same after one input less. Where both markers end, the answer begins.
        first_position: as in `load_window`.
    """
    window = load_window(
        recent_ptr,
        logits_indices_ptr,
        input_ids_ptr,
        positions_ptr,
        first_position,
        first_row,
        num_read,
    )
    is_end = _ends_with(window, markers_ptr + _END * _WINDOW)
    is_start = _ends_with(window, markers_ptr + _START * _WINDOW)
    return tl.where(is_end, 1, tl.where(is_start, 0, is_answer))
