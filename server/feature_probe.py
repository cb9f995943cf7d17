"""Asks the engine for a head's temperatures at its probe's prompts, and compares them."""

import asyncio
from collections.abc import Sequence
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.inputs.engine import tokens_input
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from adaptive_head.decision import MILLION
from adaptive_head.head import MAX_TEMPERATURE
from adaptive_head.metadata import FeatureProbe, HeadError, HeadMetadata
from adaptive_head.options import Level, Options
from adaptive_head.probe import find_mismatch, find_unreadable
from adaptive_head.vllm.settings import read_settings
from adaptive_head.vllm.wire import take_decisions

# A hot load waits behind the requests of a full engine.
MAX_PROBING_S = 120.0

logger = init_logger("vllm.adaptive")


async def check_features(
    engine_client: EngineClient, name: str, generation: int, metadata: HeadMetadata
) -> None:
    """Compare what a head that the engine has makes of the served model with its feature probe.

    A head without one is logged, and so is a mismatch where the settings do not verify heads.

    Raises:
        HeadError: they differ; says what was expected, what was found and what to do.
        TimeoutError: the engine has not answered.
    """
    config = engine_client.vllm_config
    if (probe := metadata.probe) is None:
        logger.warning(
            "Head %s has no feature probe, so nothing shows that it reads this model's hidden "
            "states as it was trained to: `adaptive-head probe` adds one",
            name,
        )
        return
    reason = await _find_mismatch(engine_client, probe, name, generation, metadata.level)
    if reason is None:
        return
    problem = (
        f"head {name} was made for {metadata.base_model.name}, and its feature probe does not fit "
        f"{config.model_config.model}: {reason}; serve the model that it was made for, or train a "
        "head on this one"
    )
    if read_settings(config.additional_config).verify_base:
        raise HeadError(
            f"{problem}; to serve it all the same, say --no-verify-base (verify_base in "
            "--additional-config)"
        )
    logger.warning("%s", problem)


async def _find_mismatch(
    engine_client: EngineClient, probe: FeatureProbe, name: str, generation: int, level: Level
) -> str | None:
    config = engine_client.vllm_config.model_config
    unreadable = find_unreadable(probe, config.get_vocab_size(), config.max_model_len - 1)
    if unreadable is not None:
        return unreadable
    options = Options(
        policy="head",
        name=name,
        level=level,
        select="mean",
        scale=1.0,
        min=0.0,
        max=MAX_TEMPERATURE,
        generation=generation,
    )
    found = await _ask(engine_client, options, probe.prompts)
    dtype = "quantisation" if config.quantization else str(config.dtype).removeprefix("torch.")
    return find_mismatch(probe, found, dtype)


async def _ask(
    engine_client: EngineClient, options: Options, prompts: Sequence[Sequence[int]]
) -> list[float]:
    """The temperature of the token after each prompt. Not through the handlers, so that neither
    metrics nor the request log count these requests."""
    try:
        async with asyncio.timeout(MAX_PROBING_S):
            return await asyncio.gather(
                *(_ask_once(engine_client, options, prompt) for prompt in prompts)
            )
    except TimeoutError:
        raise TimeoutError(
            f"the engine has not answered the feature probe of head {options.name} within "
            f"{MAX_PROBING_S:g} s"
        ) from None


async def _ask_once(engine_client: EngineClient, options: Options, prompt: Sequence[int]) -> float:
    params = SamplingParams(temperature=1.0, max_tokens=1, detokenize=False)
    params.extra_args = options.to_extra_args()
    request_id = f"adaptive-probe-{uuid4().hex}"
    decisions = None
    async for output in engine_client.generate(tokens_input(list(prompt)), params, request_id):
        decisions = take_decisions(output.outputs[0]) or decisions
    assert decisions, "a token came without a temperature"
    return decisions[0].temperature / MILLION
