"""Reads the chosen temperatures off the engine's outputs, on their way to vLLM's handlers."""

import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from adaptive_head.options import EXTRA_ARGS_KEY
from server.report import PromptReport


class EngineProxy:
    """Stands where vLLM's handlers keep their engine client; ordinary requests pass unseen."""

    def __init__(self, engine_client: EngineClient) -> None:
        self._engine_client = engine_client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine_client, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """`EngineClient.generate`, with the temperatures moved into the request's report."""
        report = (sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if not isinstance(report, PromptReport):
            return self._engine_client.generate(prompt, sampling_params, *args, **kwargs)
        # Some adapters are only found while the request is on its way; see also `admit`.
        if report.options.policy == "head" and kwargs.get("lora_request") is not None:
            raise VLLMValidationError(
                "the heads were made for the base model, not for an adapter", parameter="model"
            )
        # vLLM may generate again with the same parameters (tool calls), so they keep the report.
        sampling_params = copy.copy(sampling_params)
        sampling_params.extra_args = {
            **(sampling_params.extra_args or {}),
            **report.options.to_extra_args(),
        }
        return _read(self._engine_client.generate(prompt, sampling_params, *args, **kwargs), report)


async def _read(
    outputs: AsyncGenerator[RequestOutput, None], report: PromptReport
) -> AsyncGenerator[RequestOutput, None]:
    report.begin()
    try:
        async with aclosing(outputs):
            async for output in outputs:
                report.read(output)
                yield output
    finally:
        report.flush()
