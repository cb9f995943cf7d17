"""The mock server answers as the real one does: every route, every option, no model."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from loadtests.mock_engine import Timing
from server.cli import EMBEDDED_NAME

HEADS = {"sequence", "token"}


def complete(server, **options) -> dict:
    body = {"model": EMBEDDED_NAME, "prompt": "Hi", "max_tokens": 12, "ignore_eos": True}
    response = server.post("/v1/completions", body | {"temperature": "adaptive"} | options)
    assert response.is_success, response.text
    return response.json()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"head": "token"}, {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}),
        ({"head": "token", "scale": 0.5, "max": 0.3}, {0.0, 0.1, 0.2, 0.3}),
        ({"policy": "constant", "constant": {"temperature": 0.35}}, {0.35}),
        ({"policy": "two_phase", "two_phase": {"thinking": 0.9}}, {0.9}),
        (
            {"policy": "schedule", "schedule": {"start": 1.0, "end": 0.5, "tokens": 2}},
            {1.0, 0.75, 0.5},
        ),
    ],
)
def test_temperatures_are_those_that_the_options_allow(mock, options, allowed):
    answer = complete(mock, adaptive={**options, "report": "tokens"}, seed=4)
    temperatures = answer["choices"][0]["adaptive"]["temperatures"]
    assert len(temperatures) == 12
    assert set(temperatures) <= allowed


def test_a_sequence_level_head_chooses_once_and_entropy_often(mock):
    def count(**adaptive):
        (choice,) = complete(mock, adaptive={**adaptive, "report": "tokens"})["choices"]
        return len(set(choice["adaptive"]["temperatures"]))

    assert count(head="sequence") == 1
    assert count(policy="entropy") == 12


def test_several_prompts_and_answers_and_log_probabilities(mock):
    answer = complete(mock, prompt=["a", "b"], n=2, logprobs=3)
    assert answer["usage"]["completion_tokens"] == 48
    for choice in answer["choices"]:
        assert choice["adaptive"]["tokens"] == len(choice["logprobs"]["tokens"]) == 12


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 2}, {"echo": True, "logprobs": 2}])
def test_the_prompt_has_log_probabilities(mock, asked):
    prompt = "One two three four"
    tokens = mock.post("/tokenize", {"prompt": prompt}).json()["tokens"]
    (choice,) = complete(mock, prompt=prompt, temperature=1.0, **asked)["choices"]
    if "echo" in asked:
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs == [None] + [-1.0] * (len(tokens) - 1 + 12)
    else:
        first, *others = choice["prompt_logprobs"]
        assert first is None
        for token, row in zip(tokens[1:], others, strict=True):
            assert len(row) >= 2
            assert row[str(token)]["logprob"] == -1.0


def test_a_prompt_of_one_token_has_no_log_probabilities(mock):
    (choice,) = complete(mock, prompt="a", prompt_logprobs=1)["choices"]
    assert choice["prompt_logprobs"] == [None]


def test_an_ordinary_answer_is_ordinary(mock):
    (choice,) = complete(mock, temperature=0.7)["choices"]
    assert "adaptive" not in choice
    assert choice["text"].startswith(" The quick brown fox")


def test_answers_end_by_themselves_and_equal_seeds_alike(mock):
    def ask(seed):
        return complete(mock, ignore_eos=False, max_tokens=200, seed=seed)["usage"]

    assert ask(1) == ask(1)
    assert len({ask(seed)["completion_tokens"] for seed in range(6)}) > 1


def test_heads_and_metrics_are_the_real_ones(mock):
    heads = mock.get("/v1/adaptive/heads").json()["data"]
    assert {head["id"] for head in heads} == HEADS
    before = [mock.sum_metric(name) for name in COUNTED]
    complete(mock, n=2)
    complete(mock, temperature=0)
    after = [mock.sum_metric(name) for name in COUNTED]
    assert [b - a for a, b in zip(before, after, strict=True)] == [24, 36]


NUM_TOKENS = "vllm:generation_tokens_total"
COUNTED = ("adaptive_temperature_count", NUM_TOKENS)


def test_more_requests_than_fit_wait_and_all_are_answered(mock):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(mock, n=20, max_tokens=30), range(8)))
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [600] * 8


@pytest.mark.parametrize("field", ["request_id", "stop"])
def test_a_lone_surrogate_does_not_end_the_engine(mock, field):
    body = {"model": EMBEDDED_NAME, "prompt": "Hi", "max_tokens": 2, field: "\ud800"}
    assert mock.post("/v1/completions", body).status_code == 400
    assert complete(mock)["usage"]["completion_tokens"] == 12


def test_a_client_that_leaves_ends_its_request(mock):
    body = {"model": EMBEDDED_NAME, "prompt": "Hi", "max_tokens": 4000, "ignore_eos": True}
    before = mock.sum_metric(NUM_TOKENS)
    with mock.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert mock.sum_metric("vllm:num_requests_running") == 1
    mock.wait_until_idle()
    assert mock.sum_metric(NUM_TOKENS) - before < 4000


def test_waits_stay_within_their_jitter():
    class Rng:
        def __init__(self, value):
            self.value = value

        def uniform(self, low, high):
            return low + (high - low) * self.value

    timing = Timing(ttft=0.2, itl=0.1, jitter=0.5)
    assert [timing.draw(timing.itl, Rng(v)) for v in (0, 0.5, 1)] == pytest.approx(
        [0.05, 0.1, 0.15]
    )
    assert Timing(itl=0.1).draw(0.1, Rng(0.9)) == 0.1
