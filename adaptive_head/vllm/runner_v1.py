"""The V1 model runner's share, as thin as it can be: vLLM uses V1 on a CPU.

V1 keeps no slots that a plugin could use and rebuilds its batch every step, so the rows are
described anew each time, on the host. That is free on a CPU and would cost a synchronisation
on a GPU, where V2 is vLLM's own default: V1 is refused there.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from adaptive_head.checkpoint import LoadedHead
from adaptive_head.selector import Step, TemperatureSelector
from adaptive_head.slots import to_micro
from adaptive_head.vllm.compat import UnsupportedError, check_parameters
from adaptive_head.vllm.heads import read_options
from adaptive_head.vllm.wire import DecisionLists, pack_decisions

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Stock
else:
    _Stock = object

# The slot of every ordinary request.
ORDINARY_SLOT = 0

check_parameters(GPUModelRunner.sample_tokens, "self", "grammar_output")
check_parameters(GPUModelRunner._update_states, "self", "scheduler_output")
check_parameters(Sampler.__init__, "self", "logprobs_mode", "use_fp64_gumbel")
check_parameters(Sampler.apply_temperature, "logits", "temp", "all_random")
check_parameters(Sampler.sample, "self", "logits", "sampling_metadata", "logprobs_mode_override")


class AdaptiveSamplerV1(Sampler):
    """vLLM's V1 sampler, with a temperature a row where `step` says so."""

    def __init__(self, stock: Sampler, selector: TemperatureSelector) -> None:
        super().__init__(stock.logprobs_mode, stock.use_fp64_gumbel)
        self._selector = selector
        # Everything of the coming step but its logits; None for an ordinary batch.
        self.step: dict[str, Any] | None = None
        self.temperatures: torch.Tensor | None = None
        # Rows with a head's fallback; None where there can be none.
        self.is_abstained: torch.Tensor | None = None

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.step is not None:
            step = Step(logits=logits, **self.step)
            temperatures = self._selector.select(step)
            assert temperatures is not None and sampling_metadata.temperature is not None
            self.temperatures = temperatures
            self.is_abstained = self._selector.find_abstained(step)
            fixed = sampling_metadata.temperature
            sampling_metadata = dataclasses.replace(
                sampling_metadata,
                temperature=torch.where(temperatures.isnan(), fixed, temperatures),
                # `all_random` stays: without an ordinary greedy row vLLM need not look for maxima.
                all_greedy=False,
            )
        return super().sample(logits, sampling_metadata, *args, **kwargs)

    def apply_temperature(
        self, logits: torch.Tensor, temp: torch.Tensor, all_random: bool
    ) -> torch.Tensor:
        """vLLM's, which leaves a greedy row at 1; of ours the maximum alone is left, as in V2, so
        that it is drawn, and the row's log-probabilities are those of its temperature 0."""
        if self.temperatures is None:
            return super().apply_temperature(logits, temp, all_random)
        is_greedy = self.temperatures == 0
        logits = super().apply_temperature(logits, temp.masked_fill(is_greedy, 1.0), all_random)
        greedy = torch.nonzero(is_greedy).flatten()
        if len(greedy):
            best = self.greedy_sample(logits[greedy])
            peaks = logits[greedy, best]
            logits[greedy] = -torch.inf
            logits[greedy, best] = peaks
        return logits


class AdaptiveRunnerV1(_Stock):
    """Mixed into vLLM's V1 model runner."""

    sampler: Sampler

    def load_heads(self, heads: dict[str, LoadedHead]) -> None:
        """Exchange the sampler.

        Raises:
            UnsupportedError: the sampler is not vLLM's own.
        """
        if type(self.sampler) is not Sampler:
            raise UnsupportedError(
                f"adaptive temperatures need vLLM's own sampler, found {type(self.sampler)}"
            )
        self._slots: dict[str, int] = {}
        self._free_slots: list[int] = []
        self.selector = TemperatureSelector(
            {name: head.network for name, head in heads.items()}, 1, self.device
        )
        self.sampler = AdaptiveSamplerV1(self.sampler, self.selector)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        # A preempted request keeps its slot, and so its choice, until it finishes.
        for req_id in scheduler_output.finished_req_ids:
            self._release_slot(req_id)
        added = []
        for request in scheduler_output.scheduled_new_reqs:
            self._release_slot(request.req_id)
            options = request.sampling_params and read_options(
                request.sampling_params, self.selector
            )
            if options:
                slot = self._slots[request.req_id] = self._acquire_slot()
                self.selector.add(slot, options, request.sampling_params.seed)
                added.append((slot, request.prompt_token_ids or [], request.prompt_len))
        self.selector.flush()
        for slot, token_ids, prompt_len in added:
            self.selector.start_phase(slot, token_ids, prompt_len)
        return super()._update_states(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        with self._hold_unfinished_generators():
            return self._sample_adaptive(grammar_output)

    @contextmanager
    def _hold_unfinished_generators(self) -> Iterator[None]:
        """Keep the generators of rows whose prefill is unfinished out of the step.

        vLLM draws from them and then rewinds them, which a generator on the CPU cannot do: a
        seeded request in a chunked prefill would end the engine.
        """
        generators = self.input_batch.generators
        unfinished = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        held = {row: generators.pop(row) for row in unfinished.tolist() if row in generators}
        try:
            yield
        finally:
            generators.update(held)

    def _sample_adaptive(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        state = self.execute_model_state
        is_adaptive = state is not None and any(
            req_id in self._slots for req_id in self.input_batch.req_ids
        )
        if not is_adaptive:
            return super().sample_tokens(grammar_output)
        try:
            self.sampler.step = self._prepare_step(state.sample_hidden_states)
            output = super().sample_tokens(grammar_output)
            micros = to_micro(self.sampler.temperatures)
            decisions = pack_decisions(micros, self.sampler.is_abstained)
            output.sampling_masks = DecisionLists(decisions.numpy())
        finally:
            self.sampler.step = self.sampler.temperatures = self.sampler.is_abstained = None
        return output

    def _prepare_step(self, hidden: torch.Tensor) -> dict[str, Any]:
        """Describe the batch's rows to the selector; all but the logits."""
        batch = self.input_batch
        rows = np.arange(batch.num_reqs)
        slots_np = np.array([self._slots.get(req_id, ORDINARY_SLOT) for req_id in batch.req_ids])
        last = batch.num_tokens_no_spec[rows] - 1
        return {
            "slots": torch.from_numpy(slots_np),
            "slots_np": slots_np,
            "hidden": hidden,
            "input_ids": torch.from_numpy(batch.token_ids_cpu[rows, last]).long(),
            "positions": torch.from_numpy(last).long(),
            "prompt_lens": torch.from_numpy(batch.num_prompt_tokens[rows]).long(),
            "is_ready": torch.from_numpy(~self.discard_request_mask.np[rows]),
        }

    def _acquire_slot(self) -> int:
        # Preempted requests are tracked too, so there is no bound to size the table by.
        if not self._free_slots:
            self._free_slots.extend(self.selector.grow())
        return self._free_slots.pop()

    def _release_slot(self, req_id: str) -> None:
        if (slot := self._slots.pop(req_id, None)) is not None:
            self.selector.add(slot, None, None)
            self._free_slots.append(slot)
