"""Whether each two-phase request is still thinking: markers of several tokens, found on device.

What the model writes counts, and the end of its prompt where that begins its answer: a marker in
an example or an earlier turn says nothing. The host reads what is there once (`start_phase`), the
device the tokens that follow (`step`), each of them as the input of the step that samples its
successor.
"""

from collections.abc import Sequence

import numpy as np
import torch

from adaptive_head.options import MAX_MARKER_TOKENS
from adaptive_head.transfer import upload

# No token's id: it fills markers up, where it matches anything, and windows without a history.
NOTHING = -1
END, START = 0, 1


class PhaseTracker:
    """Follows the two-phase requests in its slots.

    Args:
        num_slots: how many requests can be tracked at once.
        device: where the tensors of the steps live.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.device = device
        shape = (num_slots, 2, MAX_MARKER_TOKENS)
        self._markers_np = np.full(shape, NOTHING, dtype=np.int64)
        self._num_written_np = np.zeros(num_slots, dtype=np.int64)
        self._staged: set[int] = set()
        # int64 [slots, 2, 8]: END and START, right-aligned; all NOTHING where there is none.
        self.markers = torch.full(shape, NOTHING, dtype=torch.int64, device=device)
        # int64 [slots, 8]: the latest tokens, the newest last, without the one to be fed next.
        self.recent = torch.full_like(self.markers[:, 0], NOTHING)
        # int64 [slots], the position of the first token that counts.
        self.first_positions = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.is_answer = torch.zeros(num_slots, dtype=torch.bool, device=device)

    def grow(self) -> None:
        """Double the number of slots, keeping what they hold."""
        nothing = np.full_like(self._markers_np, NOTHING)
        self._markers_np = np.concatenate([self._markers_np, nothing])
        no_numbers = np.zeros_like(self._num_written_np)
        self._num_written_np = np.concatenate([self._num_written_np, no_numbers])
        self.markers = torch.cat([self.markers, torch.full_like(self.markers, NOTHING)])
        self.recent = torch.cat([self.recent, torch.full_like(self.recent, NOTHING)])
        no_positions = torch.zeros_like(self.first_positions)
        self.first_positions = torch.cat([self.first_positions, no_positions])
        self.is_answer = torch.cat([self.is_answer, torch.zeros_like(self.is_answer)])

    def add(self, slot: int, marker: Sequence[int], start: Sequence[int], num_written: int) -> None:
        """Stage a request that enters a slot, whatever was there before.

        Args:
            marker: up to 8 token ids that end the thinking; empty for none.
            start: up to 8 token ids that begin it again; empty for none.
            num_written: how many of the prompt's last tokens count.
        """
        self._markers_np[slot, END] = _align(marker)
        self._markers_np[slot, START] = _align(start)
        self._num_written_np[slot] = num_written
        self._staged.add(slot)

    def flush(self) -> None:
        """Copy what was staged to the device, without waiting for it. All of it thinks."""
        if not self._staged:
            return
        slots_np = np.fromiter(self._staged, dtype=np.int64)
        self._staged.clear()
        slots = upload(slots_np, self.device)
        self.markers.index_copy_(0, slots, upload(self._markers_np[slots_np], self.device))
        self.recent.index_fill_(0, slots, NOTHING)
        self.first_positions.index_fill_(0, slots, 0)
        self.is_answer.index_fill_(0, slots, False)

    def start_phase(self, slot: int, token_ids: Sequence[int], prompt_len: int) -> None:
        """Read a request's context: the phase is that of the marker that ends last in it.

        Call after `flush`. The last token is left to the first ready step, which is fed it.

        Args:
            token_ids: the prompt, and what a resumed request has generated.
            prompt_len: tokens in the prompt.
        """
        first = max(0, prompt_len - int(self._num_written_np[slot]))
        self.first_positions[slot].fill_(first)
        context = np.asarray(token_ids[first:], dtype=np.int64)
        end, start = (_find_last(marker, context) for marker in self._markers_np[slot])
        self.is_answer[slot].fill_(end >= start and end > 0)
        self.recent[slot].copy_(upload(_align(context[:-1]), self.device))

    def step(
        self,
        slots: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        is_ready: torch.Tensor,
    ) -> torch.Tensor:
        """Read one more token of each row.

        A row that is not ready shows one token of many that the host has read, and a token must
        be read once: it changes nothing.

        Args:
            slots: int64 [rows].
            input_ids: int [rows], the token that was fed at each row's position.
            positions: int64 [rows].
            is_ready: bool [rows].

        Returns:
            bool [rows], whether the token to be sampled belongs to the answer. Of two markers
            that end at the same token, as unknown words may, the end of thinking counts.
        """
        earlier_recent, earlier = self.recent[slots], self.is_answer[slots]
        is_counted = positions >= self.first_positions[slots]
        read = torch.where(is_counted, input_ids.long(), NOTHING)
        recent = torch.cat([earlier_recent[:, 1:], read.unsqueeze(1)], dim=1)
        markers = self.markers[slots]
        is_match = (markers == recent.unsqueeze(1)) | (markers == NOTHING)
        is_found = is_match.all(dim=-1) & (markers[..., -1] != NOTHING)
        is_answer = is_found[:, END] | (earlier & ~is_found[:, START])
        is_answer = torch.where(is_ready, is_answer, earlier)
        self.recent[slots] = torch.where(is_ready.unsqueeze(1), recent, earlier_recent)
        self.is_answer[slots] = is_answer
        return is_answer


def _align(token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The last 8 tokens, NOTHING before them where they are fewer; int64 [8], a new array."""
    aligned = np.full(MAX_MARKER_TOKENS, NOTHING, dtype=np.int64)
    count = min(len(token_ids), MAX_MARKER_TOKENS)
    aligned[MAX_MARKER_TOKENS - count :] = token_ids[len(token_ids) - count :]
    return aligned


def _find_last(aligned: np.ndarray, context: np.ndarray) -> int:
    """How many tokens of the context precede the last end of a marker; 0 without one.

    Args:
        aligned: int64 [8].
        context: int64 [tokens].
    """
    marker = aligned[aligned != NOTHING]
    num_places = len(context) - len(marker) + 1
    if not len(marker) or num_places < 1:
        return 0
    is_match = np.ones(num_places, dtype=np.bool_)
    for offset, token in enumerate(marker):
        is_match &= context[offset : offset + num_places] == token
    places = np.flatnonzero(is_match)
    return int(places[-1]) + len(marker) if len(places) else 0
