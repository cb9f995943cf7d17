"""Rewards, against examples counted by hand."""

import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import ModelOutput

from adaptive_head.lpo.records import DataError, Prompt, Response, Span
from adaptive_head.lpo.rewards import (
    Reward,
    RewardConfig,
    build_reward,
    choose_pair,
    compare_scores,
    score_responses,
)

CONFIG: TypeAdapter[Any] = TypeAdapter(RewardConfig)
TEXTS = st.text(st.sampled_from("aB1 \n.,!?\"'-İé。$-") | st.characters(codec="utf-8"), max_size=80)


def build(kind: str, **settings: Any) -> Reward:
    return build_reward("mine", CONFIG.validate_python({"kind": kind, **settings}))


def ask(**reference: Any) -> Prompt:
    return Prompt("t/1", "t", text="Tell me", reference=reference)


def reply(text: str = "", sample: int = 0, finish: Any = "stop", **scores: float) -> Response:
    return Response("t/1", "t", sample, 0, (), (), (), text, finish, scores)


def judge(reward: Reward, text: str, **reference: Any) -> float:
    prompt = ask(**reference)
    reward.check_prompt(prompt)
    [score] = reward.score([prompt], [reply(text)])
    return score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("51 + 29 = 80", 80, 1),
        ("51 + 29 = 80", 51, 0),
        ("The answer is 80.", 80, 1),
        ("It is 80.0, exactly", 80, 1),
        ("It is 80.5", 80, 0),
        ("0.1 + 0.2 is 0.30000000000000004", 0.3, 0),
        ("It costs $1,234.50.", 1234.5, 1),
        ("It costs $1,234.50.", "$1,234.50", 1),
        ("about 1,234,567 people", 1234567, 1),
        ("they are 3, 4", 4, 1),
        ("in 1234,567", 567, 1),
        ("in 1,2345", 2345, 1),
        ("It is 0.3", 0.3, 1),
        ("50%", "50%", 1),
        ("That makes -7", -7, 1),
        ("That makes \u22127.", -7, 1),
        ("That makes -$7", -7, 1),
        ("10-3", 3, 1),
        ("(10)-3", 3, 1),
        ("10 -3", -3, 1),
        (".5", "0.5", 1),
        ("end.5", 5, 1),
        ("18", "She has 9 + 9\n#### 18", 1),
        ("９", 9, 1),
        ("eighty", 80, 0),
        ("", 0, 0),
        ("9" * 400, 10**400 - 1, 1),
    ],
)
def test_number_counts_the_last(text: str, answer: Any, score: float) -> None:
    assert judge(build("number"), text, answer=answer) == score


@pytest.mark.parametrize(
    ("settings", "text", "score"),
    [
        ({"extract": "first"}, "5, not 6", 1),
        ({"extract": "first"}, "6, not 5", 0),
        ({"extract": "after", "marker": "####"}, "7 so\n#### 5 (or 6)", 1),
        ({"extract": "after", "marker": "####"}, "#### 6, no: #### 5", 1),
        ({"extract": "after", "marker": "####"}, "5", 0),
        ({"extract": "after", "marker": "####"}, "5 ####", 0),
        ({"extract": "after", "marker": "\\boxed{"}, "so $\\boxed{5}$ of 9", 1),
        ({"field": "total"}, "5", 1),
    ],
)
def test_number_of_the_reference(settings: dict[str, Any], text: str, score: float) -> None:
    field = settings.get("field", "answer")
    assert judge(build("number", **settings), text, **{field: 5}) == score


@pytest.mark.parametrize("answer", [None, True, "five", "5 apples", "", math.nan, math.inf, [5]])
def test_number_refuses_other_references(answer: Any) -> None:
    with pytest.raises(DataError, match=r"prompt t/1: reference\.answer is .* not a number"):
        build("number").check_prompt(ask(answer=answer))


