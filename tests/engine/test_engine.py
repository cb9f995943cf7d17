"""The plugin inside vLLM, under both model runners, against transformers and stock vLLM.

V2 runs on the CPU through Triton's interpreter; see interpreted_triton/.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import vllm

from adaptive_head.options import AdaptiveRequest, Options, resolve_options
from adaptive_head.policies import EDT_BASE
from tests.engine.engines import TEMPERATURES, get_engines
from tests.engine.tiny_model import VOCAB_SIZE, last_hidden_states

RUNNERS = ("v1", "v2")
PROMPTS = [[(7 * i + 3 * j + 5) % VOCAB_SIZE for j in range(9 + 11 * i)] for i in range(6)]
MARKER, START = 77, 78
# Of three tokens each, and overlapping: the end of the one can begin the other.
LONG_MARKER, LONG_START = [81, 81, 82], [82, 81, 83]
WORDS_MARKER, WORDS_START = [81, 82, 82], [82, 81, 81]


HEADS = {
    name: SimpleNamespace(level=level, select="argmax", abstain=None)
    for name, level in (("tok", "token"), ("seq", "sequence"))
}


def tokenize(marker):
    return {
        "</think>": [MARKER],
        "<think>": [START],
        "</long>": LONG_MARKER,
        "<long>": LONG_START,
        "</two>": WORDS_MARKER,
        "<two>": WORDS_START,
    }[marker]


def options_of(**fields) -> Options:
    return resolve_options(AdaptiveRequest(**fields), HEADS, "tok", tokenize)


def adaptive(prompt, seed=1, options=None, num_written=0, **params) -> dict:
    resolved = replace(options_of(**(options or {})), num_written=num_written)
    extra = resolved.to_extra_args()
    defaults = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": seed}
    return {"prompt": prompt, "params": defaults | params | {"extra_args": extra}}


def ordinary(prompt, seed=1, **params) -> dict:
    defaults = {"temperature": 0.7, "max_tokens": 12, "ignore_eos": True, "seed": seed}
    return {"prompt": prompt, "params": defaults | params}


POLICIES = [
    {"policy": "head", "head": "tok"},
    {"policy": "head", "head": "seq"},
    {"policy": "head", "head": "tok", "scale": 0.5, "min": 0.2, "max": 0.6},
    {"policy": "entropy", "entropy": {"t0": 1.2, "theta": 0.8}},
    {"policy": "schedule", "schedule": {"start": 1.0, "end": 0.2, "tokens": 8}},
    {"policy": "constant", "constant": {"temperature": 0.5}},
    {"policy": "constant", "constant": {"temperature": 0.0}},
]
ORDINARY = [
    ordinary(PROMPTS[0]),
    ordinary(PROMPTS[1], temperature=0.0),
    ordinary(PROMPTS[2], temperature=1.0),
    ordinary(PROMPTS[3], top_p=0.9, top_k=40, min_p=0.05, logprobs=2),
    ordinary(PROMPTS[4], repetition_penalty=1.3, presence_penalty=0.4, logit_bias={"9": 4.0}),
    ordinary(PROMPTS[5], n=2),
]
MIXED = [
    request
    for options, prompt in zip(POLICIES, [*PROMPTS, PROMPTS[0]], strict=True)
    for request in (adaptive(prompt, options=options), ordinary(prompt))
]
CONSTRAINED = [
    adaptive(PROMPTS[5]),
    adaptive(PROMPTS[5], options={"head": "seq"}),
    adaptive(PROMPTS[4], n=3, options={"head": "seq"}),
    adaptive(PROMPTS[3], n=2, logprobs=1),
    adaptive(PROMPTS[2], top_k=20, top_p=0.9, min_p=0.02),
    adaptive(PROMPTS[1], repetition_penalty=1.2, logit_bias={"11": 3.0}),
    adaptive(PROMPTS[0], stop_token_ids=list(range(0, VOCAB_SIZE, 3))),
    ordinary(PROMPTS[2]),
]
PREEMPTED = [
    adaptive(prompt, seed=seed, max_tokens=40, options={"head": head})
    for seed, prompt in enumerate(PROMPTS[:4])
    for head in ("tok", "seq")
]
SAMPLED = adaptive(PROMPTS[2], seed=11, options={"select": "sample"})
CROWD = [adaptive(prompt, seed=3, options={"select": "sample"}) for prompt in PROMPTS]
TWO_PHASE = {"policy": "two_phase", "two_phase": {"thinking": 1.3, "answer": 0.2}}
LONG_PHASES = {"policy": "two_phase", "two_phase": TWO_PHASE["two_phase"] | {"marker": "</long>"}}
EXAMPLE = [*PROMPTS[1], START, 9, MARKER, 4]
PHASES = {
    "no marker": adaptive(PROMPTS[1], options=TWO_PHASE),
    "in an example": adaptive(EXAMPLE, options=TWO_PHASE, num_written=1),
    "over": adaptive(EXAMPLE, options=TWO_PHASE, num_written=2),
    "begun again": adaptive([*EXAMPLE, START, 5], options=TWO_PHASE, num_written=4),
    # A bias this strong makes the model write the marker itself, at once.
    "written": adaptive(PROMPTS[1], options=TWO_PHASE, logit_bias={str(MARKER): 100.0}),
    "long over": adaptive([*PROMPTS[3], *LONG_MARKER, 4], options=LONG_PHASES, num_written=4),
    "long at the end": adaptive(
        [*PROMPTS[1], 81, *LONG_MARKER], options=LONG_PHASES, num_written=3
    ),
    "long begun again": adaptive(
        [*LONG_MARKER, 4, *LONG_START], options=LONG_PHASES, num_written=7
    ),
    "long interrupted": adaptive(
        [81, 81, 9], options=LONG_PHASES, num_written=3, logit_bias={"82": 100.0}
    ),
    # The prompt ends within a marker, which the model completes at once.
    "long written": adaptive(
        [*PROMPTS[3], 81, 81, 81], options=LONG_PHASES, num_written=2, logit_bias={"82": 100.0}
    ),
    "long begun in an example": adaptive(
        [*PROMPTS[3], 81, 81, 81], options=LONG_PHASES, num_written=1, logit_bias={"82": 100.0}
    ),
    "long restarted": adaptive(
        [*LONG_MARKER, 81], options=LONG_PHASES, num_written=4, logit_bias={"83": 100.0}
    ),
}
# A model of two words writes these markers over and over, and is preempted within some.
REWRITTEN = [
    adaptive(
        prompt,
        seed=seed,
        max_tokens=40,
        logit_bias={"81": 100.0, "82": 100.0},
        options={
            "policy": "two_phase",
            "two_phase": {"thinking": thinking, "answer": 8.0, "marker": "</two>"},
        },
    )
    for seed, prompt in enumerate(PROMPTS[:4])
    for thinking in (9.0, 10.0)
]
JUNK = [
    ordinary(PROMPTS[0], extra_args=extra_args)
    for extra_args in (
        {"adaptive": "token"},
        {"adaptive": {"policy": "head"}},
        {"adaptive": options_of().to_extra_args()["adaptive"] | {"name": "gone"}},
        {"other": 1},
    )
]
# For a head of the name `tok` that is loaded while the engine runs, with the weights of `seq`.
LATER = adaptive(PROMPTS[3])
LATER["params"]["extra_args"]["adaptive"]["generation"] = 1
LOGPROBS = [
    adaptive(PROMPTS[3], logprobs=0),
    adaptive(PROMPTS[4], logprobs=0, options={"head": "seq"}),
    adaptive(
        PROMPTS[5], logprobs=0, options={"policy": "constant", "constant": {"temperature": 0}}
    ),
    ordinary(PROMPTS[2]),
]

# An engine takes seconds to start, so each configuration has one for all its tests.
BATCHES = {
    "plain": [
        ORDINARY,
        MIXED,
        [SAMPLED],
        [*CROWD, SAMPLED],
        [SAMPLED],
        [*JUNK, SAMPLED],
        {"load": ["tok", 1, "seq"]},
        [LATER, SAMPLED],
        {"call": ["reload_weights"]},
        [LATER, SAMPLED],
    ],
    "chunked": [CONSTRAINED, list(PHASES.values())],
    "preempting": [PREEMPTED, REWRITTEN],
    "processed": [LOGPROBS],
}
ENGINES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 16, "enable_chunked_prefill": True},
    "preempting": {"num_gpu_blocks_override": 11},
    "processed": {"logprobs_mode": "processed_logprobs"},
}


def begin_processes(background):
    """Our engines one after the other, under both runners at a time; stock ones by themselves."""
    engines = get_engines(background)
    for runner in RUNNERS:
        group = [(BATCHES[name], ENGINES[name]) for name in BATCHES]
        engines.begin(runner, "adaptive", *group)
    for runner in RUNNERS:
        engines.begin(runner, "stock", ([ORDINARY], {}))


@pytest.fixture(params=RUNNERS)
def serve(request, run_engine):
    """The answers of one of the configurations."""
    return lambda name: run_engine(request.param, "adaptive", BATCHES[name], **ENGINES[name])


@pytest.fixture(scope="module")
def model_of(tiny_model):
    """Hidden states and logits for the tokens that an answer was sampled from."""
    from transformers import LlamaForCausalLM

    lm_head = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).lm_head

    def run(prompt, token_ids):
        hidden = last_hidden_states(tiny_model, prompt + token_ids)[len(prompt) - 1 : -1]
        with torch.inference_mode():
            return hidden, lm_head(hidden)

    return run


def expect_micros(options, hidden, logits, networks) -> list[float]:
    """What each token's temperature must have been, one token at a time in plain Python."""
    chosen = []
    for position, (h, row) in enumerate(zip(hidden, logits, strict=True)):
        if options.policy == "head":
            if options.level == "sequence" and chosen:
                chosen.append(chosen[0])
                continue
            value = TEMPERATURES[int(networks[options.name](h[None]).argmax())]
        elif options.policy == "entropy":
            probabilities = row.double().softmax(-1).tolist()
            entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
            value = options.parameters[0] * EDT_BASE ** (options.parameters[1] / entropy)
        elif options.policy == "schedule":
            start, end, tokens = options.parameters
            value = start + (end - start) * min(position / tokens, 1.0)
        else:
            value = options.parameters[0]
        chosen.append(min(max(value * options.scale, options.min), options.max))
    return [round(value * 1e6) for value in chosen]


