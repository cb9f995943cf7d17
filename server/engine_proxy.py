"""Reads the chosen temperatures off the engine's outputs, on their way to vLLM's handlers."""

import asyncio
import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from adaptive_head.options import EXTRA_ARGS_KEY
from server.record import RequestRecord, current_record
from server.report import PromptReport

_ABORT_TIMEOUT_S = 1.0
_NUMBERS = count()


class EngineProxy:
    """Stands where vLLM's handlers keep their engine client. Ordinary requests pass unseen; where
    requests are recorded, their tokens are counted."""

    def __init__(self, engine_client: EngineClient) -> None:
        self._engine_client = engine_client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine_client, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """`EngineClient.generate`, with the temperatures moved into the request's report."""
        engine, record = self._engine_client, current_record()
        report = (sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if not isinstance(report, PromptReport):
            outputs = engine.generate(prompt, sampling_params, request_id, **kwargs)
            return outputs if record is None else _Reader(None, record).read(outputs)
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
        reader = _Reader(report, record)
        if sampling_params.output_kind != RequestOutputKind.FINAL_ONLY:
            return reader.read(engine.generate(prompt, sampling_params, request_id, **kwargs))
        # A client may give several requests one name, and aborting by name would reach them all.
        request_id = f"{request_id}-{next(_NUMBERS)}"
        outputs = engine.generate(prompt, sampling_params, request_id, **kwargs)
        return reader.read_whole(outputs, engine, request_id)


class _Reader:
    """Shows a prompt's outputs to its report, and to the record of its request."""

    def __init__(self, report: PromptReport | None, record: RequestRecord | None) -> None:
        self._report = report
        self._record = record

    async def read(
        self, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs, once they have been counted."""
        self._begin()
        # Where nothing is recorded, straight to the report: this is the way of every token.
        take = self._report.read if self._report and self._record is None else self._take
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    take(output)
                    yield output
        finally:
            self._end()

    async def read_whole(
        self, outputs: AsyncGenerator[RequestOutput, None], engine: EngineClient, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same for a request that is answered in one piece.

        Where its client leaves, vLLM's generator ends without an output, and the tokens would
        count for nothing. A request that is aborted by name still delivers what it has.
        """
        self._begin()
        try:
            async with aclosing(outputs):
                output = None
                while output is None or not output.finished:
                    step = asyncio.ensure_future(anext(outputs))
                    try:
                        output = await asyncio.shield(step)
                    except asyncio.CancelledError:
                        await engine.abort(request_id)
                        await asyncio.wait([step], timeout=_ABORT_TIMEOUT_S)
                        if step.done() and step.exception() is None:
                            self._take(step.result())
                        raise
                    finally:
                        if not step.done():
                            # vLLM had not come to the engine yet, or the abort failed. A
                            # generator that runs cannot be closed.
                            step.cancel()
                            await asyncio.wait([step])
                    self._take(output)
                    yield output
        finally:
            self._end()

    def _begin(self) -> None:
        self._is_first = True
        if self._report is not None:
            self._report.begin()
        if self._record is not None:
            self._record.begin(self._report)

    def _take(self, output: RequestOutput) -> None:
        # Before the report, which exchanges the list of outputs for one that notes its use.
        if self._record is not None:
            self._record.read(output, self._is_first)
            self._is_first = False
        if self._report is not None:
            self._report.read(output)

    def _end(self) -> None:
        if self._report is not None:
            self._report.flush()
        if self._record is not None:
            self._record.end()
