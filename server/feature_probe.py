"""Asks the engine for a head's temperatures at its probe's prompts, and compares them."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.inputs.engine import tokens_input
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from adaptive_head.decision import MILLION
from adaptive_head.metadata import HeadError
from adaptive_head.options import AdaptiveRequest, Options, resolve_options
from adaptive_head.probe import find_mismatch, find_unreadable
from adaptive_head.vllm.settings import read_settings
from adaptive_head.vllm.wire import take_decisions
from server.heads import ServedHead

# A hot load waits behind the requests of a full engine.
MAX_PROBING_S = 120.0

logger = init_logger("vllm.adaptive")


async def check_features(engine_client: EngineClient, head: ServedHead) -> None:
    """Compare what a head that the engine has makes of the served model with its feature probe.

    A head without one is logged, and so is a mismatch where the settings do not verify heads.

    Raises:
        HeadError: they differ; says what was expected, what was found and what to do.
        TimeoutError: the engine has not answered.
    """
    config = engine_client.vllm_config.model_config
    if (probe := head.metadata.probe) is None:
        logger.warning(
            "Head %s has no feature probe, so nothing shows that it reads this model's hidden "
            "states as it was trained to: `adaptive-head probe` adds one",
            head.name,
        )
        return
    reason = find_unreadable(probe, config.get_vocab_size(), config.max_model_len - 1)
    if reason is None:
        # What is compared is the distribution, which a fallback would hide.
        request = AdaptiveRequest(head=head.name, select="mean", abstain=False)
        options = resolve_options(request, {head.name: head}, None)
        options = replace(options, generation=head.generation)
        found = await _ask(engine_client, options, probe.prompts)
        dtype = "quantisation" if config.quantization else str(config.dtype).removeprefix("torch.")
        reason = find_mismatch(probe, found, dtype)
    if reason is None:
        return
    problem = (
        f"head {head.name} was made for {head.metadata.base_model.name}, and its feature probe "
        f"does not fit {config.model}: {reason}; serve the model that it was made for, or train a "
        "head on this one"
    )
    if read_settings(engine_client.vllm_config.additional_config).verify_base:
        raise HeadError(
            f"{problem}; to serve it all the same, say --no-verify-base (verify_base in "
            "--additional-config)"
        )
    logger.warning("%s", problem)


async def _ask(
    engine_client: EngineClient, options: Options, prompts: Sequence[Sequence[int]]
) -> list[float]:
    """The temperature of the token after each prompt. Not through the handlers, so that neither
    metrics nor the request log count these requests."""
    try:
        async with asyncio.timeout(MAX_PROBING_S), asyncio.TaskGroup() as group:
            asked = [
                group.create_task(_ask_once(engine_client, options, prompt)) for prompt in prompts
            ]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    except TimeoutError:
        raise TimeoutError(
            f"the engine has not answered the feature probe of head {options.name} within "
            f"{MAX_PROBING_S:g} s"
        ) from None
    return [task.result() for task in asked]


async def _ask_once(engine_client: EngineClient, options: Options, prompt: Sequence[int]) -> float:
    params = SamplingParams(temperature=1.0, max_tokens=1, detokenize=False)
    params.extra_args = options.to_extra_args()
    request_id = f"adaptive-probe-{uuid4().hex}"
    decisions = None
    async for output in engine_client.generate(tokens_input(list(prompt)), params, request_id):
        decisions = take_decisions(output.outputs[0]) or decisions
    assert decisions, "a token came without a temperature"
    return decisions[0].temperature / MILLION
