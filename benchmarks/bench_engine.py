"""One engine in this process, and what it takes to answer a batch of requests in it."""

import gc
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from adaptive_head.checkpoint import read_metadata
from adaptive_head.options import AdaptiveRequest, Options, resolve_options
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.wire import DecisionReader
from benchmarks.stock import is_v2, put_back, take_out

STOCK = "stock"
ORDINARY = "ordinary"
# The same again: how far two runs of one thing are apart.
AGAIN = "again"
ADAPTIVE = "adaptive"
MIXED = "mixed"
POLICIES = ("entropy", "schedule", "constant")
ARMS = (STOCK, ORDINARY, AGAIN, ADAPTIVE, MIXED)
FIXED_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Run:
    """A batch of requests, from its first step to its last.

    Attributes:
        ttft_s: seconds until every request has its first token.
        tpot_s: seconds a token thereafter: the decode steps, over their number. Over all of them,
            because with asynchronous scheduling a step returns the tokens of the one before.
        tokens_per_s: of all requests together, first tokens included.
    """

    ttft_s: float
    tpot_s: float
    tokens_per_s: float


# New tokens of a request: its id, how many, and their temperatures in millionths.
Answer = tuple[str, int, list[int] | None]


class Arms(Protocol):
    """What can run a batch of requests in one way or another."""

    def run(self, arm: str, batch: int, prompt_len: int, num_tokens: int) -> Run: ...


def make_config(model: Path, heads: dict[str, Path], options: dict[str, Any]) -> VllmConfig:
    """vLLM's configuration of an engine with heads, which need not be written yet.

    Args:
        model: a folder.
        options: more of vLLM's `EngineArgs`.

    Raises:
        ValueError: vLLM does not take the options, or not together.
    """
    settings = {"heads": {k: str(v) for k, v in heads.items()}, "verify_base": False}
    arguments = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "worker_cls": WORKER_CLS,
        "scheduler_cls": SCHEDULER_CLS,
        "additional_config": {"adaptive": settings},
    }
    return EngineArgs(**(arguments | options)).create_engine_config()


