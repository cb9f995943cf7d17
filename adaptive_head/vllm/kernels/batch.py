"""What the kernels of a step are given, and what they hand on."""

from dataclasses import dataclass

import numpy as np
import torch

# What a row shows instead of its temperature while that waits for the logits.
PENDING = -2
# Instead of the index of one of its temperatures: a head picked none, or gave its fallback.
NO_PICK = -1
FALLBACK_PICK = -2


@dataclass(frozen=True)
class Batch:
    """The rows of one sampling step, as vLLM's V2 runner describes them.

    On the device, but for the two whose names say that they are on the host.

    Attributes:
        slots, slots_np: int [requests], the slot of each.
        row_slots: int [rows], the slot of each row's request.
        starts, starts_np: int32 [requests + 1], each request's first row; None on the host where
            all requests have one row, as they do without drafts.
        logits_indices: int [rows], where among the step's tokens each row is.
        input_ids: int [tokens], what was fed.
        positions: int64 [tokens], its position in its sequence.
        prompt_lens: int32 [slots], tokens in the prompt.
        prefill_lens: int32 [slots], tokens to be fed before the first is sampled.
    """

    slots: torch.Tensor
    slots_np: np.ndarray
    row_slots: torch.Tensor
    starts: torch.Tensor
    starts_np: np.ndarray | None
    logits_indices: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    prompt_lens: torch.Tensor
    prefill_lens: torch.Tensor

    @property
    def has_drafts(self) -> bool:
        return self.starts_np is not None

    @property
    def num_requests(self) -> int:
        return len(self.slots_np)

    @property
    def num_rows(self) -> int:
        return self.logits_indices.shape[0]

    def find_row(self, slot: int) -> int:
        """The first row of the request in a slot."""
        request = int(np.flatnonzero(self.slots_np == slot)[0])
        return request if self.starts_np is None else int(self.starts_np[request])


@dataclass(frozen=True)
class Choices:
    """What was chosen for the rows of a step.

    Attributes:
        micros: int32 [rows], temperatures in millionths; ORDINARY, or PENDING for the logits.
        picks: int32 [rows], which of its temperatures a head picked. FALLBACK_PICK where it
            abstained, now or at the start of a sequence-level answer. NO_PICK for a mean, for a
            choice made earlier, and where no head chose.
    """

    micros: torch.Tensor
    picks: torch.Tensor

    @classmethod
    def make(cls, num_rows: int, device: torch.device) -> "Choices":
        """Allocate the choices of a step; they are not initialised."""
        # Not one tensor for both: Triton compiles again for another alignment.
        micros = torch.empty(num_rows, dtype=torch.int32, device=device)
        return cls(micros, torch.empty_like(micros))
