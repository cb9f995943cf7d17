"""Is every reported temperature the head's choice for the token that it is reported for?

The head is run again, by transformers, on the hidden states of the finished answers.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.server.conftest import MODEL, TEMPERATURES

pytestmark = pytest.mark.engine

# Chosen temperatures whose logits are closer than this to the likeliest one's count as ties.
TIE = 0.02
SENTENCE = "The quick brown fox, number {}, jumps over a lazy dog and runs into the old forest. "
# More than two chunks of a prefill.
LONG = "".join(SENTENCE.format(number) for number in range(30))
CASES = {
    "plain": {},
    "choices": {"n": 3},
    "prompts": {"prompt": ["Once upon", "The capital of France"], "n": 2},
    "stop": {"stop": [" time", ",", "."], "max_tokens": 24},
    "kept stop": {"stop": [" the"], "include_stop_str_in_output": True, "max_tokens": 24},
    "logprobs": {"logprobs": 3},
    "echo": {"echo": True},
    "long": {"prompt": LONG},
    "filters": {"top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    "single token": {"max_tokens": 1},
    "sequence": {"n": 3, "adaptive": {"head": "seq"}},
    "long sequence": {"prompt": LONG, "adaptive": {"head": "seq"}},
}


@pytest.fixture(scope="module")
def language_model(model):
    from transformers import AutoModel

    return AutoModel.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="module")
def score(language_model, networks):
    """The head's logits for each generated token of an answer. float32 [tokens, K]"""

    @torch.inference_mode()
    def run(answer):
        ids = torch.tensor([answer["prompt_token_ids"] + answer["token_ids"]])
        first = len(answer["prompt_token_ids"]) - 1
        hidden = language_model(ids).last_hidden_state[0][first:-1]
        logits = networks[answer["head"]](hidden)
        # A choice a sequence is made before its first token.
        return logits[:1].expand_as(logits) if answer["head"] == "seq" else logits

    return run


def is_aligned(logits, temperatures) -> bool:
    if len(logits) != len(temperatures):
        return False
    chosen = torch.tensor([[TEMPERATURES.index(temperature)] for temperature in temperatures])
    return bool((logits.max(dim=-1).values - logits.gather(1, chosen)[:, 0] < TIE).all())


def make_body(seed=1, adaptive=None, **options) -> dict:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 12, "seed": seed}
    body |= {"temperature": "adaptive", "adaptive": {"report": "tokens"} | (adaptive or {})}
    return body | {"return_token_ids": True} | options


def read_choices(choices, head) -> list[dict]:
    """Answers, from the choices of a blocking response or of all chunks."""
    answers = {}
    for choice in choices:
        empty = {"token_ids": [], "temperatures": [], "head": head}
        answer = answers.setdefault(choice["index"], empty)
        if choice.get("prompt_token_ids"):
            answer["prompt_token_ids"] = choice["prompt_token_ids"]
        answer["token_ids"] += choice["token_ids"]
        answer["temperatures"] += choice.get("adaptive", {}).get("temperatures", [])
        assert len(answer["token_ids"]) == len(answer["temperatures"])
    return [answers[index] for index in sorted(answers)]


def ask(server, body) -> list[dict]:
    """The answers of a completion request; streamed if the body says so."""
    response = server.post("/v1/completions", body)
    assert response.is_success, response.text
    if body.get("stream"):
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
    else:
        choices = response.json()["choices"]
    return read_choices(choices, body["adaptive"].get("head", "tok"))


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "streaming"])
@pytest.mark.parametrize("case", CASES)
def test_each_temperature_is_the_heads_choice_for_its_token(server, score, case, stream):
    body = make_body(stream=stream, **CASES[case])
    answers = ask(server, body)
    num_prompts = 1 if isinstance(body["prompt"], str) else len(body["prompt"])
    assert len(answers) == num_prompts * body.get("n", 1)
    for answer in answers:
        assert is_aligned(score(answer), answer["temperatures"])


def test_the_comparison_would_notice_a_shift_by_one_token(server, score):
    (answer,) = ask(server, make_body(max_tokens=48, ignore_eos=True))
    logits, temperatures = score(answer), answer["temperatures"]
    assert len(set(temperatures)) > 2
    assert is_aligned(logits, temperatures)
    assert not is_aligned(logits[1:], temperatures[:-1])
    assert not is_aligned(logits[:-1], temperatures[1:])


def test_heads_at_the_sequence_level_do_not_always_choose_the_same(server):
    prompts = ["Once upon", "The capital of France", "def f(x):", "1 2 3 4", "Dear Sir", "Yes"]
    answers = ask(server, make_body(prompt=prompts, max_tokens=2, adaptive={"head": "seq"}))
    assert len({answer["temperatures"][0] for answer in answers}) > 1


def test_a_chat_is_aligned_too(client, score):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three animals."}],
        temperature="adaptive",
        seed=3,
        max_tokens=24,
        n=2,
        extra_body={"adaptive": {"report": "tokens"}, "return_token_ids": True},
    )
    for choice in answer.choices:
        found = {
            "prompt_token_ids": answer.model_extra["prompt_token_ids"],
            "token_ids": choice.model_extra["token_ids"],
            "head": "tok",
        }
        temperatures = choice.model_extra["adaptive"]["temperatures"]
        assert len(temperatures) == len(found["token_ids"])
        assert is_aligned(score(found), temperatures)


def test_many_different_requests_at_once_are_aligned(server, score):
    adaptive = [
        make_body(seed=seed, stream=bool(seed % 2), **CASES[case])
        for seed, case in enumerate([*CASES, "long", "long sequence", "sequence"])
    ]
    ordinary = {"model": MODEL, "prompt": "Once upon", "max_tokens": 24, "seed": 5}
    ordinary |= {"temperature": 0.7, "return_token_ids": True}
    alone = server.post("/v1/completions", ordinary).json()["choices"][0]
    with ThreadPoolExecutor(len(adaptive) + 3) as pool:
        asked = [pool.submit(ask, server, body) for body in adaptive]
        others = [pool.submit(server.post, "/v1/completions", ordinary) for _ in range(3)]
    for future in asked:
        for answer in future.result():
            assert is_aligned(score(answer), answer["temperatures"])
    for future in others:
        (choice,) = future.result().json()["choices"]
        assert choice["token_ids"] == alone["token_ids"], "it changes beside adaptive requests"
        assert "adaptive" not in choice
