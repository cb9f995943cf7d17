"""Drafts of every kind in a real engine: each token has the temperature of its own place."""

from functools import cache

import pytest

from tests.engine.engines import get_engines
from tests.engine.test_engine import (
    LOGPROBS,
    POLICIES,
    REWRITTEN,
    adaptive,
    assert_aligned,
    assert_logprobs,
    assert_phases,
    model_of,
    ordinary,
)
from tests.engine.tiny_model import make_tiny_eagle

__all__ = ["model_of"]

NUM_DRAFTS = 3
NUM_TOKENS = 10
# Prompts that repeat themselves, so that n-grams are found.
REPEATING = [[5, 9, 14, 3] * 6, [7, 7, 8] * 7, [100, 101] * 9]
MIXED = [
    request
    for prompt, options in zip(REPEATING * 3, POLICIES, strict=False)
    for request in (adaptive(prompt, options=options, max_tokens=NUM_TOKENS), ordinary(prompt))
]
SEQUENCES = [
    adaptive(prompt, seed=seed, max_tokens=40, options={"head": head})
    for seed, prompt in enumerate(REPEATING)
    for head in ("tok", "seq")
]
# A model of two words says again and again what it has said. vLLM has no bias beside drafts.
TWO_WORDS = {"allowed_token_ids": [81, 82]}
WORDS = [
    adaptive(prompt, max_tokens=NUM_TOKENS, options=options, **TWO_WORDS)
    for prompt, options in zip(REPEATING, POLICIES[:3], strict=True)
]
PHASES = [
    request | {"params": request["params"] | {"logit_bias": None} | TWO_WORDS}
    for request in REWRITTEN[:4]
]
SAMPLED = [adaptive(REPEATING[0], seed=4, options={"select": "sample"})]
SLOW_METHODS = ("draft_model", "eagle")
METHODS = ("ngram", *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW_METHODS))
BATCHES = [MIXED + WORDS, PHASES[:2], SAMPLED]
PREEMPTED = [SEQUENCES, PHASES, LOGPROBS]
PREEMPTING = {"num_gpu_blocks_override": 11, "logprobs_mode": "processed_logprobs"}


@cache
def make_configs(background) -> dict[str, dict]:
    """vLLM's configurations of drafts."""
    model = get_engines(background).model
    draft = make_tiny_eagle(background.folder / "eagle", model)
    kinds = {
        "ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 3},
        "draft_model": {"model": str(model)},
        # Drawn from its distribution, so that its probabilities take part in the verification.
        "eagle": {"model": str(draft), "draft_sample_method": "probabilistic"},
    }
    return {
        method: {"method": method, "num_speculative_tokens": NUM_DRAFTS} | fields
        for method, fields in kinds.items()
    }


def begin_processes(background):
    engines, configs = get_engines(background), make_configs(background)
    engines.begin("v2", "adaptive", (BATCHES, {"speculative_config": configs["ngram"]}))


def begin_slow_processes(background):
    engines, configs = get_engines(background), make_configs(background)
    preempting = {"speculative_config": configs["ngram"]} | PREEMPTING
    drafting = [(BATCHES, {"speculative_config": configs[method]}) for method in SLOW_METHODS]
    engines.begin("v2", "adaptive", (PREEMPTED, preempting), *drafting)


@pytest.fixture(scope="module")
def configs(background) -> dict[str, dict]:
    return make_configs(background)


@pytest.mark.parametrize("method", METHODS)
def test_every_policy_in_one_batch_is_aligned(method, run_engine, configs, model_of, networks):
    result = run_engine("v2", "adaptive", BATCHES, speculative_config=configs[method])
    assert 0 < result["num_accepted"] < result["num_drafts"]
    mixed, rewritten, ((answer,),) = result["answers"]
    for request, (aligned,) in zip(MIXED + WORDS, mixed, strict=True):
        assert_aligned(request, aligned, model_of, networks)
    for request, (phased,) in zip(PHASES, rewritten, strict=False):
        assert_phases(request, phased)
    assert len(answer["micros"]) == len(answer["token_ids"]) == 12
    assert len(set(answer["micros"])) > 1
    # Once an answer at the sequence level, else once a token: those too that the last step of an
    # answer has sampled beyond its end.
    counted = {name: sum(counts.values()) for name, _, counts in result["choices"]}
    assert counted["seq"] == 2
    num_tokens = 4 * NUM_TOKENS + 12
    assert num_tokens <= counted["tok"] <= num_tokens + 5 * NUM_DRAFTS


@pytest.mark.slow
def test_choices_phases_and_logprobs_survive_preemption(run_engine, configs, model_of, networks):
    config = configs["ngram"]
    result = run_engine("v2", "adaptive", PREEMPTED, speculative_config=config, **PREEMPTING)
    assert result["num_preemptions"] > 2
    sequences, rewritten, logprobs = result["answers"]
    for request, (answer,) in zip(SEQUENCES, sequences, strict=True):
        assert_aligned(request, answer, model_of, networks)
        if request["params"]["extra_args"]["adaptive"]["name"] == "seq":
            assert len(set(answer["micros"])) == 1
    for request, (answer,) in zip(PHASES, rewritten, strict=False):
        assert_phases(request, answer)
    for request, (answer,) in list(zip(LOGPROBS, logprobs, strict=True))[:-1]:
        assert_logprobs(request, answer, model_of)
