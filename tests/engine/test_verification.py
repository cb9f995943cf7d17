"""With speculative decoding tokens follow the law of adaptive sampling without it, exactly.

vLLM's rejection sampler verifies drafts for many requests; the tokens that come out are compared
with the probabilities that a chain with a temperature a token has, by Pearson's chi-squared.
"""

import numpy as np
import pytest
import torch

from tests.engine.engines import get_engines

VERIFICATION = "tests.engine.verification"
VOCAB_SIZE = 4
FIRST_TOKEN = 1
NUM_REQUESTS = 370
# vLLM verifies in parts where logits are large; here they are many. The first part is all ordinary.
NUM_PLAIN, MAX_CHUNK_ROWS = 70, 200
# After each token: a temperature that differs much from the others', one of them greedy.
TEMPERATURES = [0.0, 0.4, 1.0, 2.5]
PICKS = [3, 2, 0, 1]
# Fails once in a million runs of a right sampler; seeds are fixed, so it does or it does not.
ALPHA = 1e-6

numbers = np.random.default_rng(5)
TARGET = numbers.normal(size=(VOCAB_SIZE, VOCAB_SIZE)) * 1.2
# The draft model half knows what the model will say.
DRAFT = TARGET + numbers.normal(size=(VOCAB_SIZE, VOCAB_SIZE)) * 0.8


CASES = [("drawn", "standard")]
SLOW_CASES = [("likely", "standard"), ("drawn", "block")]


def begin_processes(background):
    begin_cases(background, CASES)


def begin_slow_processes(background):
    begin_cases(background, SLOW_CASES)


def begin_cases(background, chosen: list[tuple[str, str]]) -> None:
    """Tokens, temperatures and counts of one step of many requests, for each case."""
    common = {
        "num_requests": NUM_REQUESTS,
        "num_plain": NUM_PLAIN,
        "first_token": FIRST_TOKEN,
        "target": TARGET.tolist(),
        "draft": DRAFT.tolist(),
        "temperatures": TEMPERATURES,
        "picks": PICKS,
        "max_chunk_rows": MAX_CHUNK_ROWS,
    }
    cases = [common | {"kind": kind, "method": method} for kind, method in chosen]
    get_engines(background).begin_module(make_key(chosen), VERIFICATION, "v2", cases)


def make_key(cases: list[tuple[str, str]]) -> str:
    return f"{VERIFICATION} {cases}"


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def verified(request, background):
    group = CASES if request.param in CASES else SLOW_CASES
    begin_cases(background, group)
    return background.wait(make_key(group))[group.index(request.param)]


def law(temperatures: list[float], token: int) -> np.ndarray:
    """The probabilities of what follows a token at its temperature, in float64."""
    logits = TARGET[token].astype(np.float32).astype(np.float64)
    if temperatures[token] == 0:
        return np.eye(VOCAB_SIZE)[logits.argmax()]
    weights = np.exp((logits - logits.max()) / temperatures[token])
    return weights / weights.sum()


def find_p_value(answers: list[list[int]], temperatures: list[float]) -> float:
    """How likely tokens are that stray at least as far from their law. 0 where one is impossible.

    Whether a token is accepted depends on it alone, so each that there is follows the law of what
    comes after its predecessor.
    """
    seen = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    for answer in answers:
        for before, token in zip([FIRST_TOKEN, *answer], answer, strict=False):
            seen[before, token] += 1
    expected = np.stack([law(temperatures, token) for token in range(VOCAB_SIZE)])
    expected = expected * seen.sum(axis=1, keepdims=True)
    is_possible = expected > 0
    if seen[~is_possible].any():
        return 0.0
    statistic = ((seen - expected)[is_possible] ** 2 / expected[is_possible]).sum()
    num_free = is_possible.sum() - (seen.sum(axis=1) > 0).sum()
    half = torch.tensor([num_free / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def test_tokens_follow_the_law_of_their_own_temperatures(verified):
    by_token = [TEMPERATURES[pick] for pick in PICKS]
    assert find_p_value(verified["tokens"], by_token) > ALPHA


def test_the_test_can_tell_one_temperature_a_request_from_one_a_token(verified):
    """The temperature of a request's first row, for all of its rows, is what must not happen."""
    first = TEMPERATURES[PICKS[FIRST_TOKEN]]
    assert find_p_value(verified["tokens"], [first] * VOCAB_SIZE) < ALPHA


def test_drafts_are_accepted_and_rejected(verified):
    lengths = {len(answer) for answer in verified["tokens"]}
    assert lengths == {1, 2, 3}


def test_each_token_comes_with_its_own_temperature(verified):
    for answer, micros in zip(verified["tokens"], verified["micros"], strict=True):
        before = [FIRST_TOKEN, *answer[:-1]]
        assert micros == [round(TEMPERATURES[PICKS[token]] * 1e6) for token in before]


def test_choices_are_counted_once_for_each_token_that_stands(verified):
    micros = [micro for answer in verified["micros"] for micro in answer]
    expected = [micros.count(round(temperature * 1e6)) for temperature in TEMPERATURES]
    assert verified["counts"] == expected
