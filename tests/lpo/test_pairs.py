import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from adaptive_head.lpo.experiment import HeadRecipe, Preference, PromptConfig, TaskConfig
from adaptive_head.lpo.pair_report import count_temperatures, write_report
from adaptive_head.lpo.pairs import (
    ALL_RIGHT,
    ALL_WRONG,
    EMPTY,
    EQUAL,
    FEW_RESPONSES,
    FEW_SPANS,
    UNALIGNED,
    PairSet,
    make_pairs,
    match_spans,
)
from adaptive_head.lpo.records import (
    DataError,
    Pair,
    Prompt,
    Response,
    Side,
    Span,
    read_records,
    write_records,
)
from adaptive_head.lpo.rewards import DistinctReward, Reward
from adaptive_head.lpo.token_ranges import cover_span, cut_out, locate_tokens

TEMPERATURES = (0.0, 0.2, 0.4)
EVERY_RESPONSE = HeadRecipe(level="token", temperatures=TEMPERATURES)
EVERY_SPAN = EVERY_RESPONSE.model_copy(update={"credit": "span"})


@dataclass
class Marks:
    """A reward that finds the given spans, by sample."""

    spans: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    has_spans: bool = True

    def check_prompt(self, prompt: Prompt) -> None: ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        raise AssertionError("responses come scored")

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        return [Span(*span) for span in self.spans.get(response.sample, [])]


