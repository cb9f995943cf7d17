"""The temperature stage for vLLM's V2 sampler."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.states import RequestState

from adaptive_head.slots import ParkedChoice
from adaptive_head.vllm.compat import check_parameters
from adaptive_head.vllm.heads import read_options
from adaptive_head.vllm.kernels import Batch, scale_logits
from adaptive_head.vllm.ranks import adopt_choices
from adaptive_head.vllm.selector_v2 import DeviceSelector, SelectedStep
from adaptive_head.vllm.wire import DecisionTensors, pack_decisions

check_parameters(LogitsProcessor.add_request, "self", "req_idx", "sampling_params")
check_parameters(LogitsProcessor.apply_staged_writes, "self")
check_parameters(LogitsProcessor.apply, "self", "logits", "ctx")


class AdaptiveTemperature(LogitsProcessor):
    """Divides each adaptive row by the temperature chosen for it.

    It stands last among the logits processors: after grammar, bias, penalties and bad words,
    before min-p, top-k and top-p. An adaptive request's own temperature is 1, so vLLM's stage
    for fixed temperatures leaves its row alone.

    Args:
        req_states: the model runner's slots.
        seeds: vLLM's for these slots, the request's own or a random one.
        selector: with as many slots.
    """

    def __init__(
        self, req_states: RequestState, seeds: UvaBackedTensor, selector: DeviceSelector
    ) -> None:
        self._req_states = req_states
        self._seeds = seeds
        self.selector = selector
        # Sequence-level choices of preempted requests, by request id.
        self._parked: dict[str, ParkedChoice] = {}
        self._step: SelectedStep | None = None

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        options = read_options(sampling_params, self.selector)
        # Use vLLM's seed, not our own: its random stream must advance identically on every rank.
        return self.selector.add(req_idx, options, int(self._seeds.np[req_idx]))

    def apply_staged_writes(self) -> None:
        self.selector.flush()

    def resume(self, req_id: str, slot: int, token_ids: list[int], prompt_len: int) -> None:
        """Tell a request that entered `slot` what came before: its text, and its choice.

        Args:
            token_ids: the prompt, and what the request has generated.
            prompt_len: tokens in the prompt.
        """
        if self.selector.is_adaptive(slot):
            self.selector.start_phase(slot, token_ids, prompt_len)
            if (parked := self._parked.pop(req_id, None)) is not None:
                self.selector.restore(slot, parked)

    def park(self, req_id: str, slot: int | None) -> None:
        """Keep the choice of a request that is preempted."""
        if slot is not None and self.selector.is_adaptive(slot):
            self._parked[req_id] = self.selector.park(slot)

    def forget(self, req_id: str) -> None:
        """A request has ended, or was aborted while it was preempted."""
        self._parked.pop(req_id, None)

    @contextmanager
    def sampling(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> Iterator[None]:
        """Choose for a step's rows, beside what vLLM does with them inside the block.

        Outside of it (vLLM's profiling and warm-up) every request is ordinary.

        Args:
            hidden_states: [tokens, d].
        """
        self._step = self.selector.begin(hidden_states, self._describe(input_batch))
        try:
            yield
        finally:
            if self._step is not None:
                self._step.join()
            self._step = None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Scale the adaptive rows of float32 logits [rows, vocabulary] in place.

        vLLM verifies large batches of drafts in parts, and does not show those that need nothing.
        """
        if self._step is None:
            return logits
        first_row = self._step.batch.find_row(ctx.idx_mapping_np[0])
        end_row = first_row + logits.shape[0]
        self._step.join()
        self._step.choose_by_logits(logits, first_row)
        # Here and not on the side stream: no two collectives of a rank may run at once.
        adopt_choices(self._step.micros[first_row:end_row])
        scale_logits(logits, self._step.micros, first_row)
        return logits

    def take_decisions(self, num_sampled: torch.Tensor) -> DecisionTensors | None:
        """What was chosen in this step, or None where no request was adaptive.

        Args:
            num_sampled: int32 [requests], how many of each request's rows became tokens.
        """
        if self._step is None:
            return None
        self._step.end(num_sampled)
        decisions = pack_decisions(self._step.micros, self._step.find_abstained())
        return DecisionTensors(decisions, self._step.batch.starts_np)

    def _describe(self, batch: InputBatch) -> Batch:
        return Batch(
            slots=batch.idx_mapping,
            slots_np=batch.idx_mapping_np,
            row_slots=batch.expanded_idx_mapping,
            starts=batch.cu_num_logits,
            starts_np=batch.cu_num_logits_np if batch.num_draft_tokens else None,
            logits_indices=batch.logits_indices,
            input_ids=batch.input_ids,
            positions=batch.positions,
            # Read anew in every step: vLLM exchanges these tensors.
            prompt_lens=self._req_states.prompt_len.gpu,
            prefill_lens=self._req_states.prefill_len.gpu,
        )
