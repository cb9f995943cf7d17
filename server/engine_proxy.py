"""Reads the chosen temperatures off the engine's outputs, in the queues that hand them over.

vLLM's output handler puts a request's outputs into a queue, from which its handlers take them.
"""

from collections.abc import AsyncGenerator
from typing import Any, cast

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from server.record import RequestRecord, current_record
from server.report import PromptReport, find_prompt_report


class EngineProxy:
    """Takes the place of the engine client in vLLM's handlers.

    Adaptive requests are reported and recorded ones counted; any other gets the engine's own
    generator.
    """

    def __init__(self, engine_client: AsyncLLM) -> None:
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
        if report is None and record is None:
            return self._engine_client.generate(prompt, sampling_params, request_id, **kwargs)
        reader: Any = PromptReader(self._engine_client, report, record)
        # vLLM's method, which adds the request by the reader's.
        generate = type(self._engine_client).generate
        return generate(reader, prompt, sampling_params, request_id, **kwargs)


class PromptReader:
    """Stands for the engine client while it generates for one prompt, and reads what comes."""

    def __init__(
        self,
        engine_client: AsyncLLM,
        report: PromptReport | None,
        record: RequestRecord | None,
    ) -> None:
        self._engine_client = engine_client
        self._report = report
        self._record = record
        self._is_first = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine_client, name)

    async def add_request(self, *args: Any, **kwargs: Any) -> RequestOutputCollector:
        """`AsyncLLM.add_request`, whose queue has its outputs read."""
        queue = await self._engine_client.add_request(*args, **kwargs)
        if self._report is not None:
            self._report.begin()
        if self._record is not None:
            self._record.begin(self._report)
        # Each chunk of such a stream lists the temperatures of its own tokens.
        is_aligned = self._report is not None and self._report.detail == "tokens"
        queue.__class__ = ReadAsTaken if is_aligned else ReadAsPut
        read_queue = cast(ReadQueue, queue)
        read_queue.reader = self
        if not is_aligned and isinstance(queue.output, RequestOutput):
            # Some outputs may have come before the queue was ours.
            self.read(queue.output)
        return queue

    def read(self, output: Any) -> Any:
        """Read an output, and return it."""
        if self._record is not None:
            self._record.read(output, self._is_first)
            self._is_first = False
        if self._report is not None:
            self._report.read(output)
        return output

    def end(self) -> None:
        """The engine delivers nothing more, or nobody takes it."""
        if self._record is not None:
            self._record.end()
        if self._report is not None:
            self._report.flush()


class ReadQueue(RequestOutputCollector):
    """A queue that `AsyncLLM.generate` closes at its end."""

    reader: PromptReader

    def close(self) -> None:
        super().close()
        self.reader.end()


class ReadAsPut(ReadQueue):
    """Reads outputs as they arrive, which costs least."""

    def put(self, output: Any) -> None:
        if isinstance(output, RequestOutput):
            try:
                self.reader.read(output)
            except Exception as error:
                # Raised here it would end all requests.
                output = error
        super().put(output)


class ReadAsTaken(ReadQueue):
    """Reads outputs as a handler takes them, so that no more is read than its answer has."""

    async def get(self) -> Any:
        return self.reader.read(await super().get())

    def get_nowait(self) -> Any:
        output = super().get_nowait()
        return output and self.reader.read(output)
