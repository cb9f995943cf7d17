"""One engine in this process, and what it takes to answer a batch of requests in it."""

import gc
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Everything in one process: the scheduler and the worker are within reach.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import EngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from adaptive_head.checkpoint import read_metadata
from adaptive_head.options import AdaptiveRequest, Options, resolve_options
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.choices import ChoiceReader

STOCK = "stock"
ORDINARY = "ordinary"
ADAPTIVE = "adaptive"
MIXED = "mixed"
POLICIES = ("entropy", "schedule", "constant")
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


class BenchEngine:
    """An engine, and the arms that it can run.

    Args:
        model: a folder.
        heads: folders of heads, of which adaptive requests take one each in turns.
        options: more of vLLM's `EngineArgs`.
    """

    def __init__(self, model: Path, heads: dict[str, Path], options: dict[str, Any]) -> None:
        settings = {"heads": {k: str(v) for k, v in heads.items()}, "verify_base": False}
        arguments = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "worker_cls": WORKER_CLS,
            "scheduler_cls": SCHEDULER_CLS,
            "additional_config": {"adaptive": settings},
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**(arguments | options)))
        core = self._engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._vocab_size = self._engine.model_config.get_vocab_size()
        metadata = {name: read_metadata(folder) for name, folder in heads.items()}
        self._head_options = [
            resolve_options(AdaptiveRequest(head=name), metadata, name) for name in heads
        ]
        self._num_requests = 0

    @property
    def is_v2(self) -> bool:
        """Whether vLLM runs its V2 model runner."""
        return hasattr(self._runner, "adaptive")

    def run(self, arm: str, batch: int, prompt_len: int, num_tokens: int) -> Run:
        """Answer a batch of requests of equal lengths.

        Raises:
            AssertionError: a token came without the temperature that it should have had.
            RuntimeError: a token has a temperature that should have none, or the heads have chosen
                one temperature only.
        """
        if arm == STOCK:
            with self._stock():
                return self._run(arm, batch, prompt_len, num_tokens)
        return self._run(arm, batch, prompt_len, num_tokens)

    def _run(self, arm: str, batch: int, prompt_len: int, num_tokens: int) -> Run:
        rng = random.Random(0)
        wanted: dict[str, bool] = {}
        for index in range(batch):
            options = self._choose_options(arm, index)
            request_id = str(self._num_requests)
            self._num_requests += 1
            wanted[request_id] = options is not None
            prompt = [rng.randrange(3, self._vocab_size) for _ in range(prompt_len)]
            params = SamplingParams(
                temperature=FIXED_TEMPERATURE if options is None else 1.0,
                max_tokens=num_tokens,
                ignore_eos=True,
                seed=index,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args=None if options is None else options.to_extra_args(),
            )
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        num_left, temperatures = len(wanted), set[int]()
        readers = {request_id: ChoiceReader() for request_id in wanted}
        num_seen = dict.fromkeys(wanted, 0)
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        first = start
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                (completion,) = output.outputs
                if wanted[output.request_id]:
                    reader = readers[output.request_id]
                    reader.read(completion)
                    temperatures.update(micro for micro, _ in reader.take())
                elif completion.sampling_mask is not None:
                    raise RuntimeError(f"{arm}: an ordinary token has a temperature")
                if not num_seen[output.request_id] and completion.token_ids:
                    num_left -= 1
                    first = time.perf_counter() if not num_left else first
                num_seen[output.request_id] += len(completion.token_ids)
        end = time.perf_counter()
        gc.enable()
        if set(num_seen.values()) != {num_tokens}:
            raise RuntimeError(f"{arm}: an answer has not {num_tokens} tokens")
        if arm in (ADAPTIVE, MIXED) and len(temperatures) < 2 and batch * num_tokens > 64:
            raise RuntimeError(f"{arm}: the heads have chosen one temperature only")
        tpot = (end - first) / max(num_tokens - 1, 1)
        return Run(first - start, tpot, batch * num_tokens / (end - start))

    def _choose_options(self, arm: str, index: int) -> Options | None:
        if arm in (STOCK, ORDINARY) or (arm == MIXED and index % 2):
            return None
        if arm in POLICIES:
            return resolve_options(AdaptiveRequest(policy=arm), {}, None)  # type: ignore[arg-type]
        return self._head_options[index % len(self._head_options)]

    @contextmanager
    def _stock(self) -> Iterator[None]:
        """vLLM's own code in the same engine: what we have put in is taken out for the while."""
        runner, ours = self._runner, type(self._runner)
        sampler = runner.sampler
        runner.__class__ = ours.__bases__[1]
        if self.is_v2:
            sampler.logits_processors.remove(runner.adaptive)
        else:
            vllms = type(sampler).__bases__[0]
            runner.sampler = vllms(sampler.logprobs_mode, sampler.use_fp64_gumbel)
        self._scheduler.return_sampling_mask = False
        try:
            yield
        finally:
            runner.__class__ = ours
            if self.is_v2:
                sampler.logits_processors.append(runner.adaptive)
            runner.sampler = sampler
            self._scheduler.return_sampling_mask = True
