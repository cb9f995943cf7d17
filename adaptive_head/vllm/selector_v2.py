"""One temperature a row, on the device: heads beside the LM head, and a kernel for each policy."""

from collections.abc import Mapping

import numpy as np
import torch

from adaptive_head.head import AdaptiveHead
from adaptive_head.slots import ORDINARY, PolicyIndex, SlotTable
from adaptive_head.vllm.head_runner import HeadRunner, HiddenRows, SideStream
from adaptive_head.vllm.kernels import (
    FALLBACK_PICK,
    Batch,
    Choices,
    choose_by_entropy,
    choose_by_head,
    choose_by_policy,
    commit,
    scale_logits,
)


class DeviceSelector(SlotTable):
    """Chooses temperatures for the requests in vLLM's slots. Nothing waits for the host, and a step
    of ordinary requests launches nothing, unless one has taken an adaptive request's slot.

    A step is `begin`, before the logits; then for the rows of each part of the logits
    `choose_by_logits`; then `end`, once it is known what was sampled.

    Args:
        rows: where the heads find the step's hidden states.
        is_replicated: other ranks choose as well, and what rank 0 chose counts: slots are moved
            on in `end` only.
    """

    def __init__(
        self,
        heads: Mapping[str, AdaptiveHead],
        num_slots: int,
        rows: HiddenRows,
        is_replicated: bool = False,
    ) -> None:
        device = rows.buffer.device
        self._rows = rows
        self._stream = SideStream(device)
        self._is_replicated = is_replicated
        self._runners: dict[int, HeadRunner] = {}
        super().__init__(heads, num_slots, device)

    def add_head(self, name: str, generation: int, head: AdaptiveHead) -> int:
        runner = HeadRunner(head, self._rows, self._stream)
        index = super().add_head(name, generation, head)
        self._runners[index] = runner
        return index

    def remove_head(self, name: str, generation: int) -> int | None:
        index = super().remove_head(name, generation)
        if index is not None:
            del self._runners[index]
        return index

    def reserve(self) -> torch.Tensor:
        """As many bytes as a step may allocate for its heads, which run one after the other."""
        num_bytes = max((runner.reserve_bytes for runner in self._runners.values()), default=0)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def begin(self, hidden_states: torch.Tensor, batch: Batch) -> "SelectedStep | None":
        """Choose for a step's rows, on the side stream, all but what needs the logits.

        Args:
            hidden_states: [tokens, d], the tensor that enters the LM head. May be the static
                output of a CUDA graph: it is read before `SelectedStep.join` returns.

        Returns:
            None where all requests are ordinary.
        """
        present = self.find_present(batch.slots_np)
        if present == [ORDINARY]:
            return None
        # Made on the current stream, which joins before they can be freed.
        choices = Choices.make(batch.num_rows, self.device)
        has_entropy = PolicyIndex.ENTROPY in present
        is_late = batch.has_drafts or has_entropy or self._is_replicated
        runners = {index: self._runners[index] for index in present if index in self._runners}
        with self._stream.fork():
            if len(runners) != 1 or len(present) != 1:
                choose_by_policy(choices, batch, self)
            if runners:
                hidden = self._rows.gather(hidden_states, batch.logits_indices)
                for index, runner in runners.items():
                    scores = runner.run(hidden)
                    choose_by_head(choices, batch, self, index, scores, runner.temperatures)
            if not is_late:
                commit(choices, batch, self, None)
        can_abstain = self.can_abstain(batch.slots_np)
        return SelectedStep(self, batch, choices, self._stream, has_entropy, is_late, can_abstain)

    def warm_up(self, vocab_size: int) -> None:
        """Compile every kernel, which would otherwise hold up the first requests. Slot 0 is empty.

        With the dtypes of vLLM's tensors, which a kernel is compiled for.
        """
        zeros = torch.zeros(1, dtype=torch.int64, device=self.device)
        lens = torch.zeros(len(self.policies), dtype=torch.int32, device=self.device)
        batch = Batch(
            slots=zeros,
            slots_np=np.zeros(1, dtype=np.intp),
            row_slots=zeros,
            starts=torch.tensor([0, 1], dtype=torch.int32, device=self.device),
            starts_np=None,
            logits_indices=zeros,
            input_ids=zeros.int(),
            positions=zeros,
            prompt_lens=lens,
            prefill_lens=lens,
        )
        choices = Choices.make(1, self.device)
        scores = torch.zeros(1, 2, device=self.device)
        logits = torch.zeros(1, vocab_size, device=self.device)
        choose_by_policy(choices, batch, self)
        choose_by_head(choices, batch, self, PolicyIndex.FIRST_HEAD, scores, scores[0])
        choose_by_entropy(choices, batch.row_slots, self, logits, 0)
        scale_logits(logits, choices.micros, 0)
        for num_sampled in (None, batch.input_ids):
            commit(choices, batch, self, num_sampled)


class SelectedStep:
    """The choices of one step, on their way.

    Attributes:
        micros: int32 [rows], see `Choices`; complete once every row's logits have been shown.
    """

    def __init__(
        self,
        table: SlotTable,
        batch: Batch,
        choices: Choices,
        stream: SideStream,
        has_entropy: bool,
        is_late: bool,
        can_abstain: bool,
    ) -> None:
        self.batch = batch
        self.micros = choices.micros
        self._table = table
        self._choices = choices
        self._stream = stream
        self._has_entropy = has_entropy
        self._is_late = is_late
        self._can_abstain = can_abstain

    def join(self) -> None:
        """Let the current stream wait for the choices."""
        self._stream.join()

    def choose_by_logits(self, logits: torch.Tensor, first_row: int) -> None:
        """Choose for the rows that waited for their logits, float32 [some rows, vocabulary]."""
        if self._has_entropy:
            choose_by_entropy(self._choices, self.batch.row_slots, self._table, logits, first_row)

    def find_abstained(self) -> torch.Tensor | None:
        """Which rows got their head's fallback: bool [rows], or None where no head may abstain."""
        return self._choices.picks == FALLBACK_PICK if self._can_abstain else None

    def end(self, num_sampled: torch.Tensor) -> None:
        """Advance each slot's state by the accepted tokens.

        Args:
            num_sampled: int32 [requests], how many rows became tokens.
        """
        if self._is_late:
            commit(self._choices, self.batch, self._table, num_sampled)