def assert_aligned(request, answer, model_of, networks):
    options = Options.from_extra_args(request["params"].get("extra_args"))
    if options is None:
        assert answer["micros"] is None
        return
    assert len(answer["micros"]) == len(answer["token_ids"])
    hidden, logits = model_of(request["prompt"], answer["token_ids"])
    expected = expect_micros(options, hidden, logits, networks)
    assert answer["micros"] == pytest.approx(expected, abs=20)
    shaping = {"repetition_penalty", "logit_bias", "allowed_token_ids"}
    is_plain = not request["params"].keys() & shaping
    for micro, token, row in zip(answer["micros"], answer["token_ids"], logits, strict=True):
        if micro == 0 and is_plain:
            assert token == int(row.argmax())


def assert_logprobs(request, answer, model_of):
    """The log-probability of each token at its own temperature; at 0 it is certain."""
    _, logits = model_of(request["prompt"], answer["token_ids"])
    rows = zip(answer["token_ids"], answer["micros"], answer["logprobs"], logits, strict=True)
    for token, micro, logprobs, row in rows:
        expected = (row.double() / (micro / 1e6)).log_softmax(-1)[token].item() if micro else 0.0
        assert logprobs[str(token)] == pytest.approx(expected, abs=2e-3)


def assert_phases(request, answer):
    """Two phases with the markers of words, as told by reading the whole answer for every token."""
    options = Options.from_extra_args(request["params"]["extra_args"])
    assert not options.num_written
    text, is_answer, expected = [], False, []
    for token in answer["token_ids"]:
        if text[-3:] in (WORDS_MARKER, WORDS_START):
            is_answer = text[-3:] == WORDS_MARKER
        expected.append(round(options.parameters[is_answer] * 1e6))
        text.append(token)
    assert answer["micros"] == expected
    assert len(set(expected)) == 2, "the model has not written a marker"


