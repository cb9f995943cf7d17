"""Responses from vLLM, with our sampler, outside a server: what rollouts and evaluation ask for."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from adaptive_head.checkpoint import read_metadata
from adaptive_head.decision import MILLION
from adaptive_head.dtype import choose_dtype
from adaptive_head.lpo.experiment import EngineConfig
from adaptive_head.lpo.records import FinishReason, Prompt, Response
from adaptive_head.options import AdaptiveRequest, Head, resolve_options

# What vLLM's server reports for what float32 cannot hold; JSON has no infinity.
_MIN_LOGPROB = -9999.0


@dataclass(frozen=True)
class Filters:
    """vLLM's parameters other than the temperature; the defaults change nothing."""

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


NO_FILTERS = Filters()


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to sample one response to it.

    Args:
        id: unique among the requests of one `generate`.
        temperature: a fixed one, or an `AdaptiveRequest`.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float | AdaptiveRequest
    filters: Filters = NO_FILTERS


@dataclass(frozen=True)
class Generation:
    """What came of a request.

    Args:
        temperatures: of each token.
        logprobs: of each token at temperature 1 and without filters, in nats.
    """

    id: str
    token_ids: tuple[int, ...]
    temperatures: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None


class Engine(Protocol):
    """Something that answers requests, several at once."""

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Generation]:
        """Generations as they finish, in any order. Takes requests only as it has room.

        `requests` may end for the moment, and go on when it is asked again while others run.

        Raises:
            ValueError: vLLM refuses a request; names it.
        """
        ...

    def close(self) -> None:
        """End the engine and what it started."""
        ...


@contextmanager
def open_engine(
    model: Path | str, config: EngineConfig, heads: Mapping[str, Path]
) -> Iterator[Engine]:
    """The engine that the settings ask for, until the block ends.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        heads: folders of the heads to load, by name.

    Raises:
        ValueError: vLLM refuses an option, or a head is not one for the model.
    """
    if config.backend == "local":
        engine: Engine = LocalEngine(model, config, heads)
    elif config.backend == "ray":
        from adaptive_head.lpo.engine_ray import RayEngine

        engine = RayEngine(model, config, heads)
    else:
        from adaptive_head.lpo.engine_dp import DataParallelEngine

        engine = DataParallelEngine(model, config, heads)
    try:
        yield engine
    finally:
        engine.close()


class LocalEngine:
    """One vLLM engine in this process."""

    def __init__(self, model: Path | str, config: EngineConfig, heads: Mapping[str, Path]) -> None:
        # In one process: an engine of its own takes longer to start than a small model to run.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._max_num_seqs = config.max_num_seqs
        self._heads = {name: read_metadata(folder) for name, folder in heads.items()}
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**engine_arguments(model, config, heads))
        )

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Generation]:
        """See `Engine`."""
        waiting = iter(requests)
        running: dict[str, GenerationRequest] = {}
        try:
            while True:
                for request in islice(waiting, self._max_num_seqs - len(running)):
                    self._add(request)
                    running[request.id] = request
                if not running:
                    return
                for output in self._engine.step():
                    if output.finished:
                        yield read_generation(output, running.pop(output.request_id))
        finally:
            if running:
                self._engine.abort_request(list(running))

    def _add(self, request: GenerationRequest) -> None:
        from vllm.exceptions import VLLMClientError

        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        params = make_sampling_params(request, self._heads)
        try:
            self._engine.add_request(request.id, prompt, params)
        except VLLMClientError as error:
            raise ValueError(f"request {request.id}: {error}") from error

    def close(self) -> None:
        """See `Engine`."""
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        del self._engine
        gc.collect()
        cleanup_dist_env_and_memory()


def engine_arguments(
    model: Path | str, config: EngineConfig, heads: Mapping[str, Path]
) -> dict[str, Any]:
    """vLLM's engine arguments for our sampler; `config.options` come before our defaults."""
    from vllm.platforms import current_platform

    from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
    from adaptive_head.vllm.settings import CPU_KV_CACHE_BYTES

    on_cpu = {}
    if current_platform.is_cpu():
        # vLLM's own default takes nearly all memory, and compiling takes minutes on a few cores.
        on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    return {
        **on_cpu,
        "model": str(model),
        "dtype": choose_dtype(config.dtype, is_on_cpu=current_platform.is_cpu()),
        "max_num_seqs": config.max_num_seqs,
        "worker_cls": WORKER_CLS,
        "scheduler_cls": SCHEDULER_CLS,
        "additional_config": {
            "adaptive": {"heads": {name: str(folder) for name, folder in heads.items()}}
        },
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        **config.options,
        # Answers are judged by the model's own probabilities, whatever they were sampled at.
        "logprobs_mode": "raw_logprobs",
    }


def make_sampling_params(request: GenerationRequest, heads: Mapping[str, Head]) -> Any:
    """vLLM's sampling parameters for a request."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    common = {
        "seed": request.seed,
        "max_tokens": request.max_tokens,
        "output_kind": RequestOutputKind.FINAL_ONLY,
        # The sampled token's alone.
        "logprobs": 0,
        **asdict(request.filters),
    }
    if isinstance(request.temperature, AdaptiveRequest):
        options = resolve_options(request.temperature, heads, next(iter(heads), None))
        return SamplingParams(temperature=1.0, extra_args=options.to_extra_args(), **common)
    return SamplingParams(temperature=request.temperature, **common)


def read_generation(output: Any, request: GenerationRequest) -> Generation:
    """The one completion of a finished vLLM `RequestOutput`."""
    from adaptive_head.vllm.wire import take_decisions

    completion = output.outputs[0]
    token_ids = tuple(completion.token_ids)
    if isinstance(request.temperature, AdaptiveRequest):
        decisions = take_decisions(completion) or ()
        temperatures = tuple(decision.temperature / MILLION for decision in decisions)
    else:
        temperatures = (request.temperature,) * len(token_ids)
    logprobs = tuple(
        max(position[token_id].logprob, _MIN_LOGPROB)
        for token_id, position in zip(token_ids, completion.logprobs, strict=True)
    )
    return Generation(
        request.id,
        token_ids,
        temperatures,
        completion.text,
        completion.finish_reason or "abort",
        logprobs,
    )


def record_response(
    prompt: Prompt, sample: int, request: GenerationRequest, generation: Generation
) -> Response:
    """What came of a request, as the prompt's response of that number, without scores yet."""
    return Response(
        prompt_id=prompt.id,
        task=prompt.task,
        sample=sample,
        seed=request.seed,
        prompt_token_ids=request.prompt_token_ids,
        token_ids=generation.token_ids,
        temperatures=generation.temperatures,
        text=generation.text,
        finish_reason=generation.finish_reason,
        logprobs=generation.logprobs,
    )
