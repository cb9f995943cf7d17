"""The temperature stage for vLLM's V2 sampler."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.distributed import get_tp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.states import RequestState

from adaptive_head.checkpoint import LoadedHead
from adaptive_head.selector import Step, TemperatureSelector, to_micro
from adaptive_head.vllm.choices import ChoiceTensors
from adaptive_head.vllm.compat import check_parameters
from adaptive_head.vllm.heads import read_options

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
        heads: the loaded heads by name.
    """

    def __init__(self, req_states: RequestState, heads: dict[str, LoadedHead]) -> None:
        self._req_states = req_states
        self.selector = TemperatureSelector(
            {name: head.network for name, head in heads.items()},
            req_states.max_num_reqs,
            req_states.device,
        )
        # Sequence-level choices of preempted requests, by request id.
        self._parked: dict[str, torch.Tensor] = {}
        self._hidden_states: torch.Tensor | None = None
        self._logits_indices: torch.Tensor | None = None
        self._temperatures: torch.Tensor | None = None

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        options = read_options(sampling_params, self.selector)
        return self.selector.add(req_idx, options, sampling_params.seed)

    def apply_staged_writes(self) -> None:
        self.selector.flush()

    def resume(self, req_id: str, slot: int, token_ids: list[int]) -> None:
        """Tell a request that entered `slot` what came before: its text, and its choice."""
        if self.selector.is_adaptive(slot):
            self.selector.start_phase(slot, token_ids)
            if (chosen := self._parked.pop(req_id, None)) is not None:
                self.selector.restore(slot, chosen)

    def park(self, req_id: str, slot: int | None) -> None:
        """Keep the choice of a request that is preempted."""
        if slot is not None and self.selector.is_adaptive(slot):
            self._parked[req_id] = self.selector.park(slot)

    def forget(self, req_id: str) -> None:
        """A request has ended, or was aborted while it was preempted."""
        self._parked.pop(req_id, None)

    @contextmanager
    def reading(self, hidden_states: torch.Tensor, logits_indices: torch.Tensor) -> Iterator[None]:
        """Show `apply` the step's hidden states.

        Outside of this (vLLM's profiling and warm-up) every request is ordinary.

        Args:
            hidden_states: [tokens, d], may be the static output of a CUDA graph.
            logits_indices: int64 [rows], the tokens that have logits.
        """
        self._hidden_states, self._logits_indices = hidden_states, logits_indices
        try:
            yield
        finally:
            self._hidden_states = self._logits_indices = self._temperatures = None

    def take_choices(self) -> ChoiceTensors | None:
        """What `apply` chose in this step, or None where no request was adaptive."""
        if self._temperatures is None:
            return None
        return ChoiceTensors(to_micro(self._temperatures))

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Scale the adaptive rows of float32 logits [rows, vocabulary] in place."""
        if self._hidden_states is None or not self.selector.has_adaptive(ctx.idx_mapping_np):
            return logits
        slots = ctx.expanded_idx_mapping
        step = Step(
            slots=slots.long(),
            slots_np=ctx.idx_mapping_np,
            hidden=self._hidden_states[self._logits_indices],
            logits=logits,
            input_ids=ctx.input_ids,
            positions=ctx.pos,
            prompt_lens=self._req_states.prompt_len.gpu[slots],
            is_ready=ctx.pos + 1 >= self._req_states.prefill_len.gpu[slots],
        )
        temperatures = self.selector.select(step)
        assert temperatures is not None
        if get_tp_group().world_size > 1:
            # Every rank samples for itself, and all must divide by the same number.
            temperatures = get_tp_group().broadcast(temperatures, src=0)
        self._temperatures = temperatures
        return scale_logits(logits, temperatures)


def scale_logits(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Divide rows by their temperatures, in place.

    Args:
        logits: float32 [rows, vocabulary].
        temperatures: float32 [rows]; NaN leaves a row as it is, 0 leaves only its maximum
            (the first of equals), so that whatever is sampled is the greedy token.
    """
    is_greedy = temperatures == 0
    best = logits.argmax(dim=-1, keepdim=True)
    peak = logits.gather(-1, best)
    divisor = torch.where(is_greedy | temperatures.isnan(), 1.0, temperatures)
    logits.div_(divisor.unsqueeze(1))
    logits.masked_fill_(is_greedy.unsqueeze(1), -torch.inf)
    greedy_peak = torch.where(is_greedy.unsqueeze(1), peak, logits.gather(-1, best))
    return logits.scatter_(-1, best, greedy_peak)