class BenchEngine:
    """An engine, and the arms that it can run. Wants VLLM_ENABLE_V1_MULTIPROCESSING=0 in the
    environment, which leaves the scheduler within reach.

    Args:
        config: of `make_config`.
        heads: folders of heads, of which adaptive requests take one each in turns.
    """

    def __init__(self, config: VllmConfig, heads: dict[str, Path]) -> None:
        self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self._core = self._engine.engine_core.engine_core
        self._vocab_size = config.model_config.get_vocab_size()
        metadata = {name: read_metadata(folder) for name, folder in heads.items()}
        self._head_options = [
            resolve_options(AdaptiveRequest(head=name), metadata, name) for name in heads
        ]
        self._num_requests = 0

    @property
    def is_v2(self) -> bool:
        """Whether vLLM runs its V2 model runner."""
        return all(self._ask_workers(lambda worker: is_v2(worker.model_runner)))

    def has_room(self, batch: int, num_tokens: int) -> bool:
        """Whether the KV cache holds so many requests of so many tokens at once."""
        cache = self._core.vllm_config.cache_config
        return batch * -(-num_tokens // cache.block_size) < (cache.num_gpu_blocks or 0)

    @property
    def heads_memory_bytes(self) -> int | None:
        """Device memory that heads, their graphs and tables took; None where it is not measured."""
        found: list[int | None] = self._ask_workers(
            lambda worker: getattr(worker.model_runner, "heads_memory_usage", None)
        )
        return found[-1]

    def run(self, arm: str, batch: int, prompt_len: int, num_tokens: int) -> Run:
        """Answer a batch of requests of equal lengths.

        Raises:
            RuntimeError: a token came without a temperature that should have had one, or the other
                way round, or the heads have not chosen as often as they should.
        """
        wanted = self._add_requests(arm, batch, prompt_len, num_tokens)
        before = sum(self.count_choices().values())
        with self._stock() if arm == STOCK else nullcontext():
            run, answers = self._run(wanted, num_tokens)
        check_answers(arm, answers, wanted, num_tokens)
        num_chosen = sum(self.count_choices().values()) - before
        num_wanted = count_head_choices(wanted, num_tokens)
        # With speculation an answer's last step may accept more than it still has room for.
        if num_chosen < num_wanted or bool(num_chosen) != bool(num_wanted):
            raise RuntimeError(f"{arm}: heads have chosen {num_chosen} times, not {num_wanted}")
        return run

    def count_choices(self) -> dict[float, int]:
        """How often the heads have chosen each temperature since the engine started."""
        totals: dict[float, int] = {}
        for heads in self._ask_workers("count_choices")[-1:]:
            for _name, _generation, counts in heads or ():
                for temperature, count in counts.items():
                    totals[temperature] = totals.get(temperature, 0) + count
        return totals

    def _run(self, wanted: dict[str, Options | None], num_tokens: int) -> tuple[Run, list[Answer]]:
        waiting = set(wanted)
        outputs: list[tuple[str, CompletionOutput]] = []
        with _no_garbage_collection():
            start = first = time.perf_counter()
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    (completion,) = output.outputs
                    outputs.append((output.request_id, completion))
                    if completion.token_ids and output.request_id in waiting:
                        waiting.remove(output.request_id)
                        first = time.perf_counter()
            end = time.perf_counter()
        self._drain()
        tpot_s = (end - first) / (num_tokens - 1)
        run = Run(first - start, tpot_s, len(wanted) * num_tokens / (end - start))
        return run, read_answers(outputs)

    def _add_requests(
        self, arm: str, batch: int, prompt_len: int, num_tokens: int
    ) -> dict[str, Options | None]:
        """The same prompts in every run; options by request id, None for an ordinary one."""
        rng = random.Random(0)
        wanted: dict[str, Options | None] = {}
        for index in range(batch):
            options = self._choose_options(arm, index)
            request_id = str(self._num_requests)
            self._num_requests += 1
            wanted[request_id] = options
            prompt = [rng.randrange(self._vocab_size) for _ in range(prompt_len)]
            params = SamplingParams(
                # An adaptive request's own is neutral, as the server sets it.
                temperature=FIXED_TEMPERATURE if options is None else 1.0,
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args=None if options is None else options.to_extra_args(),
            )
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return wanted

    def _choose_options(self, arm: str, index: int) -> Options | None:
        if arm in (STOCK, ORDINARY, AGAIN) or (arm == MIXED and index % 2):
            return None
        if arm in POLICIES:
            return resolve_options(AdaptiveRequest(policy=arm), {}, None)  # type: ignore[arg-type]
        # Every head, also where only every second request is adaptive.
        turn = index // 2 if arm == MIXED else index
        return self._head_options[turn % len(self._head_options)]

    def _drain(self) -> None:
        """Let the workers hear of the requests that have ended, before they are exchanged."""
        while self._core.scheduler.has_requests() or self._core.batch_queue:
            self._engine.step()

    @contextmanager
    def _stock(self) -> Iterator[None]:
        """vLLM's own code in the same engine."""
        scheduler = self._core.scheduler
        self._ask_workers(take_out)
        scheduler.return_sampling_mask = False
        try:
            yield
        finally:
            self._ask_workers(put_back)
            scheduler.return_sampling_mask = True

    def _ask_workers(self, function: Any) -> list[Any]:
        answers: list[Any] = self._core.model_executor.collective_rpc(function)
        return answers


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def read_answers(outputs: Sequence[tuple[str, CompletionOutput]]) -> list[Answer]:
    """The temperatures of every output, by request id; None before a request's first."""
    readers: dict[str, DecisionReader] = {}
    answers: list[Answer] = []
    for request_id, completion in outputs:
        if completion.sampling_mask is not None:
            readers.setdefault(request_id, DecisionReader())
        num_new, micros = len(completion.token_ids), None
        if (reader := readers.get(request_id)) is not None:
            runs = reader.read(completion)
            micros = [decision.temperature for decision, count in runs for _ in range(count)]
        answers.append((request_id, num_new, micros))
    return answers


def check_answers(
    arm: str,
    answers: Sequence[Answer],
    wanted: Mapping[str, Options | None],
    num_tokens: int,
) -> None:
    """Were the requests answered as the arm says? Raises RuntimeError if not."""
    num_seen = dict.fromkeys(wanted, 0)
    for request_id, num_new, micros in answers:
        num_seen[request_id] += num_new
        if wanted[request_id] is None and micros is not None:
            raise RuntimeError(f"{arm}: an ordinary token came with a temperature")
        if wanted[request_id] is not None and len(micros or ()) != num_new:
            raise RuntimeError(f"{arm}: an adaptive token came without its temperature")
    if set(num_seen.values()) != {num_tokens}:
        raise RuntimeError(f"{arm}: an answer has not {num_tokens} tokens")


def count_head_choices(wanted: Mapping[str, Options | None], num_tokens: int) -> int:
    """How often heads choose for these requests: once a token, or once an answer."""
    return sum(
        1 if options.level == "sequence" else num_tokens
        for options in wanted.values()
        if options is not None and options.policy == "head"
    )
