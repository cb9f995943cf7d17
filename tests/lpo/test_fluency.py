import math
from collections import Counter

import pytest

from adaptive_head.lpo.fluency import is_bad, is_garbled, is_looping

LIKELY, UNLIKELY = math.log(0.5), math.log(0.009)


@pytest.mark.parametrize(
    ("num_unlikely", "num_tokens", "expected"),
    [(0, 0, False), (0, 5, False), (1, 10, True), (1, 11, False), (6, 64, False), (7, 64, True)],
)
def test_a_tenth_of_unlikely_tokens_is_garbled(
    num_unlikely: int, num_tokens: int, expected: bool
) -> None:
    logprobs = [UNLIKELY] * num_unlikely + [LIKELY] * (num_tokens - num_unlikely)
    assert is_garbled(logprobs) == expected


def test_a_token_of_one_in_a_hundred_is_not_unlikely() -> None:
    assert not is_garbled([math.log(0.01)])
    assert is_garbled([math.log(0.0099)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("yes yes", False),
        ("one two three four five six", False),
        ("No, No, no, NO, no, no,", True),
        # One of five 3-grams is a repetition, then one of six.
        ("a b c a b c d", True),
        ("a b c d e f a b c d e f", True),
        ("a b c d e f g h a b c", False),
    ],
)
def test_a_fifth_of_repeated_trigrams_is_looping(text: str, expected: bool) -> None:
    assert is_looping(text) == expected


@pytest.mark.parametrize("text", ["a b c a b c d", "x y z x y z w", "to be or not to be or"])
def test_looping_counts_every_occurrence_after_the_first(text: str) -> None:
    words = text.split()
    counts = Counter(tuple(words[i : i + 3]) for i in range(len(words) - 2))
    repeated = sum(count - 1 for count in counts.values())
    assert is_looping(text) == (repeated / sum(counts.values()) >= 0.2)


def test_bad_is_either() -> None:
    fine = "The sea is wide and blue."
    assert not is_bad([LIKELY] * 7, fine)
    assert is_bad([UNLIKELY] * 7, fine)
    assert is_bad([LIKELY] * 7, "no no no no no no no")
