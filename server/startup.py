"""The start ends at the first signal, whatever vLLM is waiting for, and leaves no process.

vLLM turns a SIGTERM that arrives while the server starts into a KeyboardInterrupt, as Python does
with Ctrl-C. Then a context manager around its longest wait, the one for the engine, swallows it.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NoReturn

import psutil

# What a shell reports of a program that Ctrl-C has ended.
INTERRUPTED_EXIT_CODE = 130


def interrupt(*_: object) -> NoReturn:
    """A signal handler: raise KeyboardInterrupt where the main thread is.

    Replaces Python's own for SIGINT, which `asyncio.run` would exchange for a cancellation of the
    main task. That waits for the engine, too.
    """
    raise KeyboardInterrupt


@contextmanager
def interruptible_start() -> Iterator[None]:
    """Let signals end the start of the server in this block.

    Raises:
        SystemExit: a signal has ended it.
    """
    from vllm.v1.engine import utils

    swallowing = utils.zmq_socket_ctx
    utils.zmq_socket_ctx = pass_interrupts(swallowing)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    finally:
        utils.zmq_socket_ctx = swallowing
        # vLLM ends its processes, unless another signal has interrupted that.
        end_children()


def pass_interrupts(
    make_context: Callable[..., AbstractContextManager[Any]],
) -> Callable[..., AbstractContextManager[Any]]:
    """A context manager that raises the KeyboardInterrupt which another one would swallow."""

    @contextmanager
    def passing(*args: Any, **kwargs: Any) -> Iterator[Any]:
        interrupted = False
        with make_context(*args, **kwargs) as value:
            try:
                yield value
            except KeyboardInterrupt:
                interrupted = True
                # vLLM would ask first and wait five seconds, but an engine core hears nothing yet.
                end_children()
                raise
        if interrupted:
            raise KeyboardInterrupt

    return passing


def end_children() -> None:
    """Kill the processes that this one has started by `multiprocessing`, and all below them.

    Python would wait for them at its end. Leaves the resource tracker, which cleans up after them.
    """
    for child in multiprocessing.active_children():
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(child.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        child.kill()
