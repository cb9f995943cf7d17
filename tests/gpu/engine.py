"""An engine in this process with a small drawn model and two heads, and requests for it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adaptive_head import AdaptiveRequest, HeadConfig, Options, load_head, resolve_options
from adaptive_head.vllm import LOADING, SCHEDULER_CLS, WORKER_CLS
from benchmarks.stock import is_v2
from tests.engine.tiny_model import HIDDEN_SIZE, VOCAB_SIZE, make_tiny_model
from tests.heads import save_strong_head

TEMPERATURES = (0.0, 0.3, 0.7, 1.1, 1.6)
# The level of each head; the second one's weights serve for a head that is loaded later, too.
LEVELS = {"tok": "token", "seq": "sequence"}
# A model that may write these two words only writes both markers again and again.
WORDS = (81, 82)
MARKER, START = [81, 82, 82], [82, 81, 81]
# Widths that attention kernels for GPUs have, also in FlashAttention 3.
HEAD_DIM = 64

ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 1024,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 27,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "distributed_executor_backend": "uni",
    "seed": 0,
}
# Full graphs of the decode steps, and no compiler: such an engine starts in seconds.
ON_GPU = {
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.1,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}
ON_CPU = {"dtype": "float32", "enforce_eager": True}


@dataclass(frozen=True)
class Material:
    """What an engine serves: folders of a model and of its heads."""

    model: Path
    heads: dict[str, Path]


def make_material(folder: Path) -> Material:
    """Draw a model and heads, the same every time."""
    model = make_tiny_model(folder / "tiny", head_dim=HEAD_DIM)
    config = HeadConfig(HIDDEN_SIZE, TEMPERATURES, (32, 32))
    heads = {
        name: save_strong_head(folder / name, model, config, level, seed)
        for seed, (name, level) in enumerate(LEVELS.items())
    }
    return Material(model, heads)


@dataclass(frozen=True)
class Request:
    """A prompt and its sampling parameters; options for an adaptive request."""

    prompt: list[int]
    params: dict[str, Any]
    options: Options | None = None


def pick_length(device: str, num_tokens: int) -> int:
    """How many tokens are generated where a GPU generates so many."""
    return num_tokens * 2 // 5 if device == "cpu" else num_tokens


def make_prompt(index: int, prompt_len: int | None = None) -> list[int]:
    """A prompt of its own, and of its own length unless that is given."""
    prompt_len = 9 + 5 * index if prompt_len is None else prompt_len
    return [(7 * index + 3 * j + 5) % VOCAB_SIZE for j in range(prompt_len)]


def make_request(prompt: list[int], num_tokens: int, seed: int | None, **params: Any) -> Request:
    """An ordinary request."""
    defaults = {"temperature": 0.7, "max_tokens": num_tokens, "ignore_eos": True, "seed": seed}
    return Request(prompt, defaults | params)


def make_adaptive(
    prompt: list[int], num_tokens: int, seed: int, generation: int = 0, **fields: Any
) -> Request:
    """An adaptive request, whose `fields` are those of the `adaptive` object."""
    params: dict[str, Any] = {"temperature": 1.0}
    if fields.get("policy") == "two_phase":
        # Not by a bias of the logits, which vLLM does not have alongside drafts.
        params["allowed_token_ids"] = list(WORDS)
    heads = {
        name: SimpleNamespace(level=level, select="argmax", abstain=None)
        for name, level in LEVELS.items()
    }
    options = resolve_options(AdaptiveRequest(**fields), heads, "tok", _tokenize)
    options = replace(options, generation=generation)
    params["extra_args"] = options.to_extra_args()
    return replace(make_request(prompt, num_tokens, seed, **params), options=options)


def _tokenize(marker: str) -> list[int]:
    return START if marker == "<think>" else MARKER


class Engine:
    """vLLM in this process.

    Args:
        is_stock: vLLM's own worker and scheduler, and no heads.
        options: more of vLLM's arguments.

    Raises:
        AssertionError: vLLM runs another model runner than V2.
    """

    def __init__(
        self, material: Material, device: str, is_stock: bool = False, **options: Any
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        from vllm import LLM

        arguments = ENGINE | (ON_CPU if device == "cpu" else ON_GPU) | options
        if device == "cpu":
            # Replaces what Triton's interpreter cannot run.
            arguments["worker_cls"] = f"v2_worker.{'Stock' if is_stock else 'Adaptive'}Worker"
        elif not is_stock:
            arguments["worker_cls"] = WORKER_CLS
        if not is_stock:
            heads = {name: str(folder) for name, folder in material.heads.items()}
            arguments["scheduler_cls"] = SCHEDULER_CLS
            arguments["additional_config"] = {"adaptive": {"heads": heads}}
        self.llm = LLM(model=str(material.model), **arguments)
        self._engine = self.llm.llm_engine
        self._heads = material.heads
        self._num_requests = 0
        runners = self.llm.collective_rpc(lambda worker: is_v2(worker.model_runner))
        assert all(runners), "this is not vLLM's V2 model runner"

    @property
    def is_async(self) -> bool:
        """Whether a step is scheduled before the one before it has ended."""
        return bool(self._engine.vllm_config.scheduler_config.async_scheduling)

    def add(self, request: Request) -> int:
        """Queue a request; the number under which `run` returns its answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = self._num_requests
        self._num_requests += 1
        params = SamplingParams.from_optional(**request.params)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.detokenize = False
        prompt = {"prompt_token_ids": request.prompt}
        self._engine.add_request(str(number), prompt, params)
        return number

    def run(self, between_steps: Callable[[int], None] | None = None) -> dict[int, dict[str, Any]]:
        """Step until all requests are answered.

        Args:
            between_steps: called after each step with how many there were; may add requests.

        Returns:
            Answers as `tests.engine.scenario.describe` has them, by the requests' numbers.
        """
        from tests.engine.scenario import describe

        answers: dict[int, dict[str, Any]] = {}
        num_steps = 0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    answers[int(output.request_id)] = describe(output.outputs[0])
            num_steps += 1
            if between_steps is not None:
                between_steps(num_steps)
        core = self._engine.engine_core.engine_core
        # A step may be under way whose requests have all ended.
        while core.scheduler.has_requests() or core.batch_queue:
            self._engine.step()
        return answers

    def answer(self, requests: list[Request]) -> list[dict[str, Any]]:
        """Answer requests in one batch."""
        numbers = [self.add(request) for request in requests]
        answers = self.run()
        return [answers[number] for number in numbers]

    def read_metric(self, name: str) -> int:
        """A counter of vLLM's; 0 where it is not there."""
        found = [one for one in self.llm.get_metrics() if one.name == name]
        return int(getattr(found[0], "value", 0)) if found else 0

    def count_choices(self) -> dict[str, int]:
        """How often each head has chosen, by name and generation: "tok.0"."""
        (heads,) = self.llm.collective_rpc("count_choices")
        return {f"{name}.{generation}": sum(counts.values()) for name, generation, counts in heads}

    def begin_load(self, name: str, generation: int, head: str) -> Callable[[], str | None]:
        """Load the weights of one of the heads under another name or generation.

        Returns:
            A function to be called until it no longer returns LOADING: then None, or what is wrong.
        """
        folder = self._heads[head]
        call = name, generation, str(folder), load_head(folder).digest
        return lambda: self.llm.collective_rpc("add_head", args=call)[0]

    def load(self, name: str, generation: int, head: str) -> None:
        """Load a head and wait for it."""
        poll = self.begin_load(name, generation, head)
        while (state := poll()) == LOADING:
            pass
        assert state is None, state
