"""Reads the chosen temperatures off the engine's outputs, on their way to vLLM's handlers."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from server.phases import mark_beginning
from server.record import RequestRecord, current_record
from server.report import PromptReport, current_report, find_prompt_report


class EngineProxy:
    """Takes the place of the engine client in vLLM's handlers.

    Adaptive requests are reported and recorded ones counted; any other gets the engine's own
    generator.
    """

    def __init__(self, engine_client: EngineClient) -> None:
        self._engine_client = engine_client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine_client, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """`EngineClient.generate`, with the temperatures moved into the request's report.

        Raises:
            VLLMValidationError: an adapter comes with a head.
        """
        report, record = find_prompt_report(sampling_params), current_record()
        # Some adapters are only found while the request is on its way; see also `admit`.
        is_adapted = kwargs.get("lora_request") is not None
        if report is not None and report.options.policy == "head" and is_adapted:
            raise VLLMValidationError(
                "the heads were made for the base model, not for an adapter", parameter="model"
            )
        if report is not None and report.options.policy == "two_phase":
            sampling_params = mark_beginning(sampling_params, prompt, current_report())
        outputs = self._engine_client.generate(prompt, sampling_params, request_id, **kwargs)
        is_read = report is not None or record is not None
        return read_outputs(outputs, report, record) if is_read else outputs


async def read_outputs(
    outputs: AsyncGenerator[RequestOutput, None],
    report: PromptReport | None,
    record: RequestRecord | None,
) -> AsyncGenerator[RequestOutput, None]:
    """A prompt's outputs, once its report and the record of its request have read them."""
    if report is not None:
        report.begin()
    if record is not None:
        record.begin(report)
    is_first = True
    try:
        async with aclosing(outputs):
            async for output in outputs:
                if record is not None:
                    record.read(output, is_first)
                    is_first = False
                if report is not None:
                    report.read(output)
                yield output
    finally:
        if record is not None:
            record.end()
        if report is not None:
            report.flush()
