import asyncio
import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from server.responses import write_events
from server.stream import ChunkWriter, write_chunks
from tests.server.fakes import feed, make_report


async def stream(items):
    for item in items:
        yield item() if callable(item) else item


async def write(report, *chunks, show_tokens=True) -> list[str]:
    written = write_chunks(stream(chunks), ChunkWriter(report, show_tokens).write_text)
    return [chunk async for chunk in written]


def to_event(content: dict) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def chunk_of(index=0, finish_reason=None, text="x", **fields) -> str:
    choice = {"index": index, "text": text, "finish_reason": finish_reason, "token_ids": None}
    choice |= fields
    return to_event({"id": "c", "choices": [choice]})


def read(event: str) -> dict:
    assert event.startswith("data: ") and event.endswith("\n\n")
    return json.loads(event.removeprefix("data: "))


def adaptive_of(event: str) -> dict | None:
    (choice,) = read(event)["choices"]
    return choice.get("adaptive")


ROLE = to_event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
ECHO = to_event({"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]})
USAGE = to_event({"id": "c", "choices": [], "usage": {"completion_tokens": 3}, "metrics": {}})
ERROR = to_event({"error": {"message": "boom", "code": 500}})
COMMENTS = [": keep-alive\n\n", ': "finish_reason":"x"\n\n']
FOREIGN = [ROLE, ECHO, ERROR, *COMMENTS, "data: [DONE]\n\n"]


@pytest.mark.parametrize("show_tokens", [True, False])
@pytest.mark.parametrize("chunk", FOREIGN)
async def test_what_holds_no_tokens_passes_byte_for_byte(chunk, show_tokens):
    report = make_report({"report": "tokens"})
    feed(report.begin_prompt(), (0, [0.3], None))
    assert await write(report, chunk, show_tokens=show_tokens) == [chunk]
    assert report[0].take_ready() == [0.3]


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
async def test_the_summary_is_also_at_the_top_level_of_a_choices_last_chunk(show_tokens):
    """LiteLLM drops what is on the choice of a last chunk without text."""
    report = make_report({"report": "tokens"}, num_choices=2)
    feed(report.begin_prompt(), (0, [0.3, 0.7], "stop"), (1, [1.0], "stop"), finished=True)
    chunks = [chunk_of(), chunk_of(finish_reason="stop"), chunk_of(1, finish_reason="stop")]
    begun, *ended = map(read, await write(report, *chunks, show_tokens=show_tokens))
    assert "adaptive" not in begun
    summaries = [report[index].describe(show_tokens=False) for index in range(2)]
    assert [chunk["adaptive"] for chunk in ended] == summaries


@pytest.mark.parametrize("show_tokens", [True, False])
@pytest.mark.parametrize("num_choices", [1, 2])
async def test_the_usage_repeats_the_summaries(num_choices, show_tokens):
    report = make_report({"report": "tokens"}, num_choices=num_choices)
    ends = [(index, [0.3, 0.7], "stop") for index in range(num_choices)]
    feed(report.begin_prompt(), *ends, finished=True)
    chunks = [chunk_of(index, finish_reason="stop") for index in range(num_choices)]
    *_, written = await write(report, *chunks, USAGE, show_tokens=show_tokens)
    summaries = [report[index].describe(show_tokens=False) for index in range(num_choices)]
    found, expected = read(written), read(USAGE)
    adaptive = found["usage"].pop("adaptive")
    assert adaptive == (summaries if num_choices > 1 else summaries[0])
    assert found == expected
    assert list(found) == list(expected)


async def test_the_usage_of_every_chunk_stays_as_it_is():
    """vLLM's `continuous_usage_stats`: the last chunk has the summaries, as without them."""
    report = make_report({"report": "tokens"})
    feed(report.begin_prompt(), (0, [0.3, 0.7], "stop"), finished=True)
    role = {"index": 0, "delta": {"role": "assistant"}}
    chunks = [
        to_event({"id": "c", "choices": [choice], "usage": {"completion_tokens": 1}})
        for choice in (role, {"index": 0, "token_ids": None, "finish_reason": "stop"})
    ]
    for chunk in await write(report, *chunks):
        assert read(chunk)["usage"] == {"completion_tokens": 1}


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
    del found["choices"][0]["adaptive"], found["adaptive"]
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
    shown = [item async for item in write_events(stream(events), report, True, nullcontext())]
    assert [getattr(item, "adaptive", None) for item in shown] == [
        None,
        {"temperatures": [0.3]},
        {"temperatures": [0.3, 0.3]},
        None,
    ]


async def test_a_stream_of_events_that_breaks_says_so():
    async def broken():
        yield SimpleNamespace(type="response.created")
        raise RuntimeError("secret")

    first, last = [
        event async for event in write_events(broken(), make_report(), True, nullcontext())
    ]
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

    events = write_events(endless(), make_report(), False, nullcontext())
    await anext(events)
    await events.aclose()
    await asyncio.sleep(0)
    assert is_closed