def decode_characters(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are characters."""
    return "".join(map(chr, token_ids))


def answer(
    prompt_id: str,
    sample: int,
    text: str = "abcdefgh",
    *,
    temperature: float = 0.2,
    **scores: float,
) -> Response:
    """A response whose tokens are the characters of its text."""
    return Response(
        prompt_id=prompt_id,
        task=prompt_id.split("/")[0],
        sample=sample,
        seed=0,
        prompt_token_ids=(1,),
        token_ids=tuple(map(ord, text)),
        temperatures=(temperature,) * len(text),
        text=text,
        finish_reason="stop",
        scores=scores,
    )


def make_task(*rewards: str, **prefer: Any) -> TaskConfig:
    return TaskConfig(
        prompts=PromptConfig(generate="anything", num_train=1, num_test=1),
        max_tokens=9,
        rewards={name: DistinctReward(kind="distinct") for name in rewards},
        prefer=Preference(**{"first": rewards[0]} | prefer),
    )


def pair(
    responses: Sequence[Response],
    recipe: HeadRecipe = EVERY_RESPONSE,
    *,
    tasks: Mapping[str, TaskConfig] | None = None,
    rewards: Mapping[str, Reward] | None = None,
    seed: int = 0,
    prompts: Sequence[str] = (),
) -> PairSet:
    ids = dict.fromkeys([*prompts, *(response.prompt_id for response in responses)])
    if tasks is None:
        tasks = {name: make_task(*(rewards or ["good"])) for name in {i.split("/")[0] for i in ids}}
    by_task = {
        task: rewards or dict.fromkeys(config.rewards, Marks(has_spans=False))
        for task, config in tasks.items()
    }
    known = {i: Prompt(i, i.split("/")[0], text="Say.") for i in ids}
    return make_pairs(known, responses, tasks, recipe, by_task, decode_characters, seed)


def get_dropped(pairs: PairSet) -> dict[str, dict[str, int]]:
    return {counts.reward: counts.dropped for counts in pairs.report.counts}


def test_best_and_worst_response_of_each_prompt_are_a_pair_of_all_their_tokens():
    responses = [
        answer("a/0", 0, "xyz", good=0.5),
        answer("a/0", 1, "xy", good=0.9),
        answer("a/0", 2, "x", good=0.1),
        answer("a/1", 0, "xyzw", good=0.0),
        answer("a/1", 1, "xyzwv", good=1.0),
    ]
    found = pair(responses)
    assert found.pairs == (
        Pair("a", "good", Side("a/0", 1, 0, 2), Side("a/0", 2, 0, 1)),
        Pair("a", "good", Side("a/1", 1, 0, 5), Side("a/1", 0, 0, 4)),
    )
    (counts,) = found.report.counts
    assert (counts.num_prompts, counts.num_pairs, counts.dropped) == (2, 2, {})


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (9, 2)])
def test_further_pairs_are_of_the_responses_that_remain(limit, expected):
    values = [0.5, 0.9, 0.5, 0.1, 0.5, 0.7, 0.3]
    responses = [answer("a/0", number, good=value) for number, value in enumerate(values)]
    recipe = EVERY_RESPONSE.model_copy(update={"max_pairs_per_prompt": limit})
    found = pair(responses, recipe)
    samples = [(p.chosen.sample, p.rejected.sample) for p in found.pairs]
    # The three that remain tie, which drops nothing: the prompt made pairs.
    assert samples == [(1, 3), (5, 6)][:expected]
    assert get_dropped(found) == {"good": {}}


def test_two_rewards_choose_together_and_the_pair_names_both():
    values = [(0.9, 0.0), (0.8, 1.0), (0.2, 1.0), (0.1, 0.3)]
    responses = [answer("a/0", n, good=g, long=w) for n, (g, w) in enumerate(values)]
    tasks = {"a": make_task("good", "long", then="long", top=2)}
    (found,) = pair(responses, tasks=tasks).pairs
    assert (found.chosen.sample, found.rejected.sample) == (1, 3)
    assert found.reward == "good+long"


@pytest.mark.parametrize(
    ("scores", "reason"), [((1, 1), ALL_RIGHT), ((0, 0), ALL_WRONG), ((0.5, 0.5), EQUAL)]
)
def test_prompt_whose_responses_tie_is_dropped_and_told_why(scores, reason):
    responses = [answer("a/0", number, good=score) for number, score in enumerate(scores)]
    found = pair([*responses, answer("a/1", 0, good=0), answer("a/1", 1, good=1)])
    assert [p.chosen.prompt_id for p in found.pairs] == ["a/1"]
    assert get_dropped(found) == {"good": {reason: 1}}
    (counts,) = found.report.counts
    assert (counts.num_prompts, counts.num_pairs) == (2, 1)


def test_tie_by_two_rewards_is_explained_by_the_second():
    responses = [answer("a/0", 0, good=0.3, long=1), answer("a/0", 1, good=0.3, long=1)]
    tasks = {"a": make_task("good", "long", then="long")}
    assert get_dropped(pair(responses, tasks=tasks)) == {"good+long": {ALL_RIGHT: 1}}


@pytest.mark.parametrize("recipe", [EVERY_RESPONSE, EVERY_SPAN])
def test_empty_response_is_left_out_before_pairing(recipe):
    responses = [answer("a/0", 0, "", good=0), *(answer("a/0", n, good=n / 2) for n in (1, 2))]
    rewards = {"good": Marks({0: [(0, 1, 0.0)], 1: [(0, 1, 0.5)], 2: [(0, 1, 1.0)]})}
    found = pair(responses, recipe, rewards=rewards)
    assert [(p.chosen.sample, p.rejected.sample) for p in found.pairs] == [(2, 1)]
    assert found.report.dropped_responses == {"a": {EMPTY: 1}}


@pytest.mark.parametrize("recipe", [EVERY_RESPONSE, EVERY_SPAN])
def test_prompt_with_one_response_that_is_not_empty_is_dropped(recipe):
    rewards = {"good": Marks({1: [(0, 1, 0.0), (1, 2, 1.0)]})}
    found = pair([answer("a/0", 0, "", good=0), answer("a/0", 1, good=1)], recipe, rewards=rewards)
    assert found.pairs == ()
    assert get_dropped(found) == {"good": {FEW_RESPONSES: 1}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (answer("a/9", 3, good=1), "prompt a/9, sample 3: there is no such prompt"),
        (replace(answer("a/0", 3, good=1), task="b"), "prompt a/0, sample 3: task 'b'"),
        (answer("a/0", 0, good=1), "prompt a/0, sample 0: the response is there twice"),
        (answer("a/0", 3), "prompt a/0, sample 3: scores.good is missing"),
    ],
)
def test_response_that_does_not_belong_is_refused(wrong, message):
    prompts = {"a/0": Prompt("a/0", "a", text="Say.")}
    responses = [answer("a/0", 0, good=0), answer("a/0", 1, good=1), wrong]
    tasks = {"a": make_task("good")}
    with pytest.raises(DataError, match=message):
        make_pairs(prompts, responses, tasks, EVERY_RESPONSE, {}, decode_characters, 0)


def test_recipe_limits_the_tasks():
    responses = [answer(f"{task}/0", n, good=n) for task in "ab" for n in (0, 1)]
    assert {p.task for p in pair(responses).pairs} == {"a", "b"}
    only = pair(responses, EVERY_RESPONSE.model_copy(update={"tasks": ("b",)}))
    assert {p.task for p in only.pairs} == {"b"}
    assert [counts.task for counts in only.report.counts] == ["b"]
    assert only.report.dropped_responses.keys() == {"b"}


def test_spans_of_all_responses_are_pooled():
    rewards = {"mark": Marks({0: [(0, 2, 0.1), (4, 7, 0.9)], 1: [(3, 5, 0.5), (6, 8, 0.6)]})}
    found = pair([answer("a/0", 0), answer("a/0", 1)], EVERY_SPAN, rewards=rewards)
    assert set(found.pairs) == {
        Pair("a", "mark", Side("a/0", 0, 4, 7), Side("a/0", 0, 0, 2)),
        Pair("a", "mark", Side("a/0", 1, 6, 8), Side("a/0", 1, 3, 5)),
    }


def test_each_reward_is_paired_and_dropped_for_itself():
    rewards = {
        "equal": Marks({0: [(0, 1, 0.5)], 1: [(0, 1, 0.5)]}),
        "right": Marks({0: [(1, 2, 1.0)], 1: [(1, 2, 1.0)]}),
        "wrong": Marks({0: [(2, 3, 0.0)], 1: [(2, 3, 0.0)]}),
        "whole": Marks(has_spans=False),
        "few": Marks({0: [(3, 4, 0.0)]}),
        "different": Marks({0: [(4, 5, 0.0)], 1: [(4, 5, 1.0)]}),
    }
    found = pair([answer("a/0", 0), answer("a/0", 1)], EVERY_SPAN, rewards=rewards)
    assert [p.reward for p in found.pairs] == ["different"]
    assert get_dropped(found) == {
        "equal": {EQUAL: 1},
        "right": {ALL_RIGHT: 1},
        "wrong": {ALL_WRONG: 1},
        "few": {FEW_SPANS: 1},
        "different": {},
    }


def test_task_without_rewards_that_find_spans_pairs_whole_responses():
    responses = [answer("a/0", n, good=n) for n in (0, 1)]
    found = pair(responses, EVERY_SPAN, rewards={"good": Marks(has_spans=False)})
    assert found.pairs == (Pair("a", "good", Side("a/0", 1, 0, 8), Side("a/0", 0, 0, 8)),)


def test_number_of_pairs_is_limited_for_each_prompt_and_reward():
    spans = {n: [(at, at + 1, n + at / 10) for at in range(8)] for n in (0, 1)}
    odd = {n: [(at, at + 1, score) for at, _, score in spans[n] if at % 2] for n in (0, 1)}
    rewards = {"all": Marks({n: spans[n][::2] for n in (0, 1)}), "odd": Marks(odd)}
    responses = [answer(prompt, n) for prompt in ("a/0", "a/1") for n in (0, 1)]
    recipe = EVERY_SPAN.model_copy(update={"max_pairs_per_prompt": 3})
    found = pair(responses, recipe, rewards=rewards).pairs
    assert len(found) == 3 * 2 * 2
    assert len(pair(responses, EVERY_SPAN, rewards=rewards).pairs) == 4 * 2 * 2


def side(number: int) -> Side:
    return Side("a/0", number, 0, 1)


def test_best_span_meets_worst_and_none_is_used_twice():
    spans = [(score, side(number)) for number, score in enumerate([0.2, 0.9, 0.5, 0.1, 0.7])]
    matched = match_spans(spans, 9, random.Random(0))
    assert [(chosen.sample, rejected.sample) for chosen, rejected in matched] == [(1, 3), (4, 0)]


def test_spans_that_differ_by_rounding_are_not_paired():
    assert match_spans([(0.5, side(0)), (0.5 + 1e-12, side(1))], 9, random.Random(0)) == []
    assert len(match_spans([(0.5, side(0)), (0.5 + 1e-6, side(1))], 9, random.Random(0))) == 1


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=12), st.integers(1, 12))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
def test_matching_uses_each_span_once_and_leaves_no_contrast(scores, limit):
    score_of = dict(enumerate(scores))
    spans = [(score, side(number)) for number, score in score_of.items()]
    matched = match_spans(spans, limit, random.Random(1))
    used = [one.sample for both in matched for one in both]
    assert len(used) == len(set(used)) and len(matched) <= limit
    assert all(score_of[c.sample] > score_of[r.sample] for c, r in matched)
    if len(matched) < limit:
        assert len({score_of[number] for number in score_of.keys() - set(used)}) <= 1


def test_spans_of_equal_score_are_matched_at_random():
    spans = [(float(number < 8), side(number)) for number in range(16)]
    results = {tuple(match_spans(spans, 4, random.Random(seed))) for seed in range(20)}
    assert len(results) == 20
    assert len({chosen for result in results for chosen, _ in result}) == 8
    assert len({rejected for result in results for _, rejected in result}) == 8


def test_pairs_depend_on_the_seed_and_on_nothing_around_the_prompt():
    spans = {n: [(at, at + 1, float(n < 4)) for at in range(8)] for n in range(8)}
    rewards = {"mark": Marks(spans)}
    recipe = EVERY_SPAN.model_copy(update={"max_pairs_per_prompt": 5})
    own = [answer("a/0", n) for n in range(8)]
    others = [answer("a/1", n) for n in range(8)]
    alone = pair(own, recipe, rewards=rewards).pairs
    assert pair(own, recipe, rewards=rewards, seed=1).pairs != alone
    beside = pair([*others, *reversed(own)], recipe, rewards=rewards).pairs
    assert [p for p in beside if p.chosen.prompt_id == "a/0"] == list(alone)
    ranges = [(p.chosen.sample, p.chosen.start) for p in beside if p.chosen.prompt_id == "a/1"]
    assert ranges != [(p.chosen.sample, p.chosen.start) for p in alone]


def test_tokens_of_earlier_rewards_are_cut_out_of_later_ones():
    rewards = {
        "first": Marks({0: [(2, 4, 0.5)], 1: [(0, 8, 0.5)]}),
        "later": Marks({0: [(0, 8, 1.0), (2, 4, 0.9)], 1: [(0, 8, 0.8)], 2: [(5, 8, 0.0)]}),
    }
    found = pair([answer("a/0", n) for n in range(3)], EVERY_SPAN, rewards=rewards)
    # Nothing remains of (2, 4) in response 0, nor of response 1; the first reward ties.
    assert found.pairs == (Pair("a", "later", Side("a/0", 0, 4, 8), Side("a/0", 2, 5, 8)),)


def test_reward_order_is_that_of_the_task():
    rewards = {"z": Marks({n: [(0, 8, float(n))] for n in (0, 1)}), "b": Marks()}
    rewards["b"].spans = {n: [(0, 4, float(n))] for n in (0, 1)}
    responses = [answer("a/0", n) for n in (0, 1)]
    by_name = pair(responses, EVERY_SPAN, rewards=rewards, tasks={"a": make_task("b", "z")}).pairs
    assert [(p.reward, p.chosen.start, p.chosen.stop) for p in by_name] == [
        ("b", 0, 4),
        ("z", 4, 8),
    ]


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        (set(), (2, 9)),
        ({2}, (3, 9)),
        ({8}, (2, 8)),
        ({3}, (4, 9)),
        ({5}, (2, 5)),
        ({4, 6}, (2, 4)),
        ({1, 9, 20}, (2, 9)),
        (set(range(20)), None),
    ],
)
def test_span_with_holes_is_its_longest_run(taken, expected):
    assert cut_out((2, 9), taken) == expected


def test_response_whose_text_is_not_its_tokens_is_left_out_of_spans():
    rewards = {"mark": Marks({n: [(0, 1, n / 2)] for n in range(3)})}
    responses = [answer("a/0", n) for n in range(3)]
    responses[2] = replace(responses[2], text="another")
    found = pair(responses, EVERY_SPAN, rewards=rewards)
    assert [(p.chosen.sample, p.rejected.sample) for p in found.pairs] == [(1, 0)]
    assert found.report.dropped_responses == {"a": {UNALIGNED: 1}}


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """As GPT-2's, Llama 3's and SmolLM2's are: an emoji is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["She said: She went home and She slept. " * 9], trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>")])
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's and Gemma's are: bytes are tokens, and a first space is dropped."""
    words = ["▁She", "▁said", "▁", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def spell(tokenizer: Tokenizer, *pieces: str | bytes) -> list[int]:
    """Token ids: a word each, or the tokens of some bytes."""
    names = []
    for piece in pieces:
        names += [piece] if isinstance(piece, str) else [f"<0x{byte:02X}>" for byte in piece]
    return [tokenizer.token_to_id(name) for name in names]


def take(text: str, locations: Sequence[tuple[int, int]]) -> list[str]:
    return [text[start:stop] for start, stop in locations]


def test_leading_space_belongs_to_its_token(byte_level):
    text = "She said: She slept."
    token_ids = byte_level.encode(text).ids
    locations = locate_tokens(token_ids, text, byte_level.decode)
    assert take(text, locations)[:3] == ["She", " said", ":"]
    at = text.rindex("She")
    start, stop = cover_span(locations, Span(at, at + 3, 1.0))
    assert take(text, locations)[start:stop] == [" She"]


def test_emoji_belongs_to_each_of_its_tokens(byte_level):
    text = "She 😀🚀 é!"
    token_ids = byte_level.encode(text).ids
    locations = locate_tokens(token_ids, text, byte_level.decode)
    taken = take(text, locations)
    assert taken == ["She", " ", *["😀"] * 4, *["🚀"] * 4, " ", "é", "é", "!"]
    rocket = text.index("🚀")
    assert cover_span(locations, Span(rocket, rocket + 1, 1.0)) == (6, 10)
    assert cover_span(locations, Span(rocket - 1, rocket + 1, 1.0)) == (2, 10)


def test_token_without_text_belongs_to_no_span(byte_level):
    end = byte_level.token_to_id("<|end|>")
    token_ids = [*byte_level.encode("She").ids, end]
    locations = locate_tokens(token_ids, "She", byte_level.decode)
    assert locations[-1] == (3, 3)
    assert cover_span(locations, Span(0, 9, 1.0)) == (0, len(token_ids) - 1)
    assert cover_span(locations, Span(3, 9, 1.0)) is None


def test_response_may_stop_within_a_character_or_at_a_stop_string(byte_level):
    token_ids = byte_level.encode("She 😀").ids
    for text in ("She ", "She \ufffd", "She \ufffd\ufffd"):
        locations = locate_tokens(token_ids[:-2], text, byte_level.decode)
        assert take(text, locations)[:2] == ["She", " "]
    assert locate_tokens(token_ids, "She", byte_level.decode) is not None


def test_another_text_is_not_located(byte_level):
    token_ids = byte_level.encode("She said").ids
    assert locate_tokens(token_ids, "She sa1d", byte_level.decode) is None
    assert locate_tokens(token_ids, "She said more", byte_level.decode) is None


@given(
    st.lists(
        st.sampled_from(["She ", " said", "é", "😀", "👩‍🚀", "\n", "x", "  ", "日本"]), max_size=20
    ),
    st.integers(0, 5),
)
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
def test_windows_give_what_decoding_every_prefix_gives(byte_level, pieces, cut):
    text = "".join(pieces)
    token_ids = byte_level.encode(text).ids
    token_ids = token_ids[: max(0, len(token_ids) - cut)]
    locations = locate_tokens(token_ids, byte_level.decode(token_ids), byte_level.decode)
    prefixes = [byte_level.decode(token_ids[:stop]) for stop in range(len(token_ids) + 1)]
    starts = [len(prefix.rstrip("\ufffd")) for prefix in prefixes]
    stops = [
        start + prefix.endswith("\ufffd") for start, prefix in zip(starts, prefixes, strict=True)
    ]
    assert locations == list(zip(starts[:-1], stops[1:], strict=True))


def test_bytes_that_decode_to_several_signs_are_one_character(byte_fallback):
    token_ids = spell(byte_fallback, "▁She", "▁", "😀".encode(), "▁said")
    assert byte_fallback.decode(token_ids[:4]) == "She \ufffd\ufffd"
    text = "She 😀 said"
    locations = locate_tokens(token_ids, text, byte_fallback.decode)
    assert take(text, locations) == ["She", " ", *["😀"] * 4, " said"]


@pytest.mark.parametrize("number", [1, 30])
def test_space_that_decoding_drops_is_given_back(byte_fallback, number):
    token_ids = spell(byte_fallback, *["▁She"] * number)
    text = " She" * number
    assert byte_fallback.decode(token_ids) == text[1:]
    assert take(text, locate_tokens(token_ids, text, byte_fallback.decode)) == [" She"] * number
    without = text[1:]
    located = locate_tokens(token_ids, without, byte_fallback.decode)
    assert take(without, located) == ["She", *[" She"] * (number - 1)]


def test_bytes_that_are_no_character_move_nothing_else(byte_fallback):
    token_ids = spell(byte_fallback, "▁She", b"\x98\x98", *["▁said"] * 20)
    text = byte_fallback.decode(token_ids)
    located = take(text, locate_tokens(token_ids, text, byte_fallback.decode))
    assert located[0] == "She" and located[4:] == [" said"] * 19


MIXED = [
    replace(answer("a/0", 0, good=1.0), temperatures=(0.0,) * 4 + (0.2,) * 4),
    replace(answer("a/0", 1, good=0.0), temperatures=(0.4,) * 8),
]


def test_every_token_of_a_side_counts_once():
    rewards = {"mark": Marks({0: [(3, 6, 1.0)], 1: [(0, 2, 0.0)]})}
    (entry,) = count_temperatures(pair(MIXED, EVERY_SPAN, rewards=rewards), MIXED, EVERY_SPAN)
    assert (entry.chosen, entry.rejected) == ((1, 2, 0), (0, 0, 2))


def test_ratios_compare_shares():
    responses = [
        replace(answer("a/0", 0, good=1.0), temperatures=(0.0,) * 6 + (0.2,) * 2),
        replace(answer("a/0", 1, "xy", good=0.0), temperatures=(0.0, 0.2)),
    ]
    (entry,) = count_temperatures(pair(responses), responses, EVERY_RESPONSE)
    assert entry.ratios == [1.5, 0.5, None]


def test_response_of_a_sequence_level_head_counts_once():
    recipe = EVERY_RESPONSE.model_copy(update={"level": "sequence"})
    responses = [answer("a/0", 0, good=1.0), answer("a/0", 1, good=0.0, temperature=0.4)]
    (entry,) = count_temperatures(pair(responses, recipe), responses, recipe)
    assert (entry.chosen, entry.rejected) == ((0, 1, 0), (0, 0, 1))


def test_report_refuses_what_the_head_cannot_choose():
    responses = [answer("a/0", 0, good=1.0, temperature=0.3), answer("a/0", 1, good=0.0)]
    with pytest.raises(DataError, match=r"prompt a/0, sample 0: temperature 0\.3 is not one of 0,"):
        count_temperatures(pair(responses), responses, EVERY_RESPONSE)
    with pytest.raises(DataError, match="prompt a/0, sample 0: no such response"):
        count_temperatures(pair(responses), responses[1:], EVERY_RESPONSE)


def test_report_is_written_as_numbers_tables_and_a_picture(tmp_path):
    ties = [answer("a/1", n, good=1.0) for n in (0, 1)]
    responses = [*MIXED, *ties, answer("a/1", 2, "", good=1.0)]
    write_report(pair(responses), responses, EVERY_RESPONSE, tmp_path / "head")
    content = json.loads((tmp_path / "head" / "pair_report.json").read_text())
    assert content == {
        "num_pairs": 1,
        "level": "token",
        "unit": "tokens",
        "temperatures": [0.0, 0.2, 0.4],
        "rewards": [
            {
                "task": "a",
                "reward": "good",
                "num_prompts": 2,
                "num_pairs": 1,
                "dropped": {ALL_RIGHT: 1},
                "chosen": [4, 4, 0],
                "rejected": [0, 0, 8],
                "ratios": [None, None, 0.0],
            }
        ],
        "dropped_responses": {"a": {EMPTY: 1}},
    }
    text = (tmp_path / "head" / "pair_report.md").read_text()
    assert "| a | good | 2 | 1 | all right 1 |" in text
    assert "| chosen | 4 | 4 | 0 |" in text and "| chosen / rejected | – | – | 0.00 |" in text
    assert "Responses of a left out: empty 1." in text
    with Image.open(tmp_path / "head" / "pair_report.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colours


@pytest.mark.parametrize("scores", [(), (1.0, 1.0)])
def test_report_without_pairs_is_written(tmp_path, scores):
    responses = [answer("a/0", number, good=score) for number, score in enumerate(scores)]
    found = pair(responses, tasks={"a": make_task("good")}, prompts=["a/0"])
    write_report(found, responses, EVERY_RESPONSE, tmp_path)
    assert json.loads((tmp_path / "pair_report.json").read_text())["num_pairs"] == 0


def test_pairs_survive_the_disk(tmp_path):
    found = pair([answer("a/0", n, good=n) for n in (0, 1)]).pairs
    write_records(tmp_path / "pairs.jsonl", found)
    assert tuple(read_records(tmp_path / "pairs.jsonl", Pair)) == found
