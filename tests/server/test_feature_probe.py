"""Probes as they are sent to an engine, and what becomes of a head that does not fit."""

import asyncio
import logging
from types import SimpleNamespace

import pytest
import torch

from adaptive_head.abstention import Abstention
from adaptive_head.metadata import FeatureProbe, HeadError
from adaptive_head.options import Options
from server import feature_probe
from server.feature_probe import check_features
from server.heads import ServedHead
from tests.server.fakes import describe_head, make_output

NUM_PROMPTS = 8
EXPECTED = tuple(index / 10 for index in range(NUM_PROMPTS))
PROBE = FeatureProbe(
    prompts=[[1, 2, index] for index in range(NUM_PROMPTS)],
    temperatures=EXPECTED,
    tolerances={"float32": 0.01, "bfloat16": 0.05},
)


class Engine:
    """Answers each prompt with the temperature that its last token stands for."""

    def __init__(self, distance=0.0, *, verify_base=True, **config) -> None:
        fields = {
            "model": "served/model",
            "dtype": torch.float32,
            "quantization": None,
            "max_model_len": 64,
            "get_vocab_size": lambda: 100,
        }
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(**fields | config),
            additional_config={"adaptive": {"verify_base": verify_base}},
        )
        self.distance = distance
        self.requests = []

    async def generate(self, prompt, sampling_params, request_id):
        self.requests.append((prompt, sampling_params, request_id))
        *_, index = prompt["prompt_token_ids"]
        await asyncio.sleep(0)
        temperature = EXPECTED[index] + self.distance
        yield make_output((0, [temperature], "length"), finished=True)


@pytest.fixture
def warnings(caplog, monkeypatch):
    # vLLM's loggers do not propagate, which keeps them from caplog.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="vllm")
    return lambda: [
        message for _, level, message in caplog.record_tuples if level >= logging.WARNING
    ]


def describe(probe: FeatureProbe | None = PROBE, **changes):
    return describe_head(**changes).model_copy(update={"probe": probe})


async def test_a_head_that_may_abstain_is_asked_for_its_distribution():
    engine = Engine()
    abstain = Abstention(threshold=0.9, fallback=5.0, statistic="margin")
    metadata = describe().model_copy(update={"abstain": abstain})
    await check_features(engine, ServedHead("tok", 3, metadata))
    for _, params, _ in engine.requests:
        assert not Options.from_extra_args(params.extra_args).can_abstain


@pytest.mark.parametrize("level", ["token", "sequence"])
async def test_a_head_is_asked_for_its_expected_temperature_after_each_prompt(level):
    engine = Engine()
    await check_features(engine, ServedHead("tok", 3, describe(level=level)))
    assert [prompt["prompt_token_ids"] for prompt, _, _ in engine.requests] == [
        list(prompt) for prompt in PROBE.prompts
    ]
    for prompt, params, _ in engine.requests:
        assert prompt["type"] == "token", "vLLM takes anything else for a raw prompt"
        assert (params.max_tokens, params.temperature) == (1, 1.0)
        expected = Options("head", "tok", level, "mean", 1.0, 0.0, 10.0, generation=3)
        assert Options.from_extra_args(params.extra_args) == expected
    assert len({request_id for _, _, request_id in engine.requests}) == NUM_PROMPTS


async def test_a_head_that_reads_other_states_is_refused_with_a_sentence():
    with pytest.raises(HeadError) as refusal:
        await check_features(Engine(0.2), ServedHead("tok", 0, describe()))
    message = str(refusal.value)
    for part in (
        "head tok was made for base",
        "does not fit served/model",
        "should be 0.00 0.10",
        "are 0.20 0.30",
        "--no-verify-base",
    ):
        assert part in message


async def test_the_tolerance_is_that_of_the_served_dtype():
    await check_features(Engine(0.04, dtype=torch.bfloat16), ServedHead("tok", 0, describe()))
    await check_features(Engine(0.04, quantization="fp8"), ServedHead("tok", 0, describe()))
    with pytest.raises(HeadError, match="apart on average, where float32 explains"):
        await check_features(Engine(0.04), ServedHead("tok", 0, describe()))


async def test_an_operator_who_knows_better_gets_a_warning(warnings):
    await check_features(Engine(0.2, verify_base=False), ServedHead("tok", 0, describe()))
    (message,) = warnings()
    assert "does not fit" in message and "--no-verify-base" not in message


async def test_a_head_without_a_probe_is_served_with_a_warning(warnings):
    engine = Engine()
    await check_features(engine, ServedHead("tok", 0, describe(None)))
    (message,) = warnings()
    assert "Head tok has no feature probe" in message and not engine.requests


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"get_vocab_size": lambda: 5}, "its token 7 is not one of the model's 5"),
        ({"max_model_len": 3}, "a prompt of 3 tokens, and the model reads 2"),
    ],
)
async def test_prompts_that_the_model_cannot_read_never_reach_the_engine(config, reason):
    engine = Engine(**config)
    with pytest.raises(HeadError, match=reason):
        await check_features(engine, ServedHead("tok", 0, describe()))
    assert not engine.requests


async def test_an_engine_that_does_not_answer_is_left_after_a_while(monkeypatch):
    monkeypatch.setattr(feature_probe, "MAX_PROBING_S", 0.05)
    engine = Engine()
    ended = []

    async def generate(*_):
        try:
            await asyncio.sleep(60)
            yield
        finally:
            ended.append(True)

    engine.generate = generate
    with pytest.raises(TimeoutError, match=r"the feature probe of head tok within 0\.05 s"):
        await check_features(engine, ServedHead("tok", 0, describe()))
    assert len(ended) == NUM_PROMPTS, "requests are aborted"
