"""Responses from vLLM's own data parallelism: an engine process a replica, on one machine."""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from adaptive_head.checkpoint import read_metadata
from adaptive_head.lpo.engine import (
    Generation,
    GenerationRequest,
    engine_arguments,
    make_sampling_params,
    read_generation,
)
from adaptive_head.lpo.experiment import EngineConfig

# Requests that a replica has before it, for each that it runs at once: a slot that becomes free
# has a request waiting for it, even while the caller is busy with the last answer.
REQUESTS_AHEAD = 2
# How long engine processes may take to end before vLLM kills them, in seconds.
CLOSE_TIMEOUT = 30.0


class DataParallelEngine:
    """`num_replicas` engine processes of vLLM under one client in this process."""

    def __init__(self, model: Path | str, config: EngineConfig, heads: Mapping[str, Path]) -> None:
        """Start the engines, and wait until all are ready.

        Raises:
            ValueError: vLLM refuses an option.
        """
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._heads = {name: read_metadata(folder) for name, folder in heads.items()}
        self._num_replicas = config.num_replicas
        self._max_requests = REQUESTS_AHEAD * config.max_num_seqs
        arguments = engine_arguments(model, config, heads)
        arguments["data_parallel_size"] = config.num_replicas
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._loop = BackgroundLoop()

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Generation]:
        """See `Engine`.

        Raises:
            ValueError: vLLM refuses a request.
            RuntimeError: an engine process died.
        """
        waiting = iter(requests)
        loads = [0] * self._num_replicas
        running: dict[Future[Generation], int] = {}
        finished: SimpleQueue[Future[Generation]] = SimpleQueue()
        try:
            while True:
                while min(loads) < self._max_requests:
                    if (request := next(waiting, None)) is None:
                        break
                    replica = loads.index(min(loads))
                    answer = self._loop.submit(self._answer(request, replica))
                    running[answer] = replica
                    loads[replica] += 1
                    answer.add_done_callback(finished.put)
                if not running:
                    return
                answer = finished.get()
                loads[running.pop(answer)] -= 1
                yield answer.result()
        finally:
            for answer in running:
                answer.cancel()

    async def _answer(self, request: GenerationRequest, replica: int) -> Generation:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        params = make_sampling_params(request, self._heads)
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        try:
            # We place requests ourselves: vLLM balances by counts that it renews now and then.
            async for output in self._engine.generate(
                prompt, params, request.id, data_parallel_rank=replica
            ):
                last = output
        except VLLMClientError as error:
            raise ValueError(f"request {request.id}: {error}") from error
        except EngineDeadError:
            raise RuntimeError(
                f"one of the {self._num_replicas} data-parallel engine processes died; "
                "what it wrote to stderr tells why"
            ) from None
        return read_generation(last, request)

    def close(self) -> None:
        """See `Engine`."""
        # While the loop runs: vLLM closes its sockets in it.
        self._engine.shutdown(timeout=CLOSE_TIMEOUT)
        self._loop.stop()


class BackgroundLoop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        # With a factory, a runner leaves the event loop of this thread alone.
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = runner.get_loop()
        self._stopping = asyncio.Event()
        self._thread = Thread(target=self._run, args=(runner,), daemon=True)
        self._thread.start()

    def _run(self, runner: asyncio.Runner) -> None:
        with runner:
            runner.run(self._wait())

    async def _wait(self) -> None:
        await self._stopping.wait()

    def submit(self, coroutine: Coroutine[Any, Any, Generation]) -> Future[Generation]:
        """Begin a coroutine, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel what runs, and end the thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
