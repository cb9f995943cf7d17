"""Checks grammars away from the event loop, for a limited time.

vLLM compiles a regular expression, a schema or a grammar to see whether it is valid, on the event
loop, for up to five seconds (a regular expression) or without a limit (a schema). Its own check is
called here in a thread; the compilers release the interpreter's lock. Nothing ends a thread: one
whose grammar took too long gets the processor's idle time only, and there is a limit to how many.
"""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from adaptive_head.vllm.limits import Limits, option_name

# How many are checked at once, and how many that took too long may still be at it.
NUM_SLOTS = 4
MAX_LATE = 32
_LOWEST_PRIORITY = 19
_OPTION = option_name("max_grammar_seconds")


class GrammarGate:
    """Stands before an engine client's `add_request`, through which all routes go.

    Args:
        check: vLLM's check of the grammar in sampling parameters; may block.
    """

    def __init__(
        self,
        add_request: Callable[..., Awaitable[Any]],
        check: Callable[[SamplingParams], None],
        limits: Limits,
    ) -> None:
        self._add_request = add_request
        self._check = check
        self._max_seconds = limits.max_grammar_seconds
        self._slots = asyncio.Semaphore(NUM_SLOTS)
        self._num_late = 0

    def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Awaitable[Any]:
        """`AsyncLLM.add_request`, after the check of a grammar.

        Raises (when awaited):
            VLLMValidationError: the grammar is wrong, or takes too long to check.
            GracefulHTTPError: too many others are being checked.
        """
        if getattr(params, "structured_outputs", None) is None:
            return self._add_request(request_id, prompt, params, *args, **kwargs)
        return self._add_checked(request_id, prompt, params, *args, **kwargs)

    async def _add_checked(
        self, request_id: str, prompt: Any, params: SamplingParams, *args: Any, **kwargs: Any
    ) -> Any:
        # The prompts of a request share their parameters, and vLLM's check changes them.
        params = params.clone()
        await self._check_in_time(params)
        return await self._add_request(request_id, prompt, params, *args, **kwargs)

    async def _check_in_time(self, params: SamplingParams) -> None:
        try:
            async with asyncio.timeout(self._max_seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise refuse_busy(NUM_SLOTS) from None
        try:
            if self._num_late >= MAX_LATE:
                raise refuse_busy(MAX_LATE)
            thread, checked = run_in_thread(self._check, params)
            done, _ = await asyncio.wait([checked], timeout=self._max_seconds)
            if not done:
                self._leave(thread, checked)
                raise VLLMValidationError(
                    f"structured_outputs: checking it takes longer than {self._max_seconds:g} "
                    f"seconds ({_OPTION} of the server)",
                    parameter="structured_outputs",
                )
        finally:
            self._slots.release()
        checked.result()

    def _leave(self, thread: threading.Thread, checked: asyncio.Future[None]) -> None:
        """Let a check that took too long go on, out of the way of everything else."""

        def note_end(_: asyncio.Future[None]) -> None:
            self._num_late -= 1
            # Nobody waits for its error, which would be logged as one that was never seen.
            checked.exception()

        self._num_late += 1
        checked.add_done_callback(note_end)
        with suppress(OSError):
            # Linux has priorities for threads.
            os.setpriority(os.PRIO_PROCESS, thread.native_id or 0, _LOWEST_PRIORITY)


def refuse_busy(num_checks: int) -> GracefulHTTPError:
    """The refusal of a grammar while others keep the server busy."""
    return GracefulHTTPError(
        f"{num_checks} other structured outputs are being checked; try again later",
        HTTPStatus.SERVICE_UNAVAILABLE,
    )


def run_in_thread(
    function: Callable[[SamplingParams], None], params: SamplingParams
) -> tuple[threading.Thread, asyncio.Future[None]]:
    """Call a function in a thread of its own, which does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if error is None:
            result.set_result(None)
        else:
            result.set_exception(error)

    def run() -> None:
        error: Exception | None = None
        try:
            function(params)
        except Exception as found:
            error = found
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    thread = threading.Thread(target=run, name="grammar", daemon=True)
    thread.start()
    return thread, result


async def check_grammars_in_threads(engine_client: Any, limits: Limits) -> None:
    """Let an engine client check grammars here rather than where it prepares a request."""
    processor = engine_client.input_processor
    # Without its configuration, the processor leaves grammars unchecked.
    config, processor.structured_outputs_config = processor.structured_outputs_config, None

    def check(params: SamplingParams) -> None:
        params._validate_structured_outputs(processor.model_config, config, processor.tokenizer)

    engine_client.add_request = GrammarGate(engine_client.add_request, check, limits).add_request
    # The first check loads the compilers, for which a request's time may be too short. What is
    # wrong with them, a request will be told.
    first = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with suppress(Exception):
        await asyncio.to_thread(check, first)
