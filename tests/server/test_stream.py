import asyncio
import json
import random
from types import SimpleNamespace

import pytest
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.sampling_params import SamplingParams
from vllm.utils.async_utils import merge_async_iterators

from adaptive_head.options import EXTRA_ARGS_KEY
from server.engine_proxy import EngineProxy
from server.protocol import AdaptiveCompletionRequest
from server.stream import ChunkWriter, end_with_error, write_chunks, write_events
from tests.server.fakes import Queue, feed, make_output, make_report


async def stream(items):
    for item in items:
        yield item() if callable(item) else item


async def write(report, *chunks, show_tokens=True) -> list[str]:
    written = write_chunks(stream(chunks), ChunkWriter(report, show_tokens))
    return [chunk async for chunk in written]


def to_event(content: dict) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def chunk_of(index=0, finish_reason=None, text="x", **fields) -> str:
    choice = {"index": index, "text": text, "finish_reason": finish_reason, **fields}
    return to_event({"id": "c", "choices": [choice]})


def read(event: str) -> dict:
    assert event.startswith("data: ") and event.endswith("\n\n")
    return json.loads(event.removeprefix("data: "))


def adaptive_of(event: str) -> dict | None:
    (choice,) = read(event)["choices"]
    return choice.get("adaptive")


ROLE = to_event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
USAGE = to_event({"choices": [], "usage": {"completion_tokens": 3}})
ERROR = to_event({"error": {"message": "boom", "code": 500}})
COMMENTS = [": keep-alive\n\n", ': "finish_reason":"x"\n\n']
FOREIGN = [ROLE, USAGE, ERROR, *COMMENTS, "data: [DONE]\n\n"]


@pytest.mark.parametrize("show_tokens", [True, False])
@pytest.mark.parametrize("chunk", FOREIGN)
async def test_what_holds_no_tokens_passes_byte_for_byte(chunk, show_tokens):
    report = make_report({"report": "tokens"})
    report.begin_prompt()
    assert await write(report, chunk, show_tokens=show_tokens) == [chunk]


async def test_each_chunk_lists_the_temperatures_of_its_tokens():
    report = make_report({"report": "tokens"}, num_choices=2)
    prompt_report = report.begin_prompt()

    def chunk(index, temperatures, finish_reason=None):
        def make():
            feed(prompt_report, (index, temperatures, finish_reason))
            return chunk_of(index, finish_reason)

        return make

    written = await write(
        report,
        chunk(0, [0.3]),
        chunk(1, [0.7, 0.7]),
        chunk(0, []),
        chunk(1, [0.0], "stop"),
        chunk(0, [1.0], "length"),
    )
    first, second, empty, end_1, end_0 = map(adaptive_of, written)
    assert first == {"temperatures": [0.3]}
    assert second == {"temperatures": [0.7, 0.7]}
    assert empty is None
    assert (end_1["temperatures"], end_1["tokens"], end_1["max"]) == ([0.0], 3, 0.7)
    assert (end_0["temperatures"], end_0["tokens"], end_0["max"]) == ([1.0], 2, 1.0)


async def test_every_token_is_listed_once_however_its_temperatures_last():
    """Choices whose numbers begin alike, in turns that are drawn; now and then a chunk waits."""
    draw = random.Random(0)
    report = make_report({"report": "tokens"}, num_choices=13)
    prompt_report = report.begin_prompt()
    wanted: dict[int, list[float]] = {0: [], 1: [], 12: []}
    found: dict[int, list[float]] = {index: [] for index in wanted}

    def feed_next(index):
        last = wanted[index][-1:] or [0.3]
        temperatures = [draw.choice([0.0, 0.3, 1.0, *last * 9]) for _ in range(draw.randint(0, 2))]
        wanted[index] += temperatures
        feed(prompt_report, (index, temperatures, None))

    def chunk(index):
        def make():
            for _ in range(draw.randint(1, 2)):
                feed_next(index)
            return chunk_of(index)

        return make

    indices = [draw.choice([*wanted]) for _ in range(600)]
    written = await write(report, *map(chunk, indices))
    for index, event in zip(indices, written, strict=True):
        assert read(event)["choices"][0]["index"] == index
        found[index] += (adaptive_of(event) or {"temperatures": []})["temperatures"]
    assert found == wanted
    assert sum(map(len, wanted.values())) > 600


async def test_tokens_of_outputs_that_became_no_chunk_go_with_the_next():
    report = make_report({"report": "tokens"})
    prompt_report = report.begin_prompt()
    feed(prompt_report, (0, [0.3], None))
    feed(prompt_report, (0, [0.7], None))
    written = await write(report, chunk_of(), chunk_of(finish_reason="stop"))
    assert adaptive_of(written[0]) == {"temperatures": [0.3, 0.7]}
    assert "temperatures" not in adaptive_of(written[1])


async def test_a_summary_comes_with_the_end_only():
    report = make_report({"report": "summary"})
    feed(report.begin_prompt(), (0, [0.3, 0.7], "stop"), finished=True)
    chunks = [chunk_of(), chunk_of(finish_reason="stop")]
    written = await write(report, *chunks, show_tokens=False)
    assert written[0] == chunks[0]
    assert adaptive_of(written[1]) == report[0].describe(show_tokens=False)