def test_engines_run_the_vllm_under_test(serve):
    assert serve("plain")["version"] == vllm.__version__


def test_every_policy_in_one_batch_is_aligned(serve, model_of, networks):
    for request, answers in zip(MIXED, serve("plain")["answers"][1], strict=True):
        for answer in answers:
            assert_aligned(request, answer, model_of, networks)


@pytest.mark.parametrize("runner", RUNNERS)
def test_ordinary_requests_are_bit_for_bit_those_of_stock_vllm(runner, run_engine):
    ours = run_engine(runner, "adaptive", BATCHES["plain"], **ENGINES["plain"])["answers"]
    stock = run_engine(runner, "stock", [ORDINARY])["answers"]
    assert ours[0] == stock[0]
    assert ours[1][1] == stock[0][0], "an ordinary request changes beside adaptive ones"


def test_chunked_prefill_n_stop_logprobs_and_constraints(serve, model_of, networks):
    all_answers = serve("chunked")["answers"][0]
    for request, answers in zip(CONSTRAINED, all_answers, strict=True):
        for answer in answers:
            assert_aligned(request, answer, model_of, networks)
    stopped = all_answers[6][0]
    assert stopped["finish_reason"] == "stop" and len(stopped["token_ids"]) < 12


def test_choices_survive_preemption(serve, model_of, networks):
    result = serve("preempting")
    assert result["num_preemptions"] > 6
    for request, (answer,) in zip(PREEMPTED, result["answers"][0], strict=True):
        assert_aligned(request, answer, model_of, networks)
        if request["params"]["extra_args"]["adaptive"]["name"] == "seq":
            assert len(set(answer["micros"])) == 1


