"""An engine core without a model: tokens come at set times, and temperatures with them.

It stands behind vLLM's `AsyncLLM`, in the place of the client that talks to the engine core's
process. So the whole API process is real (routes, handlers, tokenizer, detokenizer, n > 1, aborts,
metrics), and temperatures arrive in it as the engine sends them. Every step's outputs are encoded
and decoded as the message between the two processes is; only the socket is left out.
"""

import asyncio
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from types import SimpleNamespace

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.renderers import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, SamplingMaskLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from adaptive_head.checkpoint import read_metadata
from adaptive_head.decision import MILLION
from adaptive_head.options import EXTRA_ARGS_KEY, Options
from adaptive_head.vllm.settings import read_settings

TEXT = " The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun."


@dataclass(frozen=True)
class Timing:
    """When tokens come.

    Attributes:
        ttft: seconds from a request's start to its first token.
        itl: seconds from a token to the next.
        jitter: up to this share each wait is longer or shorter; 0 to 1.
    """

    ttft: float = 0.0
    itl: float = 0.0
    jitter: float = 0.0

    def draw(self, wait: float, rng: random.Random) -> float:
        """A wait with its jitter, seconds."""
        return wait * (1 + self.jitter * rng.uniform(-1, 1))


@dataclass
class Answer:
    """An answer on its way: one for each choice of a request."""

    request: EngineCoreRequest
    params: SamplingParams
    options: Options | None
    rng: random.Random
    num_tokens: int
    queued: float = field(default_factory=monotonic)
    started: float = 0.0
    num_sent: int = 0
    last: int | None = None
    is_answer: bool = False


class MockCore(EngineCoreClient):
    """Answers every request with the same words.

    An answer has `max_tokens` tokens if it ignores the end of sequence, else it ends at random.
    Requests beyond the configured `max_num_seqs` wait, as an engine's do.
    """

    def __init__(self, config: VllmConfig, renderer: BaseRenderer, timing: Timing) -> None:
        settings = read_settings(config.additional_config)
        self._heads = {
            name: read_metadata(folder).temperatures for name, folder in settings.heads.items()
        }
        tokenizer = renderer.get_tokenizer()
        self._words: list[int] = tokenizer.encode(TEXT, add_special_tokens=False)
        self._eos_id: int = tokenizer.eos_token_id
        self._timing = timing
        self._max_running = config.scheduler_config.max_num_seqs
        self._running: dict[str, Answer] = {}
        self._waiting: dict[str, Answer] = {}
        self._due: list[tuple[float, int, Answer]] = []
        self._order = count()
        self._changed = asyncio.Event()
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        # What AsyncLLM asks of its client besides the methods.
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        assert params is not None and params.max_tokens is not None
        # As the client of a real engine does: what cannot be encoded, such as a lone surrogate,
        # fails here and not on its way back, where it would end the engine.
        self._encoder.encode(request)
        rng = random.Random(params.seed)
        num_tokens = params.max_tokens
        if not params.ignore_eos:
            num_tokens = rng.randint(max(1, params.min_tokens), num_tokens)
        fields = (params.extra_args or {}).get(EXTRA_ARGS_KEY)
        # Without the validation, which a real engine does in another process.
        options = Options(**fields) if fields else None
        answer = Answer(request, params, options, rng, num_tokens)
        if options is not None and options.policy == "two_phase":
            answer.is_answer = begins_with_answer(request.prompt_token_ids or [], options)
        self._waiting[request.request_id] = answer
        self._start_waiting()
        self._changed.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)
            self._waiting.pop(request_id, None)
        self._start_waiting()
        self._changed.set()

    async def get_output_async(self) -> EngineCoreOutputs:
        """The tokens that are due; waits for the next. A change without tokens is news, too."""
        while True:
            # Without any wait the API process would never come to its other work.
            await asyncio.sleep(0)
            outputs = self._take_due()
            if outputs or self._changed.is_set():
                self._changed.clear()
                self._start_waiting()
                stats = SchedulerStats(
                    num_running_reqs=len(self._running), num_waiting_reqs=len(self._waiting)
                )
                frames = self._encoder.encode(
                    EngineCoreOutputs(outputs=outputs, scheduler_stats=stats)
                )
                received: EngineCoreOutputs = self._decoder.decode(frames)
                return received
            timeout = self._due[0][0] - monotonic() if self._due else None
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except TimeoutError:
                continue

    async def reset_mm_cache_async(self) -> None:
        """There is none."""

    def shutdown(self, timeout: float | None = None) -> None:
        """There is no process to end."""

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            request_id = next(iter(self._waiting))
            answer = self._waiting.pop(request_id)
            answer.started = monotonic()
            self._running[request_id] = answer
            self._schedule(
                answer, answer.started + self._timing.draw(self._timing.ttft, answer.rng)
            )

    def _schedule(self, answer: Answer, due: float) -> None:
        heapq.heappush(self._due, (due, next(self._order), answer))

    def _take_due(self) -> list[EngineCoreOutput]:
        now = monotonic()
        outputs = []
        ready = []
        while self._due and self._due[0][0] <= now:
            ready.append(heapq.heappop(self._due))
        for due, _, answer in ready:
            request_id = answer.request.request_id
            if self._running.get(request_id) is not answer:
                continue
            outputs.append(self._make_output(answer))
            if outputs[-1].finished:
                del self._running[request_id]
            else:
                self._schedule(answer, due + self._timing.draw(self._timing.itl, answer.rng))
        return outputs

    def _make_output(self, answer: Answer) -> EngineCoreOutput:
        """The answer's next token."""
        is_first, position = answer.num_sent == 0, answer.num_sent
        answer.num_sent += 1
        is_last = answer.num_sent == answer.num_tokens
        is_full = answer.num_sent == answer.params.max_tokens
        token_id = self._words[position % len(self._words)]
        if is_last and not is_full:
            token_id = self._eos_id
        output = EngineCoreOutput(answer.request.request_id, [token_id])
        if is_last:
            output.finish_reason = FinishReason.LENGTH if is_full else FinishReason.STOP
        if is_first:
            prompt = answer.request.prompt_token_ids or []
            output.prefill_stats = PrefillStats(len(prompt), len(prompt))
            # The first token has none.
            if answer.params.prompt_logprobs is not None and len(prompt) > 1:
                output.new_prompt_logprobs_tensors = make_prompt_logprobs(
                    prompt, answer.params.prompt_logprobs
                )
            output.events = [
                EngineCoreEvent.new_event(EngineCoreEventType.QUEUED, answer.queued),
                EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, answer.started),
            ]
        if answer.options is not None:
            micro = self._choose(answer, answer.options, position)
            # As `DecisionSender` sends them; it would cost a token here more than it may.
            if micro != answer.last:
                record = np.array([position, micro], np.int32)
                output.new_sampling_mask = SamplingMaskLists(record)
                answer.last = micro
            if answer.options.level == "sequence" or answer.options.policy == "constant":
                # It will not change any more.
                answer.options = None
        if answer.params.logprobs is not None:
            output.new_logprobs = make_logprobs(token_id, answer.params.logprobs)
        return output

    def _choose(self, answer: Answer, options: Options, position: int) -> int:
        """A token's temperature in millionths; a head's is drawn at random.

        A real engine does this elsewhere: what it costs here would pass for the front end's cost.

        Raises:
            KeyError: the head was not there at the start.
        """
        if options.policy != "head":
            return bound(choose_temperature(answer, options, position), options)
        temperatures = self._heads[options.name]
        drawn = temperatures[int(answer.rng.random() * len(temperatures))]
        return bound(drawn, options)