@pytest.mark.parametrize("show_tokens", [True, False])
async def test_text_that_looks_like_an_end_is_none(show_tokens):
    report = make_report({"report": "summary"})
    feed(report.begin_prompt(), (0, [0.3], None))
    chunk = chunk_of(text='{"finish_reason":"stop"}')
    assert await write(report, chunk, show_tokens=show_tokens) == [chunk]


async def test_nothing_else_of_a_chunk_changes():
    report = make_report({"report": "summary"})
    feed(report.begin_prompt(), (0, [0.3], "stop"), finished=True)
    chunk = chunk_of(
        finish_reason="stop",
        text='é\u2028"\\😀',
        logprobs={"token_logprobs": [-0.123456789012345, -1e-9, None], "tokens": ["\n"]},
        stop_reason=None,
    )
    (written,) = await write(report, chunk)
    expected, found = read(chunk), read(written)
    del found["choices"][0]["adaptive"]
    assert found == expected
    assert list(found["choices"][0]) == list(expected["choices"][0])


async def test_events_of_the_responses_api_list_temperatures_on_their_deltas():
    report = make_report({"report": "tokens"})
    prompt_report = report.begin_prompt()

    def event(kind, temperatures=()):
        def make():
            feed(prompt_report, (0, temperatures, None))
            return SimpleNamespace(type=kind)

        return make

    kinds = ["created", "output_text.delta", "reasoning_text.delta", "output_text.done"]
    events = [event(f"response.{kind}", [0.3] * n) for n, kind in enumerate(kinds[:3])]
    events.append(event("response.output_text.done"))
    shown = [item async for item in write_events(stream(events), report)]
    assert [getattr(item, "adaptive", None) for item in shown] == [
        None,
        {"temperatures": [0.3]},
        {"temperatures": [0.3, 0.3]},
        None,
    ]


class Engine:
    """Answers two choices a prompt, each token of a temperature of its own, at its own pace."""

    log_requests = False

    def __init__(self, paces):
        self._paces = iter(paces)
        self._num_prompts = 0

    async def add_request(self, request_id, prompt, params):
        return Queue(self._generate())

    async def _generate(self):
        first = 4 * self._num_prompts
        self._num_prompts += 1
        for position, pause in enumerate(next(self._paces)):
            for _ in range(pause):
                await asyncio.sleep(0)
            is_last = position == 3
            value = (first + position) / 10
            tokens = [value, value] if position == 1 else [value]
            finish_reason = "length" if is_last else None
            # The first choice has had one more from the second output on.
            num_before = position + (position > 1)
            yield make_output(
                (0, tokens, finish_reason, num_before),
                (1, [value + 0.05], finish_reason, position),
                finished=is_last,
            )


async def send(chunks):
    """Chunks as a connection takes them: what else is ready runs before the next one."""
    async for chunk in chunks:
        yield chunk
        for _ in range(4):
            await asyncio.sleep(0)


PACES = [
    [(0, 0, 0, 0), (0, 0, 0, 0)],
    [(0, 0, 0, 0), (9, 9, 9, 9)],
    [(3, 0, 5, 0), (0, 4, 0, 6)],
    [(20, 0, 0, 0), (0, 0, 0, 0)],
]


@pytest.mark.parametrize("paces", PACES)
async def test_merged_prompts_keep_each_chunks_own_temperatures(paces):
    """vLLM's merging of prompts reads one output ahead of the chunk that is being sent."""
    request = AdaptiveCompletionRequest.model_validate(
        {"prompt": ["a", "b"], "n": 2, "stream": True, "return_token_ids": True, "max_tokens": 9}
    )
    report = make_report({"report": "tokens"}, num_choices=2)
    proxy = EngineProxy(Engine(paces))
    outputs = [
        proxy.generate(p, SamplingParams(extra_args={EXTRA_ARGS_KEY: report.begin_prompt()}), p)
        for p in request.prompt
    ]
    handler = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    handler.enable_force_include_usage = handler.enable_prompt_tokens_details = False
    handler.system_fingerprint = None
    metadata = RequestResponseMetadata(request_id="r")
    chunks = handler.completion_stream_generator(
        request, [], merge_async_iterators(*outputs), "r", 0, "m", 2, None, metadata
    )
    *written, done = [
        c async for c in send(write_chunks(chunks, ChunkWriter(report, show_tokens=True)))
    ]
    assert done == "data: [DONE]\n\n"
    assert len(written) == 16
    for (choice,) in (read(event)["choices"] for event in written):
        expected = [token / 1e6 for token in choice["token_ids"]]
        assert choice["adaptive"]["temperatures"] == expected


async def test_a_stream_of_events_that_breaks_says_so():
    async def broken():
        yield SimpleNamespace(type="response.created")
        raise RuntimeError("secret")

    first, last = [event async for event in end_with_error(broken())]
    assert (first.type, last.type, last.sequence_number) == ("response.created", "error", 1)
    assert "RuntimeError" in last.message and "secret" not in last.message


async def test_a_stream_of_events_that_is_left_is_closed():
    is_closed = []

    async def endless():
        try:
            while True:
                yield SimpleNamespace(type="response.output_text.delta")
        finally:
            is_closed.append(True)

    events = end_with_error(endless())
    await anext(events)
    await events.aclose()
    await asyncio.sleep(0)
    assert is_closed
