"""Whether an answer is bad: garbled, or going round in circles.

The two ends of the temperature: what is too hot garbles, what is too cold loops. Neither needs to
know what was asked.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

# Below this probability at temperature 1 a token is one that the model would hardly have chosen.
UNLIKELY_PROBABILITY: Final = 0.01
MIN_UNLIKELY_SHARE: Final = 0.1
MIN_REPEATED_SHARE: Final = 0.2
_NGRAM_SIZE = 3


def is_garbled(logprobs: Sequence[float]) -> bool:
    """Whether at least a tenth of an answer's tokens are unlikely.

    Args:
        logprobs: of each token, the model's own at temperature 1, in nats. An answer without
            tokens is not garbled.
    """
    limit = math.log(UNLIKELY_PROBABILITY)
    num_unlikely = sum(logprob < limit for logprob in logprobs)
    return num_unlikely > 0 and num_unlikely >= MIN_UNLIKELY_SHARE * len(logprobs)


def is_looping(text: str) -> bool:
    """Whether at least a fifth of an answer's word 3-grams occurred before in it."""
    ngrams = list(find_ngrams(text, _NGRAM_SIZE))
    num_repeated = len(ngrams) - len(set(ngrams))
    return num_repeated > 0 and num_repeated >= MIN_REPEATED_SHARE * len(ngrams)


def is_bad(logprobs: Sequence[float], text: str) -> bool:
    """Whether an answer is garbled or looping."""
    return is_garbled(logprobs) or is_looping(text)


def find_ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """The runs of `n` words, in lower case, one for each word from the n-th on."""
    words = text.lower().split()
    return zip(*(words[offset:] for offset in range(n)), strict=False)
