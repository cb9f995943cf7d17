"""Reads the chosen temperatures off the engine's outputs, on their way to vLLM's handlers."""

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from adaptive_head.options import EXTRA_ARGS_KEY
from server.record import RequestRecord, current_record
from server.report import PromptReport

logger = init_logger("vllm.adaptive")


class EngineProxy:
    """Stands where vLLM's handlers keep their engine client. Ordinary requests pass unseen; where
    requests are recorded, their tokens are counted."""

    def __init__(self, engine_client: AsyncLLM) -> None:
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
        return _Reader(report, record).generate(
            engine, prompt, sampling_params, request_id, **kwargs
        )


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
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    self._take(output)
                    yield output
        finally:
            self._end()

    async def generate(
        self,
        engine: AsyncLLM,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        **kwargs: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's `generate`, which also counts what an aborted request had come to.

        Around vLLM's own it would not see that, and another generator would be in the way of every
        token. Errors are those of vLLM's.
        """
        self._begin()
        queue = None
        # Where nothing is recorded, straight to the report.
        take = self._report.read if self._report and self._record is None else self._take
        try:
            queue = await engine.add_request(request_id, prompt, sampling_params, **kwargs)
            is_finished = False
            while not is_finished:
                # Awaited only where nothing is there, which saves switching between tasks.
                output: Any = queue.get_nowait() or await queue.get()
                is_finished = output.finished
                take(output)
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            # The client has left.
            if queue is not None:
                await engine.abort(queue.request_id, internal=True)
                # Where the engine has died, too, that is what the queue has.
                with contextlib.suppress(EngineDeadError):
                    if (last := queue.get_nowait()) is not None:
                        self._take(last)
            _log(engine, "Request %s aborted.", request_id)
            raise
        except (EngineDeadError, VLLMClientError, GracefulHTTPError) as error:
            _log(engine, "Request %s failed: %r.", request_id, error)
            raise
        except Exception as error:
            if queue is not None:
                await engine.abort(queue.request_id, internal=True)
            _log(engine, "Request %s failed: %r.", request_id, error)
            raise EngineGenerateError from error
        finally:
            if queue is not None:
                queue.close()
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
        try:
            if self._report is not None:
                self._report.flush()
        finally:
            if self._record is not None:
                self._record.end()


def _log(engine: AsyncLLM, message: str, *values: object) -> None:
    # As vLLM's own: where requests are logged (`--enable-log-requests`).
    if engine.log_requests:
        logger.info(message, *values)
