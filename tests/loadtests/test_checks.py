"""Right answers pass, and each way of being wrong is found."""

from dataclasses import replace

import pytest

from loadtests.answers import Choice
from loadtests.checks import WrongAnswerError, check_answer, check_beginning
from tests.loadtests.samples import TARGET, make_answer, make_ask, make_choice

LISTED = (0.3, 0.7, 0.7, 1.0)
FIXED = Choice("text", "length")


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (make_ask(report="tokens"), make_answer(make_choice(LISTED))),
        (make_ask(), make_answer(make_choice(LISTED, lists=False))),
        (make_ask(report="none"), make_answer(FIXED)),
        (make_ask(0.7), make_answer(FIXED)),
        (make_ask(head="seq"), make_answer(make_choice([0.7] * 3, False, level="sequence"))),
        (make_ask(scale=0.5, max=0.4), make_answer(make_choice([0.15, 0.35, 0.4], False))),
        (make_ask(min=0.5), make_answer(make_choice([0.5, 0.7], False))),
        (
            make_ask(policy="entropy", report="tokens"),
            make_answer(make_choice([0.123456, 0.8], policy="entropy", histogram={"x": 2})),
        ),
        (
            make_ask(select="mean", report="tokens"),
            make_answer(make_choice([0.123456, 0.8], histogram={"0.1": 1, "0.8": 1})),
        ),
        (
            make_ask(head="mean"),
            make_answer(make_choice([0.1, 0.8], False, head="mean")),
        ),
        (
            make_ask(num_choices=2),
            make_answer(make_choice([0.3], False), make_choice([1.0, 1.0], False)),
        ),
        (make_ask(0.7, ignore_eos=True), make_answer(FIXED, num_tokens=10)),
    ],
)
def test_a_right_answer_passes(ask, answer):
    check_answer(ask, answer, TARGET)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (make_answer(replace(make_choice(LISTED), temperatures=[0.3, 0.7, 1.0])), "3 temp"),
        (make_answer(make_choice(LISTED, tokens=5)), "the histogram counts 4 of 5"),
        (make_answer(make_choice(LISTED), num_tokens=5), "usage counts 5 tokens, the summaries 4"),
        (make_answer(make_choice((0.3, 0.35))), "temperature 0.35 is none of the head's 0.0, 0.3"),
        (make_answer(make_choice((0.3, 1.2), head="mean")), "temperature 1.2 is not from 0.0 to"),
        (make_answer(make_choice((0.3, 0.7), histogram={"0.3": 2})), "contradict the histogram"),
        (make_answer(make_choice((0.3, 0.7), mean=0.6)), "mean is not 0.6"),
        (make_answer(make_choice((0.3, 0.7), max=1.0)), "contradict the summary's min and max"),
        (make_answer(make_choice((0.3, 0.7), level="sequence")), "2 temperatures in an answer of"),
        (make_answer(make_choice((0.3, 0.7), head="seq")), "level token of a head whose level is"),
        (make_answer(make_choice((0.3,), head="lost")), "the head 'lost' is not one of"),
        (make_answer(make_choice((0.3,), policy="constant")), "policy constant where head"),
        (make_answer(FIXED), "has no summary"),
        (make_answer(replace(make_choice(LISTED), adaptive={})), "has no summary"),
        (make_answer(replace(make_choice(LISTED), adaptive={"tokens": 4})), "not of the form"),
        (make_answer(replace(make_choice(LISTED), finish_reason=None)), "finish_reason is None"),
        (make_answer(make_choice(LISTED), make_choice(LISTED)), "2 choices of 1"),
        (make_answer(make_choice([0.3] * 11)), "11 tokens of at most 10"),
        (replace(make_answer(make_choice(LISTED)), is_done=False), "without [DONE]"),
        (replace(make_answer(make_choice(LISTED)), num_tokens=None), "no usage"),
    ],
)
def test_a_wrong_answer_is_found(answer, sentence):
    with pytest.raises(WrongAnswerError) as caught:
        check_answer(make_ask(report="tokens"), answer, TARGET)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("ask", [make_ask(0.7), make_ask(report="none")])
def test_an_answer_that_says_more_than_it_was_asked_is_found(ask):
    with pytest.raises(WrongAnswerError, match="carries `adaptive`, which nobody asked for"):
        check_answer(ask, make_answer(make_choice(LISTED)), TARGET)


def test_a_summary_that_lists_temperatures_is_found():
    with pytest.raises(WrongAnswerError, match="lists temperatures"):
        check_answer(make_ask(), make_answer(make_choice(LISTED)), TARGET)


def test_an_answer_that_ends_although_it_must_not_is_found():
    with pytest.raises(WrongAnswerError, match="9 tokens, and 10 were asked for"):
        check_answer(make_ask(0.7, ignore_eos=True), make_answer(FIXED, num_tokens=9), TARGET)


def test_what_a_leaving_client_has_read_is_checked_too():
    answer = make_answer(make_choice((0.3, 0.7, 0.7)))
    check_beginning(make_ask(report="tokens"), answer)
    answer.arrivals.append(0.4)
    with pytest.raises(WrongAnswerError, match="4 chunks with 3 temperatures"):
        check_beginning(make_ask(report="tokens"), answer)
    with pytest.raises(WrongAnswerError, match="a fixed answer"):
        check_beginning(make_ask(0.7), answer)
    with pytest.raises(WrongAnswerError, match="ended without"):
        check_beginning(replace(make_ask(report="tokens"), leave_after=5), answer)
