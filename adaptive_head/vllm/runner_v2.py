"""The V2 model runner's share: hidden states in, chosen temperatures out."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput, SamplingMaskTensors
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from adaptive_head.checkpoint import LoadedHead
from adaptive_head.vllm.compat import UnsupportedError, check_parameters
from adaptive_head.vllm.head_runner import HiddenRows
from adaptive_head.vllm.processor_v2 import AdaptiveTemperature
from adaptive_head.vllm.ranks import count_ranks
from adaptive_head.vllm.selector_v2 import DeviceSelector

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Stock
else:
    _Stock = object

check_parameters(GPUModelRunner.sample, "self", "hidden_states", "input_batch", "grammar_output")
check_parameters(GPUModelRunner.add_requests, "self", "scheduler_output")
check_parameters(GPUModelRunner.finish_requests, "self", "scheduler_output")
check_parameters(GPUModelRunner.profile_run, "self", "randomize_inputs")
# `DecisionTensors` stands in for these two.
check_parameters(SamplingMaskTensors.to_cpu_nonblocking, "self")
check_parameters(SamplingMaskTensors.tolists, "self", "num_sampled_tokens")


class AdaptiveRunnerV2(_Stock):
    """Mixed into vLLM's V2 model runner, on the GPU or the CPU.

    The temperature itself is applied by `AdaptiveTemperature`, a logits processor of vLLM's own
    interface. Only what that interface leaves out happens here.
    """

    adaptive: AdaptiveTemperature | None = None
    # Bytes on the device: heads, their graphs and tables. For benchmarks; vLLM, which sizes its KV
    # cache by the memory that is free after its profiling, has no need to be told.
    heads_memory_usage = 0

    def load_heads(self, heads: dict[str, LoadedHead]) -> None:
        """Put our logits processor behind all others. Only the last pipeline rank samples."""
        if self.sampler is None:
            return
        if type(self.sampler) is not Sampler:
            raise UnsupportedError(
                f"adaptive temperatures need vLLM's own sampler, found {type(self.sampler)}"
            )
        if type(self.rejection_sampler) not in (RejectionSampler, type(None)):
            raise UnsupportedError(
                "with speculative decoding adaptive temperatures need vLLM's own rejection "
                f"sampler, found {type(self.rejection_sampler)}"
            )
        with DeviceMemoryProfiler() as memory:
            selector = self._make_selector(heads)
        if self.device.type != "cpu":
            self.heads_memory_usage = memory.consumed_memory
        seeds = self.sampler.sampling_states.seeds
        self.adaptive = AdaptiveTemperature(self.req_states, seeds, selector)
        self.sampler.logits_processors.append(self.adaptive)

    def _make_selector(self, heads: dict[str, LoadedHead]) -> DeviceSelector:
        has_graphs = (
            self.device.type == "cuda"
            and self.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
        )
        rows = HiddenRows(
            self.model_config.get_hidden_size(),
            self.max_num_reqs * self.decode_query_len,
            self.dtype,
            self.device,
            has_graphs,
        )
        selector = DeviceSelector(
            {name: head.network for name, head in heads.items()},
            self.max_num_reqs,
            rows,
            is_replicated=count_ranks() > 1,
        )
        selector.warm_up(self.vocab_size)
        return selector

    @property
    def selector(self) -> DeviceSelector | None:
        """Where heads are added and removed; None on a rank that does not sample."""
        return self.adaptive and self.adaptive.selector

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        # What the heads allocate in a step comes on top of the model's peak: held meanwhile, it is
        # part of what vLLM leaves free.
        reserve = self.selector and self.selector.reserve()
        super().profile_run(*args, **kwargs)
        del reserve

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        if self.adaptive is not None:
            for request in scheduler_output.scheduled_new_reqs:
                slot = self.req_states.req_id_to_index[request.req_id]
                self.adaptive.resume(
                    request.req_id, slot, request.prefill_token_ids, request.prompt_len
                )

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        # A preempted request loses its slot here, and with it a choice that must not change.
        if self.adaptive is not None:
            for req_id in scheduler_output.preempted_req_ids or ():
                self.adaptive.park(req_id, self.req_states.req_id_to_index.get(req_id))
            for req_id in scheduler_output.finished_req_ids:
                self.adaptive.forget(req_id)
        super().finish_requests(scheduler_output)

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        if self.adaptive is None:
            return super().sample(hidden_states, input_batch, grammar_output)
        with self.adaptive.sampling(hidden_states, input_batch):
            result = super().sample(hidden_states, input_batch, grammar_output)
            output, num_sampled, _ = result
            output.sampling_mask_tensors = self.adaptive.take_decisions(num_sampled)
        return result
