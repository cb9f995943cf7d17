"""Engines of several ranks: tensor, pipeline and data parallel, on the CPU.

Of tensor-parallel ranks all but the first are led to other temperatures. What they sample shows
whether that is mended.
"""

import pytest

from tests.engine.engines import get_engines
from tests.engine.test_engine import LATER, POLICIES, adaptive, assert_aligned, model_of, ordinary
from tests.engine.test_speculation import REPEATING

__all__ = ["model_of"]

NUM_TOKENS = 6
EVERY_POLICY = [
    adaptive(prompt, options=options, max_tokens=NUM_TOKENS)
    for prompt, options in zip(REPEATING * 3, POLICIES, strict=False)
]
DRAWN = [
    adaptive(prompt, seed=seed, max_tokens=NUM_TOKENS, options={"head": head, "select": "sample"})
    for prompt, head, seed in zip(REPEATING, ("tok", "seq", "tok"), (3, None, None), strict=True)
]
# One without a seed as well: vLLM gives it the next number of a stream that ranks share.
MIXED = EVERY_POLICY + DRAWN + [ordinary(REPEATING[0], seed=None, max_tokens=NUM_TOKENS)]
# By the hidden state, once and for every token; by the logits; by seeds; and vLLM's own.
FEW = [EVERY_POLICY[i] for i in (0, 1, 3)] + DRAWN[1:] + MIXED[-1:]
RECORD = {"call": ["take_record"]}
LOAD = {"load": ["tok", 1, "seq"]}


ASTRAY = [
    step for alone in (False, True) for step in ({"call": ["lead_astray", alone]}, FEW, RECORD)
]
# Two ranks, with n-grams as drafts where a prompt repeats itself.
TENSOR_PARALLEL = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 2,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}
PIPELINE_PARALLEL = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
RAY = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
TENSOR_BATCHES = [MIXED, RECORD, LOAD, [LATER], RECORD, *ASTRAY]
PIPELINE_BATCHES = [FEW, RECORD, LOAD, [LATER], {"call": ["remove_head", "tok", 1]}, RECORD]
RAY_MODULE, REPLICAS_MODULE = "tests.engine.ray_scenario", "tests.engine.replicas"

REPLICATED = EVERY_POLICY + DRAWN[:1]
# For a head that both data-parallel engines load while they run.
SPREAD = adaptive(REPEATING[0], max_tokens=NUM_TOKENS, options={"head": "seq"})
SPREAD["params"]["extra_args"]["adaptive"] |= {"name": "later", "generation": 1}


def begin_processes(background):
    engines = get_engines(background)
    engines.begin("v2", "ranks", (TENSOR_BATCHES, TENSOR_PARALLEL))


def begin_slow_processes(background):
    engines = get_engines(background)
    engines.begin("v2", "ranks", (PIPELINE_BATCHES, PIPELINE_PARALLEL))
    begin_replicas(engines)
    begin_ray(engines)


def begin_ray(engines):
    scenario = {"engine": engines.make_config("v2", "ranks") | RAY, "batches": [FEW, RECORD]}
    engines.begin_module(RAY_MODULE, RAY_MODULE, "v2", [scenario])


def begin_replicas(engines):
    scenario = {
        "engine": engines.make_config("v1", "adaptive") | {"data_parallel_size": 2},
        "requests": REPLICATED,
        "later": SPREAD,
        "folder": str(engines.heads["seq"]),
    }
    engines.begin_module(REPLICAS_MODULE, REPLICAS_MODULE, "v1", scenario)


@pytest.fixture(scope="module")
def tensor_parallel(run_engine):
    return run_engine("v2", "ranks", TENSOR_BATCHES, **TENSOR_PARALLEL)


def assert_all_aligned(requests, answers, model_of, networks):
    for request, (answer,) in zip(requests, answers, strict=True):
        extra = request["params"].get("extra_args")
        if extra is None or extra["adaptive"]["select"] == "argmax":
            assert_aligned(request, answer, model_of, networks)
        else:
            assert len(answer["micros"]) == len(answer["token_ids"]) == NUM_TOKENS


def test_tensor_parallel_ranks_sample_the_same(tensor_parallel, model_of, networks):
    mixed, ranks = tensor_parallel["answers"][:2]
    assert tensor_parallel["num_drafts"] > 0
    assert_all_aligned(MIXED, mixed, model_of, networks)
    assert ranks[0] == ranks[1] and len(ranks[0]["steps"]) >= NUM_TOKENS // 3


def test_a_head_that_is_loaded_later_enters_on_all_ranks(tensor_parallel, model_of, networks):
    (wrong, right), ((later,),), ranks = tensor_parallel["answers"][2:5]
    assert "has changed" in wrong and right is None
    assert_aligned(LATER, later, model_of, {"tok": networks["seq"]})
    assert ranks[0] == ranks[1] and sorted(ranks[0]["heads"]) == [0, 0, 1]


def test_ranks_that_would_choose_otherwise_adopt_the_first_ones_choice(
    tensor_parallel, model_of, networks
):
    few, ranks = tensor_parallel["answers"][6:8]
    assert_all_aligned(FEW, few, model_of, networks)
    assert ranks[0] == ranks[1]


def test_without_the_broadcast_ranks_sample_different_tokens(tensor_parallel, model_of, networks):
    """The tests above would notice."""
    few, ranks = tensor_parallel["answers"][9:]
    assert ranks[0]["steps"][0][1] != ranks[1]["steps"][0][1]
    assert [tokens for tokens, _ in ranks[0]["steps"]] != [
        tokens for tokens, _ in ranks[1]["steps"]
    ]
    with pytest.raises(AssertionError):
        assert_all_aligned(FEW, few, model_of, networks)


@pytest.mark.slow
def test_of_pipeline_parallel_ranks_the_last_one_chooses(run_engine, model_of, networks):
    result = run_engine("v2", "ranks", PIPELINE_BATCHES, **PIPELINE_PARALLEL)
    few, (first, last), (wrong, right), ((later,),), removed, after = result["answers"]
    assert_all_aligned(FEW, few, model_of, networks)
    assert first == {"steps": [], "chosen": None, "heads": None}
    assert len(last["steps"]) >= NUM_TOKENS
    assert "has changed" in wrong and right is None
    assert_aligned(LATER, later, model_of, {"tok": networks["seq"]})
    assert removed == [None, None]
    assert [record["heads"] for record in after] == [None, [0, 0]]


@pytest.mark.slow
def test_rays_executor_takes_our_worker(run_engine, model_of, networks):
    begin_ray(run_engine)
    (result,) = run_engine.wait(RAY_MODULE)
    few, ranks = result["answers"]
    assert_all_aligned(FEW, few, model_of, networks)
    assert ranks[0] == ranks[1] and len(ranks[0]["steps"]) >= NUM_TOKENS


@pytest.mark.slow
def test_data_parallel_engines_each_choose_and_all_get_a_head_that_is_loaded_later(
    run_engine, model_of, networks
):
    begin_replicas(run_engine)
    result = run_engine.wait(REPLICAS_MODULE)
    for answers in result["before"]:
        assert_all_aligned(REPLICATED, [[answer] for answer in answers], model_of, networks)
    first, second = ([answer["micros"] for answer in answers] for answers in result["before"])
    assert first[-1] == second[-1], "the same seed draws otherwise in another engine"
    assert result["loaded"] == [[["tok", 0], ["seq", 0], ["later", 1]]] * 2
    for (answer,) in result["after"]:
        assert_aligned(SPREAD, answer, model_of, {"later": networks["seq"]})
