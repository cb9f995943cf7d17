"""Reading a stream: text, temperatures, times, errors."""

import json

import pytest

from loadtests.answers import Answer, ServerError, read_stream


def make_lines(*contents) -> list[bytes]:
    lines = [b"data: " + json.dumps(content).encode() for content in contents]
    return [part for line in [*lines, b"data: [DONE]"] for part in (line + b"\n", b"\n")]


def make_chunk(text="", adaptive=None, finish_reason=None) -> dict:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return {"choices": [choice | ({"adaptive": adaptive} if adaptive else {})]}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 3}}
SUMMARY = {"tokens": 3, "temperatures": [1.0]}
STREAM = make_lines(
    ROLE,
    make_chunk("Hel", {"temperatures": [0.2]}),
    make_chunk("lo", {"temperatures": [0.4]}),
    make_chunk(adaptive=SUMMARY, finish_reason="stop"),
    USAGE,
)


def read(lines, leave_after=None) -> Answer:
    """Read a stream whose lines come a second apart."""
    answer, seconds = Answer(), iter(range(100))
    read_stream(lines, answer, lambda: float(next(seconds)), leave_after)
    return answer


def test_a_stream_is_put_together():
    answer = read(STREAM)
    (choice,) = answer.choices.values()
    assert (choice.text, choice.finish_reason) == ("Hello", "stop")
    assert choice.temperatures == [0.2, 0.4, 1.0]
    assert choice.adaptive == SUMMARY
    assert (answer.num_tokens, answer.is_done) == (3, True)


def test_times_are_those_of_chunks_that_brought_tokens():
    answer = read(STREAM)
    assert answer.arrivals == [1.0, 2.0, 3.0]
    assert (answer.ttft, answer.itl, answer.duration) == (1.0, 1.0, 5.0)


def test_a_leaving_client_reads_no_further():
    answer = read(STREAM, leave_after=2)
    assert (answer.choices[0].text, answer.is_done) == ("Hello", False)
    assert answer.num_received == 2
    assert answer.num_tokens is answer.itl is None


def test_without_tokens_there_are_no_times():
    answer = read(make_lines(ROLE))
    assert answer.ttft is answer.itl is None


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (make_lines({"error": {"message": "out of memory"}}), "out of memory"),
        ([b"oops\n"], "no event"),
        ([b'data: {"choices":\n'], "cannot be read"),
        (make_lines({"choices": [{"delta": {}}]}), "KeyError"),
    ],
)
def test_what_is_no_answer_is_an_error(lines, sentence):
    with pytest.raises(ServerError, match=sentence):
        read(lines)
