"""One temperature a row, for a batch that mixes policies, heads, levels and bounds.

In plain torch, for vLLM's V1 model runner, and as the reference of the kernels that do the same
for V2 (`adaptive_head.vllm.selector_v2`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from adaptive_head import policies
from adaptive_head.abstention import find_unsure
from adaptive_head.decision import MILLION
from adaptive_head.head import AdaptiveHead, gumbel_noise, select_argmax, select_mean, select_sample
from adaptive_head.slots import ORDINARY, Column, PolicyIndex, SelectionIndex, SlotTable, to_micro
from adaptive_head.transfer import upload


@dataclass(frozen=True)
class Step:
    """What the policies may look at, for the rows of one sampling step.

    Attributes:
        slots: int64 [rows], the slot of each row's request; `slots_np` the same on the host.
        hidden: [rows, d], the tensor that enters the LM head, in the model's dtype.
        logits: float32 [all rows, vocabulary], after masks, bias and penalties; not modified.
        input_ids: int64 [rows], the token that was fed at each row's position.
        positions: int64 [rows], its position in the sequence.
        prompt_lens: int64 [rows], tokens in the prompt.
        is_ready: bool [rows], False for a row whose prefill is unfinished: it samples nothing.
        logits_rows: int64 [rows], where these rows' logits are; None where they are all.
    """

    slots: torch.Tensor
    slots_np: np.ndarray
    hidden: torch.Tensor
    logits: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    prompt_lens: torch.Tensor
    is_ready: torch.Tensor
    logits_rows: torch.Tensor | None = None

    def take(self, rows: torch.Tensor, rows_np: np.ndarray) -> "Step":
        """Some of a whole step's rows. The logits, which only one policy reads, stay."""
        return Step(
            slots=self.slots[rows],
            slots_np=self.slots_np[rows_np],
            hidden=self.hidden[rows],
            logits=self.logits,
            input_ids=self.input_ids[rows],
            positions=self.positions[rows],
            prompt_lens=self.prompt_lens[rows],
            is_ready=self.is_ready[rows],
            logits_rows=rows,
        )


# Temperatures float32 [rows], from a step and its rows of the table of options.
Policy = Callable[[Step, torch.Tensor], torch.Tensor]


