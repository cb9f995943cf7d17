"""What SIGTERM and Ctrl-C do where vLLM loses them; `server.shutdown` is what they do otherwise.

- During the start vLLM turns a SIGTERM into a KeyboardInterrupt, as Python does with Ctrl-C. A
  context manager around its longest wait, the one for the engine, swallows that.
- The process above several API processes ignores all signals but the first.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# How long a process may take that was told twice to end.
HURRIED_S = 5.0
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def catch_signals() -> Iterator[None]:
    """Set handlers of our own whenever vLLM, called in this block, has set its own for the start.

    vLLM calls `setup_server` next, and starts engines and API processes after that.
    """
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.launchers.api_server import entry

    # The same function twice: for one API process, and for the process above several.
    single, several = entry.setup_server, serve.setup_server
    entry.setup_server = call_before(set_handlers_of_start, single)
    serve.setup_server = call_before(set_handlers_above, several)
    try:
        yield
    finally:
        entry.setup_server, serve.setup_server = single, several


def call_before(prepare: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls another one first."""

    def call(*args: Any, **kwargs: Any) -> Any:
        prepare()
        return function(*args, **kwargs)

    return call


def set_handlers_of_start() -> None:
    """Until vLLM serves and sets others: end at the first signal, whatever is being waited for."""
    for number in _NUMBERS:
        signal.signal(number, end_start)


def end_start(number: int, _: object) -> NoReturn:
    """A signal handler: end this process with its children, which end theirs.

    Raises nothing, as vLLM may be anywhere, and an engine that loads would not listen.
    """
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


def set_handlers_above() -> None:
    """Leave the first signal to the handler that is set, and pass on others to all children."""
    has_come = False
    first: dict[int, Any] = {number: signal.getsignal(number) for number in _NUMBERS}

    def handle(number: int, frame: Any) -> None:
        nonlocal has_come
        if has_come:
            hurry_children(number)
        else:
            has_come = True
            first[number](number, frame)

    for number in _NUMBERS:
        signal.signal(number, handle)


def hurry_children(number: int) -> None:
    """Pass on a second signal, and do not wait long for what it does."""
    end_within(HURRIED_S, number)
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, number)


def end_within(seconds: float, number: int) -> None:
    """End this process after some seconds, if it still exists then. Its children follow."""
    timer = threading.Timer(seconds, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
