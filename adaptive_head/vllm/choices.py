"""The chosen temperatures on their way to the API process.

They ride in the place of vLLM's sampling masks, its one channel that carries a varying payload
a token and that vLLM itself slices by accepted tokens, trims at stop strings and merges over
skipped stream outputs. `ChoiceTensors` stands where V2 expects its `SamplingMaskTensors`,
`ChoiceLists` where the scheduler expects `SamplingMaskLists`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.outputs import CompletionOutput
from vllm.v1.outputs import SamplingMaskLists

from adaptive_head.slots import ORDINARY
from adaptive_head.vllm.compat import check_parameters

# `ChoiceLists` stands in for this one.
check_parameters(SamplingMaskLists.slice_request, "self", "req_idx", "num_positions")


class ChoiceLists:
    """The temperatures of one step's tokens, in the order of the batch.

    Args:
        micros: int32 [rows], millionths; -1 for an ordinary request. Rows of drafts that were
            rejected are among them, and are never asked for.
        starts: int [num_requests + 1], each request's first row; None where all have one.
    """

    __slots__ = ("_is_adaptive", "_micros", "_starts")

    def __init__(self, micros: np.ndarray, starts: np.ndarray | None = None) -> None:
        self._micros = micros
        self._starts = None if starts is None else starts.tolist()
        first = micros if starts is None else micros[starts[:-1]]
        self._is_adaptive = (first != ORDINARY).tolist()

    def slice_request(self, req_idx: int, num_positions: int) -> SamplingMaskLists | None:
        """The choices of one request's new tokens; None for an ordinary request.

        Args:
            num_positions: how many of the step's tokens were kept.
        """
        if not self._is_adaptive[req_idx]:
            return None
        start = req_idx if self._starts is None else self._starts[req_idx]
        micros = self._micros[start : start + num_positions]
        offsets = None if num_positions == 1 else np.arange(num_positions + 1)
        return SamplingMaskLists(micros, offsets)

    def __reduce__(self) -> tuple[type["ChoiceLists"], tuple[np.ndarray, np.ndarray | None]]:
        starts = None if self._starts is None else np.array(self._starts)
        return ChoiceLists, (self._micros, starts)


@dataclass(frozen=True)
class ChoiceTensors:
    """A step's temperatures on the device, for vLLM to copy on its own output stream.

    Attributes:
        micros: int32 [rows], as in `ChoiceLists`.
        starts: on the host, as in `ChoiceLists`.
    """

    micros: torch.Tensor
    starts: np.ndarray | None = None

    def to_cpu_nonblocking(self) -> "ChoiceTensors":
        """Start the copy to the host; vLLM waits for its event before `tolists`."""
        return ChoiceTensors(self.micros.to("cpu", non_blocking=True), self.starts)

    def tolists(self, _num_sampled: np.ndarray | None = None) -> ChoiceLists:
        """The copied choices."""
        return ChoiceLists(self.micros.numpy(), self.starts)


def take_choices(output: CompletionOutput) -> list[int] | None:
    """Remove and return the temperatures of an output's tokens, in millionths.

    Removed, because other readers of the field would take them for sampling masks.

    Returns:
        One a token of `output.token_ids`, or None where the output carries none.
    """
    mask = output.sampling_mask
    if mask is None:
        return None
    output.sampling_mask = None
    return [micro for (micro,) in mask.token_ids]