class TemperatureSelector(SlotTable):
    """Chooses temperatures for the requests in its slots; heads are moved to its device."""

    def __init__(
        self, heads: Mapping[str, AdaptiveHead], num_slots: int, device: torch.device
    ) -> None:
        self._policies: dict[int, Policy] = {
            PolicyIndex.ENTROPY: self._entropy,
            PolicyIndex.SCHEDULE: self._schedule,
            PolicyIndex.TWO_PHASE: self._two_phase,
            PolicyIndex.CONSTANT: self._constant,
            PolicyIndex.LIST: self._list,
        }
        super().__init__(heads, num_slots, device)

    def add_head(self, name: str, generation: int, head: AdaptiveHead) -> int:
        index = super().add_head(name, generation, head)
        self._policies[index] = self._make_head_policy(index, head)
        return index

    def remove_head(self, name: str, generation: int) -> int | None:
        index = super().remove_head(name, generation)
        if index is not None:
            self._policies[index] = self._forgotten
        return index

    def select(self, step: Step) -> torch.Tensor | None:
        """Choose a temperature for every row.

        Returns:
            float32 [rows] on the device, NaN for rows of ordinary requests, or None where all
            rows are ordinary. Values are whole multiples of 1e-6.
        """
        present = self.find_present(step.slots_np)
        if present == [ORDINARY]:
            return None
        is_sequence_np = self._options_np[step.slots_np, Column.IS_SEQUENCE] != 0
        if (chosen := self._find_chosen(step, is_sequence_np)) is not None:
            return chosen
        options = self.options[step.slots]
        temperatures = self._run_policies(step, options, present)
        temperatures = (temperatures * options[:, Column.SCALE]).clamp(
            options[:, Column.MIN], options[:, Column.MAX]
        )
        is_ordinary = temperatures.isnan()
        temperatures = (to_micro(temperatures) / MILLION).masked_fill(is_ordinary, torch.nan)
        if is_sequence_np.any():
            temperatures = self._keep_sequence_choice(step, options, temperatures)
        return temperatures

    def find_abstained(self, step: Step) -> torch.Tensor | None:
        """Which rows of a step that `select` has seen got their head's fallback.

        Returns:
            bool [rows] on the device, or None where no head of theirs may abstain.
        """
        return self.has_abstained[step.slots] if self.can_abstain(step.slots_np) else None

    def _find_chosen(self, step: Step, is_sequence_np: np.ndarray) -> torch.Tensor | None:
        """The temperatures where every row's was chosen in an earlier step, and nothing is left to
        do; float32 [rows], NaN for ordinary rows. Waits for the device, which is free on a CPU."""
        is_ordinary_np = self._policy_np[step.slots_np] == ORDINARY
        if not (is_ordinary_np | is_sequence_np).all():
            return None
        chosen = self.chosen[step.slots]
        is_chosen_np = ~chosen.isnan().numpy(force=True)
        return chosen if (is_ordinary_np | is_chosen_np).all() else None

    def _run_policies(self, step: Step, options: torch.Tensor, present: list[int]) -> torch.Tensor:
        if len(present) == 1:
            return self._policies[present[0]](step, options)
        temperatures = torch.full((len(options),), torch.nan, device=self.device)
        policies_np = self._policy_np[step.slots_np]
        for index in present:
            if index != ORDINARY:
                rows_np = np.flatnonzero(policies_np == index)
                rows = upload(rows_np, self.device)
                temperatures[rows] = self._policies[index](step.take(rows, rows_np), options[rows])
        return temperatures

    def _keep_sequence_choice(
        self, step: Step, options: torch.Tensor, temperatures: torch.Tensor
    ) -> torch.Tensor:
        """Eq. 8 of arXiv 2411.09661: the choice at the last prompt token holds for the answer."""
        is_sequence = (options[:, Column.IS_SEQUENCE] != 0) & ~temperatures.isnan()
        earlier = self.chosen[step.slots]
        temperatures = torch.where(is_sequence & ~earlier.isnan(), earlier, temperatures)
        self.chosen[step.slots] = torch.where(is_sequence & step.is_ready, temperatures, earlier)
        return temperatures

    def _make_head_policy(self, index: int, head: AdaptiveHead) -> Policy:
        head = head.to(self.device).eval()
        table = torch.tensor(head.config.temperatures, device=self.device)

        def choose(step: Step, options: torch.Tensor) -> torch.Tensor:
            logits = head(step.hidden)
            selections = options[:, Column.SELECTION]
            selections_np = self._options_np[step.slots_np, Column.SELECTION]
            choice = select_argmax(logits)
            if (selections_np == SelectionIndex.SAMPLE).any():
                noise = gumbel_noise(self.seeds[step.slots], step.positions, len(table))
                is_sampled = selections == SelectionIndex.SAMPLE
                choice = torch.where(is_sampled, select_sample(logits, noise), choice)
            temperatures = table[choice]
            is_counted = self.chosen[step.slots].isnan() & step.is_ready
            if (selections_np == SelectionIndex.MEAN).any():
                is_mean = selections == SelectionIndex.MEAN
                temperatures = torch.where(is_mean, select_mean(logits, table), temperatures)
                is_counted &= ~is_mean
            if self.can_abstain(step.slots_np):
                is_unsure = find_unsure(
                    logits, options[:, Column.THRESHOLD], options[:, Column.STATISTIC]
                )
                temperatures = torch.where(is_unsure, options[:, Column.FALLBACK], temperatures)
                is_counted &= ~is_unsure
                # At the token level it is what holds for the latest token.
                is_open = self.chosen[step.slots].isnan()
                self.has_abstained[step.slots] = torch.where(
                    is_open, is_unsure, self.has_abstained[step.slots]
                )
            self.counts[index].index_add_(0, choice, is_counted.long())
            return temperatures

        return choose

    @staticmethod
    def _entropy(step: Step, options: torch.Tensor) -> torch.Tensor:
        rows = step.logits_rows
        logits = step.logits if rows is None else step.logits[rows]
        return policies.entropy_temperature(
            logits, options[:, Column.PARAMETER_0], options[:, Column.PARAMETER_1]
        )

    @staticmethod
    def _schedule(step: Step, options: torch.Tensor) -> torch.Tensor:
        num_generated = step.positions + 1 - step.prompt_lens
        return policies.schedule_temperature(
            num_generated,
            options[:, Column.PARAMETER_0],
            options[:, Column.PARAMETER_1],
            options[:, Column.PARAMETER_2],
        )

    def _two_phase(self, step: Step, options: torch.Tensor) -> torch.Tensor:
        is_answer = self.phases.step(step.slots, step.input_ids, step.positions, step.is_ready)
        return policies.two_phase_temperature(
            is_answer, options[:, Column.PARAMETER_0], options[:, Column.PARAMETER_1]
        )

    @staticmethod
    def _constant(_step: Step, options: torch.Tensor) -> torch.Tensor:
        return options[:, Column.PARAMETER_0]

    def _list(self, step: Step, options: torch.Tensor) -> torch.Tensor:
        num_generated = step.positions + 1 - step.prompt_lens
        return policies.list_temperature(
            num_generated, self.lists, step.slots, options[:, Column.LIST_LEN]
        )

    @staticmethod
    def _forgotten(_step: Step, options: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(options[:, 0])