def choose_temperature(answer: Answer, options: Options, position: int) -> float:
    """The temperature of a learning-free policy, one that these options allow."""
    if options.policy == "schedule":
        start, end, num_tokens = options.parameters
        return start + (end - start) * min(position / num_tokens, 1.0)
    if options.policy == "entropy":
        return options.parameters[0] * answer.rng.random()
    if options.policy == "list":
        return options.temperatures[min(position, len(options.temperatures) - 1)]
    if options.policy == "two_phase":
        return options.parameters[answer.is_answer]
    return options.parameters[0]


def begins_with_answer(prompt_token_ids: list[int], options: Options) -> bool:
    """Whether thinking is over where a two-phase prompt ends. The mock's words end none."""
    written = prompt_token_ids[max(0, len(prompt_token_ids) - options.num_written) :]
    for end in range(len(written), 0, -1):
        if has_before(written, end, options.marker_token_ids):
            return True
        if has_before(written, end, options.start_token_ids):
            return False
    return False


def has_before(token_ids: list[int], end: int, marker: Sequence[int]) -> bool:
    """Whether a marker ends before the position `end`."""
    return bool(marker) and token_ids[max(0, end - len(marker)) : end] == list(marker)


def bound(temperature: float, options: Options) -> int:
    """A temperature within its bounds, in millionths."""
    bounded = min(max(temperature * options.scale, options.min), options.max)
    return round(bounded * MILLION)


def make_logprobs(token_id: int, num_logprobs: int) -> LogprobsLists:
    """Log-probabilities of a token and as many others, all alike."""
    return LogprobsLists(*make_table([token_id], num_logprobs))


def make_prompt_logprobs(token_ids: list[int], num_logprobs: int) -> LogprobsTensors:
    """Log-probabilities of a prompt's tokens from the second on; there is one at least."""
    return LogprobsTensors(*map(torch.from_numpy, make_table(token_ids[1:], num_logprobs)))


def make_table(
    token_ids: list[int], num_logprobs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and log-probabilities, `[tokens, others + 1]`, and ranks, `[tokens]`.

    Args:
        num_logprobs: how many other tokens each row has. For -1, all of the vocabulary, there are
            none: a table of that size would cost more than everything that is measured here.
    """
    table = np.tile(np.arange(max(0, num_logprobs) + 1, dtype=np.int32), (len(token_ids), 1))
    table[:, 0] = token_ids
    logprobs = np.full(table.shape, -1.0, np.float32)
    return table, logprobs, np.ones(len(token_ids), np.int32)