def test_processed_logprobs_are_those_of_each_tokens_own_temperature(serve, model_of):
    *adaptive_ones, _ordinary = zip(LOGPROBS, serve("processed")["answers"][0], strict=True)
    for request, (answer,) in adaptive_ones:
        assert_logprobs(request, answer, model_of)
    assert any(0 in answer["micros"] for _, (answer,) in adaptive_ones)


def test_seeded_selection_does_not_depend_on_the_batch(serve):
    alone, together, again = (batch[-1][0] for batch in serve("plain")["answers"][2:5])
    assert alone["micros"] == together["micros"] == again["micros"]
    assert alone["token_ids"] == together["token_ids"]
    assert len(set(alone["micros"])) > 1


def test_two_phases_switch_after_the_marker(serve):
    answers = serve("chunked")["answers"][1]
    micros = {name: answer["micros"] for name, (answer,) in zip(PHASES, answers, strict=True)}
    assert set(micros["no marker"]) == set(micros["in an example"]) == {1_300_000}
    assert set(micros["over"]) == {200_000}
    assert set(micros["begun again"]) == {1_300_000}
    assert micros["written"][0] == 1_300_000 and set(micros["written"][1:]) == {200_000}
    assert set(micros["long over"]) == set(micros["long at the end"]) == {200_000}
    assert set(micros["long begun again"]) == set(micros["long interrupted"]) == {1_300_000}
    long_written, restarted = micros["long written"], micros["long restarted"]
    assert set(micros["long begun in an example"]) == {1_300_000}
    assert long_written[0] == 1_300_000 and set(long_written[1:]) == {200_000}
    assert restarted[0] == 200_000 and set(restarted[1:]) == {1_300_000}


def test_long_markers_are_found_across_preemptions_as_two_phases_switch(serve):
    for request, (answer,) in zip(REWRITTEN, serve("preempting")["answers"][1], strict=True):
        assert_phases(request, answer)


def test_wrong_options_cannot_end_the_engine(serve):
    *junk, sampled = (answers[0] for answers in serve("plain")["answers"][5])
    assert [answer["micros"] for answer in junk] == [None] * 4
    assert len(sampled["micros"]) == 12


def test_a_head_that_is_loaded_later_serves_beside_its_namesake(serve, model_of, networks):
    answers = serve("plain")["answers"]
    wrong, right = answers[6]
    assert "has changed" in wrong and right is None
    (later,), (sampled,) = answers[7]
    assert_aligned(LATER, later, model_of, {"tok": networks["seq"]})
    assert sampled["micros"] == answers[2][0][0]["micros"]


def test_heads_survive_a_reload_of_the_weights(serve):
    before, reloaded, after = serve("plain")["answers"][7:]
    assert reloaded == [None] and after == before
