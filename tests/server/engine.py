"""vLLM's client of an engine, without the engine."""

import asyncio
from contextlib import aclosing

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector


class ScriptedEngine:
    """An engine client that delivers what `deliver` yields, each output once the last is taken.

    Its `generate` is vLLM's own.
    """

    errored = False
    log_requests = False
    generate = AsyncLLM.generate

    def __init__(self) -> None:
        self.num_aborted = 0
        self._feeding: dict[str, asyncio.Task] = {}

    async def deliver(self, prompt, params):
        """An asynchronous generator of a prompt's outputs; what it raises, the engine does."""
        raise NotImplementedError
        yield

    async def add_request(self, request_id, prompt, params, **_):
        queue = RequestOutputCollector(params.output_kind, f"{request_id}-{len(self._feeding)}")
        feeding = asyncio.create_task(feed(queue, self.deliver(prompt, params)))
        self._feeding[queue.request_id] = feeding
        return queue

    async def abort(self, request_id, internal):
        self.num_aborted += 1
        self._feeding[request_id].cancel()


async def feed(queue, outputs) -> None:
    async with aclosing(outputs):
        try:
            async for output in outputs:
                await wait_until_taken(queue)
                queue.put(output)
        except Exception as error:
            await wait_until_taken(queue)
            queue.put(error)


async def wait_until_taken(queue) -> None:
    while queue.output is not None:
        await asyncio.sleep(0)
