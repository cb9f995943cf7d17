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

from adaptive_head.selector import ORDINARY
from adaptive_head.vllm.compat import check_parameters

# `ChoiceLists` stands in for this one.
check_parameters(SamplingMaskLists.slice_request, "self", "req_idx", "num_positions")


class ChoiceLists:
    """One temperature a sampled token, in the order of the batch.

    Args:
        micros: int32 [num_requests], millionths; -1 for an ordinary request.
    """

    __slots__ = ("_is_adaptive", "_micros")

    def __init__(self, micros: np.ndarray) -> None:
        self._micros = micros
        self._is_adaptive = (micros != ORDINARY).tolist()

    def slice_request(self, req_idx: int, num_positions: int) -> SamplingMaskLists | None:
        """The choices of one request's new tokens; None for an ordinary request.

        Args:
            num_positions: how many of the step's tokens were kept: 1, without speculation.
        """
        assert num_positions == 1
        if not self._is_adaptive[req_idx]:
            return None
        return SamplingMaskLists(self._micros[req_idx : req_idx + 1])

    def __reduce__(self) -> tuple[type["ChoiceLists"], tuple[np.ndarray]]:
        return ChoiceLists, (self._micros,)


@dataclass(frozen=True)
class ChoiceTensors:
    """int32 [num_requests] on the device, for vLLM to copy on its own output stream."""

    micros: torch.Tensor

    def to_cpu_nonblocking(self) -> "ChoiceTensors":
        """Start the copy to the host; vLLM waits for its event before `tolists`."""
        return ChoiceTensors(self.micros.to("cpu", non_blocking=True))

    def tolists(self, _num_sampled: np.ndarray | None = None) -> ChoiceLists:
        """The copied choices."""
        return ChoiceLists(self.micros.numpy())


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