def test_pattern() -> None:
    reward = build("pattern", pattern="^b.$", flags="im")
    assert [judge(reward, text) for text in ("a\nBe", "a b", "")] == [1, 0, 0]
    assert judge(build("pattern", pattern="b+", negate=True), "abc") == 0
    assert judge(build("pattern", pattern="b+", full=True), "abb") == 0
    assert judge(build("pattern", pattern="a|ab+", full=True), "abb") == 1
    assert judge(build("pattern", pattern="b+", full=True, negate=True), "abb") == 1
    assert judge(build("pattern", pattern="a.b"), "a\nb") == 0
    assert judge(build("pattern", pattern="a.b", flags="s"), "a\nb") == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("cat, dog, red fox", 1),
        ("  cat, dog, red fox.\n", 1),
        ("cat, dog, and red fox", 1),
        ("cat, dog and red fox", 1),
        ("Trinidad and Tobago, Chad, Mali", 1),
        ("Chad, Mali, and Trinidad and Tobago", 1),
        ("Katze, Hündin, 狐", 1),
        ("cat, dog", 0),
        ("cat, dog, fox and owl", 0),
        ("cat, dog, fox, owl", 0),
        ("cat, dog, Cat", 0),
        ("big  cat, dog, Big cat", 0),
        ("cat, , dog", 0),
        ("cat, dog, fox,", 0),
        ("cat, dog, and", 0),
        ("cat, dog, -", 0),
        ("cat, dog, a very red fox", 0),
        ("Animals: cat, dog, fox", 0),
        ("cat, dog, fox!", 0),
        ("cat, dog, fox..", 0),
        ("cat, dog.\nfox", 0),
        ("cat,\ndog, fox", 0),
        ("", 0),
        (".", 0),
    ],
)
def test_list_of_three(text: str, score: float) -> None:
    assert judge(build("list", count=3), text) == score
    assert judge(build("list"), text, count=3) == score


def test_list_of_other_sizes() -> None:
    assert judge(build("list", count=1), "cat") == 1
    assert judge(build("list", count=1), "the old grey cat") == 0
    assert judge(build("list", count=1, max_words=4), "the old grey cat") == 1
    for count in (None, "3", 0, True, 2.5):
        with pytest.raises(DataError, match=r"prompt t/1: reference\.count is .* whole number"):
            build("list").check_prompt(ask(count=count))


def test_sentence_start() -> None:
    text = 'She ran. "She hid!" he said.\n\nSheila came… She\'s here?) (She left) St'
    # The fifth is unfinished, and counts.
    openings = ["She", '"She', "he", "Sheila", "(She"]
    reward = build("sentence_start", word="She")
    spans = reward.find_spans(ask(), reply(text))
    assert [text[span.start : span.stop] for span in spans] == openings
    assert [span.score for span in spans] == [1, 1, 0, 0, 1]
    assert judge(reward, text) == 3 / 5
    assert judge(build("sentence_start", prefix="She"), text) == 4 / 5
    assert judge(build("sentence_start", prefix='"S'), text) == 1 / 5


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0),
        (" \n ", 0),
        ("...", 0),
        ("She", 1),
        ("she ran.", 0),
        ("She ran 2.5 miles. T", 1 / 2),
        ("She's late.", 1),
        ("She ran.\n***\nShe hid.", 1),
        ("She ran...  “She hid”?! «She» won", 1),
        ("She ran.)\r\nHe hid", 1 / 2),
        ("She ran\nHe hid", 1 / 2),
    ],
)
def test_sentences(text: str, score: float) -> None:
    assert judge(build("sentence_start", word="She"), text) == score


def test_repetition() -> None:
    reward = build("repetition", n=2, window=4)
    text = " to be or  not\nTo Be or that "
    # To be, be or, or not, not to, to be again, be or again, or that.
    assert judge(reward, text) == pytest.approx(5 / 7)
    spans = reward.find_spans(ask(), reply(text))
    assert [text[span.start : span.stop] for span in spans] == ["to be or  not", "To Be or that"]
    # The second window ends the last four n-grams: not to, to be, be or, or that.
    assert [span.score for span in spans] == [1, 2 / 4]
    assert [judge(reward, text) for text in ("", "word", "word word")] == [1, 1, 1]
    assert reward.find_spans(ask(), reply(" ")) == []
    assert reward.find_spans(ask(), reply(" a")) == [Span(1, 2, 1.0)]


def test_repetition_of_the_prompt() -> None:
    chat = ({"role": "user", "content": "Be brief now"}, {"role": "user", "content": "Or not"})
    plain = Prompt("p", "t", text="be brief")
    for prompt, score in [(plain, 2 / 3), (Prompt("p", "t", messages=chat), 1 / 3)]:
        reward = build("repetition", n=2, prompt=True)
        assert reward.score([prompt], [reply("Be brief or not")]) == [pytest.approx(score)]
        assert build("repetition", n=2).score([prompt], [reply("Be brief or not")]) == [1]


@given(TEXTS, st.integers(1, 4), st.integers(1, 5))
def test_windows_add_up_to_the_repetition(text: str, n: int, window: int) -> None:
    reward = build("repetition", n=n, window=window)
    num_words = len(text.split())
    spans = reward.find_spans(ask(), reply(text))
    assert [len(text[s.start : s.stop].split()) for s in spans] == [
        min(window, num_words - start) for start in range(0, num_words, window)
    ]
    if num_words >= n:
        ends = Counter(end // window for end in range(n - 1, num_words))
        weighted = sum(span.score * ends[i] for i, span in enumerate(spans))
        assert judge(reward, text) == pytest.approx(weighted / (num_words - n + 1))
        assert judge(build("distinct", n=n), text) == pytest.approx(judge(reward, text))


def test_distinct() -> None:
    assert judge(build("distinct", n=1), "a b A c") == 3 / 4
    assert judge(build("distinct"), "a b a b") == 2 / 3
    assert judge(build("distinct"), "a") == 0


def test_length() -> None:
    reward = build("length", min_words=2, max_words=4)
    scores = [judge(reward, "é " * count) for count in range(10)]
    assert scores == [0, 1 / 2, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]
    reward = build("length", max_characters=4)
    assert [judge(reward, "é" * count) for count in (0, 4, 6, 9)] == [1, 1, 1 / 2, 0]
    assert judge(build("length", min_words=0, max_words=2), "") == 1
    both = build("length", min_words=4, max_characters=4)
    assert judge(both, "a bcd") == 1 / 2
    assert judge(both, "abcde f") == 1 / 4
    assert judge(build("length", min_words=4, min_characters=2), "a") == 1 / 4


def test_length_of_the_reference() -> None:
    assert judge(build("length"), "a b c", max_words=2) == 1 / 2
    assert judge(build("length", max_words=3), "a b c", max_words=2) == 1
    with pytest.raises(DataError, match="prompt t/1: no limit"):
        build("length").check_prompt(ask(answer=3))
    with pytest.raises(DataError, match=r"prompt t/1: reference\.max_words is '3'"):
        build("length").check_prompt(ask(max_words="3"))
    with pytest.raises(DataError, match="prompt t/1: min_words 5 is above max_words 2"):
        build("length", min_words=5).check_prompt(ask(max_words=2))


def test_ended() -> None:
    finishes: list[Any] = ["stop", "length", "abort"]
    responses = [reply("x", finish=finish) for finish in finishes]
    assert build("ended").score([ask()] * 3, responses) == [1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "numbers"}, "number"),
        ({"kind": "number", "extract": "after"}, "marker"),
        ({"kind": "number", "marker": "####"}, "marker"),
        ({"kind": "number", "answer": 5}, "answer"),
        ({"kind": "pattern"}, "pattern"),
        ({"kind": "pattern", "pattern": "(a"}, "not a regular expression: missing \\)"),
        ({"kind": "pattern", "pattern": "a{99999999999999999999}"}, "not a regular expression"),
        ({"kind": "pattern", "pattern": "a", "flags": "g"}, "flags"),
        ({"kind": "list", "count": 0}, "count"),
        ({"kind": "sentence_start"}, "give either word or prefix"),
        ({"kind": "sentence_start", "word": "a", "prefix": "b"}, "give either word or prefix"),
        ({"kind": "sentence_start", "word": ""}, "word"),
        ({"kind": "repetition", "n": 0}, "n"),
        ({"kind": "repetition", "window": 0}, "window"),
        ({"kind": "length", "min_words": 3, "max_words": 2}, "min_words 3 is above max_words 2"),
        ({"kind": "python", "entry": "os.path.join"}, "package.module:function"),
        ({"kind": "reward_model"}, "model"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CONFIG.validate_python(settings)


def test_missing_references() -> None:
    for kind, key in [("number", "answer"), ("list", "count")]:
        with pytest.raises(DataError, match=rf"prompt t/1: reference\.{key} is missing"):
            build(kind).check_prompt(ask())


ALL_KINDS = [
    build("number", extract="first"),
    build("number"),
    build("pattern", pattern=r"\bword\b"),
    build("list"),
    build("sentence_start", word="She"),
    build("repetition", prompt=True),
    build("distinct"),
    build("length", max_words=5),
    build("ended"),
]


@given(TEXTS)
def test_any_text_has_a_score_and_ordered_spans(text: str) -> None:
    for reward in ALL_KINDS:
        assert 0 <= judge(reward, text, answer=5, count=3) <= 1
        spans = reward.find_spans(ask(), reply(text))
        assert reward.has_spans or not spans
        edges = [edge for span in spans for edge in (span.start, span.stop)]
        assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
        assert all(span.start < span.stop and 0 <= span.score <= 1 for span in spans)
        assert not any(text[s.start].isspace() or text[s.stop - 1].isspace() for s in spans)


@pytest.mark.parametrize(
    "part",
    ["She ran. ", "word ", "and ", "word, ", "a,", "1,111,", "1", "-", ".", "!)", '." ', "\n", "$"],
)
def test_time_grows_in_a_line(part: str) -> None:
    # Of 100,000 characters a square would take minutes.
    text = part * (100_000 // len(part))
    started = time.process_time()
    for end in ("", "x", "1", ",x", " \n"):
        for reward in ALL_KINDS:
            judge(reward, text + end, answer=5, count=3)
            reward.find_spans(ask(), reply(text + end))
    assert time.process_time() - started < 10


def test_100_000_words() -> None:
    text = " ".join(f"word{i % 30_000}{'.' * (i % 7 == 0)}" for i in range(100_000))
    started = time.process_time()
    for reward in ALL_KINDS:
        judge(reward, text, answer=5, count=3)
        reward.find_spans(ask(), reply(text))
    assert time.process_time() - started < 10


ENTRIES = """
LIMIT = 3

def count(prompt, response, factor=1):
    return factor * len(response.text)

def fail(prompt, response):
    if response.sample == 1:
        raise KeyError("color")
    return 0.5

def give(prompt, response, value):
    return value

class Judge:
    @staticmethod
    def like(prompt, response):
        return prompt.reference["answer"] in response.text
"""


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rewards.py").write_text(ENTRIES)
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return "own_rewards"


def test_own_functions(entries: str) -> None:
    assert judge(build("python", entry=f"{entries}:count"), "four") == 4
    reward = build("python", entry=f"{entries}:count", parameters={"factor": 2.5})
    assert judge(reward, "four") == 10
    assert judge(build("python", entry=f"{entries}:Judge.like"), "a yes", answer="yes") == 1
    assert not reward.has_spans and reward.find_spans(ask(), reply("four")) == []


@pytest.mark.parametrize(
    ("entry", "parameters", "message"),
    [
        ("no_such_module:f", {}, "No module named 'no_such_module'"),
        ("broken_rewards:f", {}, "ZeroDivisionError"),
        ("own_rewards:missing", {}, "no attribute 'missing'"),
        ("own_rewards:LIMIT", {}, "not a function"),
        ("own_rewards:count", {"facter": 2}, "unexpected keyword argument 'facter'"),
        ("own_rewards:give", {}, "missing a required argument: 'value'"),
    ],
)
def test_entries_that_cannot_be_called(
    entries: str, entry: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^rewards\.mine\.entry: {entry}.*{message}"):
        build("python", entry=entry, parameters=parameters)


def test_score_responses(entries: str) -> None:
    prompts = [Prompt("b", "t", text="B", reference={"answer": 2}), ask(answer=1)]
    responses = [reply("1", old=0.5), Response("b", "t", 0, 0, (), (), (), "It is 1", "length")]
    rewards = {
        "right": build("number"),
        "ended": build("ended"),
        "size": build("python", entry=f"{entries}:count"),
        "single": build("python", entry=f"{entries}:give", parameters={"value": np.float32(2)}),
    }
    scored = score_responses(rewards, prompts, responses)
    assert [response.scores for response in scored] == [
        {"old": 0.5, "right": 1.0, "ended": 1.0, "size": 1.0, "single": 2.0},
        {"right": 0.0, "ended": 0.0, "size": 7.0, "single": 2.0},
    ]
    assert all(type(score) is float for r in scored for score in r.scores.values())
    assert [response.text for response in scored] == ["1", "It is 1"]
    assert responses[0].scores == {"old": 0.5}
    assert score_responses(rewards, [], []) == []
    with pytest.raises(DataError, match="prompt b, sample 0: there is no such prompt"):
        score_responses(rewards, prompts[1:], responses)


def test_a_reward_that_raises_is_named(entries: str) -> None:
    rewards = {"mine": build("python", entry=f"{entries}:fail")}
    assert score_responses(rewards, [ask()], [reply()])[0].scores == {"mine": 0.5}
    message = r"^rewards\.mine: prompt t/1, sample 1: KeyError: 'color'$"
    with pytest.raises(DataError, match=message) as caught:
        score_responses(rewards, [ask()], [reply(), reply(sample=1)])
    assert isinstance(caught.value.__cause__, DataError)
    assert isinstance(caught.value.__cause__.__cause__, KeyError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", [1.0], 10**400, 1j])
def test_scores_that_are_no_numbers(entries: str, value: Any) -> None:
    rewards = {"mine": build("python", entry=f"{entries}:give", parameters={"value": value})}
    message = r"^rewards\.mine: prompt t/1, sample 7: the score is .* not a finite number$"
    with pytest.raises(DataError, match=message):
        score_responses(rewards, [ask()], [reply(sample=7)])


class BrokenReward:
    has_spans = False

    def __init__(self, scores: list[float] | None) -> None:
        self.scores = scores

    def check_prompt(self, prompt: Prompt) -> None: ...

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        return []

    def score(self, prompts: Any, responses: Any) -> list[float]:
        if self.scores is None:
            raise RuntimeError("out of memory")
        return self.scores


def test_a_broken_batch_is_named() -> None:
    responses = [reply(sample=4), reply(sample=5)]
    message = r"^rewards\.q: prompt t/1, sample 4 \(the first of 2\): RuntimeError: out of memory"
    with pytest.raises(DataError, match=message):
        score_responses({"q": BrokenReward(None)}, [ask()], responses)
    with pytest.raises(DataError, match=r"^rewards\.q: 1 scores for 2 responses"):
        score_responses({"q": BrokenReward([1.0])}, [ask()], responses)


def test_compare_scores() -> None:
    low, high = {"a": 0.1 + 0.2, "b": 1.0, "c": 5.0}, {"a": 0.3, "b": 2.0, "c": 4.0}
    assert compare_scores(low, high, ["a"]) == 0.5
    assert compare_scores(low, high, ["a", "b", "c"]) == 0.0
    assert compare_scores(low, high, ["c", "b"]) == 1.0
    assert compare_scores(low, high, []) == 0.5
    assert compare_scores({"a": 2e-9}, {"a": 0.0}, ["a"]) == 1.0
    assert compare_scores({"a": 0.5e-9}, {"a": 0.0}, ["a"]) == 0.5


def make_responses(*scores: tuple[float, ...], prompt_id: str = "t/1") -> list[Response]:
    names = ("a", "b")
    return [
        Response(prompt_id, "t", i, 0, (), (), (), "", "stop", dict(zip(names, row, strict=False)))
        for i, row in enumerate(scores)
    ]


def choose(responses: list[Response], *args: Any) -> tuple[int, int] | None:
    pair = choose_pair(responses, *args)
    return pair and (pair[0].sample, pair[1].sample)


def test_choose_pair_by_one_reward() -> None:
    responses = make_responses((2.0,), (3.0,), (1.0,))
    assert choose(responses, "a", None, 1) == (1, 2)
    assert choose(responses, "a") == (1, 2)
    assert choose(responses[:1], "a") is None
    assert choose([], "a") is None
    assert choose(make_responses((1.0,), (1.0,)), "a") is None
    assert choose(make_responses((1.0,), (1.0 + 1e-12,)), "a") is None


def test_choose_pair_by_two_rewards() -> None:
    rows = ((9.0, 1.0), (8.0, 3.0), (7.0, 9.0), (3.0, 0.0), (2.0, 2.0), (1.0, 1.5))
    responses = make_responses(*rows)
    assert choose(responses, "a") == (0, 5)
    assert choose(responses, "a", "b", 2) == (1, 5)
    assert choose(responses, "a", "b", 3) == (2, 3)
    assert choose(responses, "a", "b", 100) == (2, 3)
    assert choose(responses, "b", "a", 3) == (1, 5)
    # The best of the best is worse by `then` than the worst of the worst.
    assert choose(make_responses((2.0, 0.0), (1.0, 1.0)), "a", "b", 1) is None
    # A tie by `then` is broken by `first`.
    assert choose(make_responses((2.0, 0.0), (1.0, 0.0)), "a", "b", 1) == (0, 1)
    assert choose(make_responses((1.0, 0.0), (1.0, 0.0)), "a", "b", 1) is None


def test_ties_are_broken_evenly_and_always_alike() -> None:
    scores = ((1.0,), (1.0,), (1.0,), (1.0,), (0.0,), (0.0,), (0.0,), (0.0,))
    pairs: Counter[int] = Counter()
    for number in range(800):
        responses = make_responses(*scores, prompt_id=f"t/train/{number}")
        pair = choose(responses, "a")
        assert pair == choose(responses[::-1], "a")
        assert pair is not None
        pairs.update(pair)
    # Each of four is chosen 200 times in the mean, with a standard deviation of 12.
    assert sorted(pairs) == list(range(8)) and all(abs(n - 200) < 60 for n in pairs.values())


def test_ties_at_the_boundary_are_broken_evenly() -> None:
    pairs: Counter[tuple[int, int]] = Counter()
    for number in range(1200):
        rows = ((1.0, 1.0), (1.0, 2.0), (1.0, 3.0), (1.0, 0.0))
        if pair := choose(make_responses(*rows, prompt_id=f"t/train/{number}"), "a", "b", 1):
            pairs[pair] += 1
    # Any two may be the best and the worst by `a`; half of the 12 ways are in the order of `b`.
    assert set(pairs) == {(1, 0), (2, 0), (2, 1), (0, 3), (1, 3), (2, 3)}
    assert all(abs(count - 100) < 50 for count in pairs.values())


@given(
    st.lists(
        st.tuples(st.integers(0, 3).map(float), st.integers(0, 3).map(float)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_pairs_keep_the_promise(rows: list[tuple[float, float]], top: int) -> None:
    responses = make_responses(*rows)
    a = [row[0] for row in rows]
    alone = choose_pair(responses, "a", None, top)
    assert (alone is None) == (min(a) == max(a))
    if alone:
        assert (alone[0].scores["a"], alone[1].scores["a"]) == (max(a), min(a))
    if pair := choose_pair(responses, "a", "b", top):
        chosen, rejected = pair
        assert (chosen.scores["b"], chosen.scores["a"]) > (
            rejected.scores["b"],
            rejected.scores["a"],
        )
        assert sum(x > chosen.scores["a"] for x in a) < top
        assert sum(x < rejected.scores["a"] for x in a) < top
        sure = [y for x, y in rows if sum(x <= other for other in a) <= top]
        assert all(chosen.scores["b"] >= y for y in sure)


VOCABULARY = (
    "<unk> <s> </s> <pad> she he ran hid now tell me a story Hello b user assistant : . in short"
)
IDS = {name: i for i, name in enumerate(VOCABULARY.split())}
TEMPLATE = "{% for m in messages %}<s> {{ m.role }} : {{ m.content }} </s> {% endfor %}"
BERT = {
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
}


def save_tokenizer(folder: Path, chat: bool = True, **special: Any) -> None:
    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "cls_token" in special:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", IDS["<s>"]), ("</s>", IDS["</s>"])],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", **special
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)


def save_llama(folder: Path, chat: bool = True, **settings: Any) -> LlamaForSequenceClassification:
    """A reward model with random weights, whose scores differ by about one."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **{"num_labels": 1, "pad_token_id": None, **settings},
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.3 * torch.randn_like(weights)
    model.save_pretrained(folder)
    save_tokenizer(folder, chat)
    return model


def encode(text: str) -> torch.Tensor:
    return torch.tensor([[IDS[word] for word in text.split()]])


def score_alone(model: Any, texts: list[str]) -> list[float]:
    """What the model gives each text when it stands alone, without padding."""
    with torch.inference_mode():
        return [model(input_ids=encode(text)).logits.item() for text in texts]


CHAT = Prompt("c", "t", messages=({"role": "user", "content": "tell me a story"},))
ANSWERS = ["she ran .", "he hid", "she ran she ran she hid now .", "", "now"]
CHAT_START = "<s> user : tell me a story </s> <s> assistant :"


@pytest.mark.parametrize("pad", [None, IDS["<pad>"], IDS["</s>"]])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_reward_model(tmp_path: Path, pad: int | None, batch_size: int) -> None:
    model = save_llama(tmp_path, pad_token_id=pad)
    reward = build("reward_model", model=str(tmp_path), batch_size=batch_size, device="cpu")
    assert not reward.has_spans and reward.find_spans(CHAT, reply("she ran")) == []
    scores = reward.score([CHAT] * 5, [reply(text) for text in ANSWERS])
    # A model that is padded with </s> was trained to judge at the last other token.
    expected = score_alone(model, [f"{CHAT_START} {text} </s>" for text in ANSWERS])
    assert scores == pytest.approx(expected, abs=1e-4)
    assert min(abs(a - b) for a, b in combinations(expected, 2)) > 1e-3
    assert reward.score([], []) == []


def test_reward_model_of_low_precision(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    reward = build("reward_model", model=str(tmp_path), device="cpu", dtype="bfloat16")
    scores = reward.score([CHAT] * 5, [reply(text) for text in ANSWERS])
    expected = score_alone(model, [f"{CHAT_START} {text} </s>" for text in ANSWERS])
    assert scores == pytest.approx(expected, abs=0.1)
    assert scores != pytest.approx(expected, abs=1e-5)
    assert all(type(score) is float for score in scores)


def test_reward_model_of_plain_text(tmp_path: Path) -> None:
    prompt = Prompt("p", "t", text="tell me a sto")
    model = save_llama(tmp_path / "plain", chat=False)
    reward = build("reward_model", model=str(tmp_path / "plain"), device="cpu")
    scores = reward.score([prompt], [reply("ry she ran")])
    assert scores == pytest.approx(score_alone(model, ["tell me a story she ran"]), abs=1e-4)
    model = save_llama(tmp_path / "chat")
    reward = build("reward_model", model=str(tmp_path / "chat"), device="cpu")
    scores = reward.score([replace(prompt, text="tell me a story")], [reply("she ran")])
    assert scores == pytest.approx(score_alone(model, [f"{CHAT_START} she ran </s>"]), abs=1e-4)


def test_reward_model_keeps_the_end_of_what_is_too_long(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    reward = build("reward_model", model=str(tmp_path), device="cpu")
    long = "she ran " * 30 + "now he hid ."
    scores = reward.score([CHAT] * 2, [reply(long), reply("he hid " + long)])
    kept = " ".join(f"{CHAT_START} {long} </s>".split()[-32:])
    assert scores == pytest.approx(score_alone(model, [kept, kept]), abs=1e-4)


def test_reward_model_without_the_constraint(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    reward = build("reward_model", model=str(tmp_path), device="cpu", without_constraint="plain")
    messages = (
        {"role": "user", "content": "hid"},
        {"role": "user", "content": "tell me a story in short"},
    )
    prompt = Prompt("c", "t", messages=messages, reference={"plain": "tell me a story"})
    reward.check_prompt(prompt)
    scores = reward.score([prompt], [reply("she ran")])
    expected = score_alone(model, [f"<s> user : hid </s> {CHAT_START} she ran </s>"])
    assert scores == pytest.approx(expected, abs=1e-4)
    for wrong in ({}, {"plain": 3}, {"plain": ""}):
        with pytest.raises(DataError, match=r"^prompt c: reference\.plain"):
            reward.check_prompt(replace(prompt, reference=wrong))
    plain = Prompt("p", "t", text="story in short", reference={"plain": "tell me a story"})
    scores = reward.score([plain], [reply("she ran")])
    assert scores == pytest.approx(score_alone(model, [f"{CHAT_START} she ran </s>"]), abs=1e-4)


def save_bert(folder: Path, num_labels: int = 1) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=num_labels,
        pad_token_id=IDS["<pad>"],
        initializer_range=0.5,
    )
    torch.manual_seed(1)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, chat=False, **BERT)
    return model


def test_reward_model_of_pairs(tmp_path: Path) -> None:
    model = save_bert(tmp_path)
    reward = build("reward_model", model=str(tmp_path), device="cpu")
    first, second = "<s> tell me a story </s>", "she ran . </s>"
    types = torch.tensor([[0] * len(first.split()) + [1] * len(second.split())])
    with torch.inference_mode():
        logits = model(input_ids=encode(f"{first} {second}"), token_type_ids=types).logits
    scores = reward.score([CHAT] * 3, [reply("she ran ."), reply("he"), reply("now " * 40)])
    assert scores[0] == pytest.approx(logits.item(), abs=1e-4)
    assert len(set(scores)) == 3
    # Of a pair that is too long the end of the response stays.
    long = [reply("now " * 40 + end) for end in ("she ran", "he hid")]
    scores = reward.score([CHAT] * 2, long)
    assert abs(scores[0] - scores[1]) > 1e-4


@dataclass
class ScoredOutput(ModelOutput):
    """Like ArmoRM's: many logits, and one score."""

    logits: torch.Tensor | None = None
    score: torch.Tensor | None = None


def test_reward_model_with_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_llama(tmp_path, num_labels=3)
    texts = [f"{CHAT_START} {text} </s>" for text in ANSWERS]
    with torch.inference_mode():
        expected = [model(input_ids=encode(text)).logits.sum().item() for text in texts]
    forward = LlamaForSequenceClassification.forward

    def add_score(self: Any, *args: Any, **kwargs: Any) -> ScoredOutput:
        logits = forward(self, *args, **kwargs).logits
        return ScoredOutput(logits=logits, score=logits.sum(dim=-1))

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", add_score)
    reward = build("reward_model", model=str(tmp_path), device="cpu")
    scores = reward.score([CHAT] * 5, [reply(text) for text in ANSWERS])
    assert scores == pytest.approx(expected, abs=1e-4)


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    save_llama(tmp_path / "labels", num_labels=3)
    save_llama(tmp_path / "good")
    save_tokenizer(tmp_path / "language")
    config = LlamaConfig.from_pretrained(tmp_path / "good", architectures=None)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "language")
    (tmp_path / "empty").mkdir()
    for folder, settings, message in [
        ("labels", {}, "model: .*labels cannot score a response: ValueError: 3 labels"),
        ("language", {}, "model: .*language is no reward model: it lacks .* score.weight"),
        ("empty", {}, "model: .*empty cannot be loaded: "),
        ("good", {"device": "no_such"}, "device: .*good cannot run on no_such"),
    ]:
        with pytest.raises(ValueError, match=rf"^rewards\.mine\.{message}"):
            build("reward_model", model=str(tmp_path / folder), **{"device": "cpu", **settings})


def test_reward_model_names_what_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path)
    reward = build("reward_model", model=str(tmp_path), device="cpu", batch_size=2)
    responses = [reply("now", 1), reply("he hid now", 2), reply("he hid", 3)]
    bad = Prompt("c", "t", messages=({"role": "user", "text": "tell me"},))
    reward._tokenizer.chat_template = "{{ raise_exception('no system') }}"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"^prompt t/1, sample 1: TemplateError: no system"):
        reward.score([bad] * 3, responses)
    reward._tokenizer.chat_template = TEMPLATE  # type: ignore[attr-defined]

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("10 GB")

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", fail)
    message = r"^rewards.q: prompt t/1, sample 2 \(the longest of 2\): OutOfMemoryError: 10 GB"
    with pytest.raises(DataError, match=message):
        score_responses({"q": reward}, [replace(CHAT, id="t/1")], responses)


def test_settings_survive_json() -> None:
    settings = {"kind": "number", "extract": "after", "marker": "####"}
    config = CONFIG.validate_python(settings)
    assert CONFIG.validate_json(CONFIG.dump_json(config)) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.marker = "####"
