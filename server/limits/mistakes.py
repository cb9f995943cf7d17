"""Tells a client's mistake from the server's.

vLLM checks most of what it reads, and answers 500 where it did not think of something: a list where
an object is due, a kind of message part that its converter does not know, a number that the message
to the engine has no room for. What fails while a request is read depends on the request alone, so
it is the client's mistake, a 400. What fails once the engine has been asked is the server's.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.serve.exception_handling import error_response
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from server.limits.replacing import replace_function

logger = init_logger("vllm.adaptive")

# What Python raises over a value that is not as expected. Other errors, such as those of the
# operating system, are about the server.
UNREADABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError)
# These too; vLLM's routes make them a 400 by themselves, but not on the way to the engine.
UNSENDABLE = (*UNREADABLE, TypeError, ValueError)
OUR_PACKAGES = ("adaptive_head.", "server.")
_stock_create = error_response.create_error_response


class Progress:
    """How far the request of a task has come."""

    def __init__(self) -> None:
        self.has_engine = False


_CURRENT: ContextVar[Progress | None] = ContextVar("request_progress", default=None)


def begin_request(*, has_body: bool) -> None:
    """Note that this task, and those that it starts, work for a request from now on.

    Args:
        has_body: whether it has a body that can be a mistake.
    """
    _CURRENT.set(Progress() if has_body else None)


def blame(error: Exception) -> VLLMValidationError | None:
    """The refusal of a request that could not be read; None where the server is to blame."""
    progress = _CURRENT.get()
    if progress is None or progress.has_engine or not isinstance(error, UNREADABLE):
        return None
    return refuse(error)


def refuse(error: Exception) -> VLLMValidationError | None:
    """The refusal for an error; None for one that our own modules raise, which check first."""
    name, line = find_place(error)
    if name.startswith(OUR_PACKAGES):
        return None
    logger.warning("a request could not be read: %s in %s:%d", type(error).__name__, name, line)
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    return VLLMValidationError(f"the request could not be read ({reason})")


def find_place(error: Exception) -> tuple[str, int]:
    """The module and the line in which an error was raised."""
    traceback = error.__traceback__
    if traceback is None:
        return "", 0
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get("__name__", ""), traceback.tb_lineno


def create_blaming_response(message: str | Exception, *args: Any, **kwargs: Any) -> Any:
    """vLLM's `create_error_response`, a 400 where the client is to blame."""
    if isinstance(message, Exception) and (refusal := blame(message)) is not None:
        message = refusal
    return _stock_create(message, *args, **kwargs)


def blame_clients() -> None:
    """Let vLLM's routes that catch errors by themselves answer 400 where a client is to blame."""
    replace_function(_stock_create, create_blaming_response)


def watch_engine(engine_client: Any) -> None:
    """Note which requests the engine has been asked for; refuse those that cannot be sent to it."""
    add_request: Callable[..., Awaitable[Any]] = engine_client.add_request

    async def add_watched(*args: Any, **kwargs: Any) -> Any:
        try:
            added = await add_request(*args, **kwargs)
        except UNSENDABLE as error:
            if _CURRENT.get() is None or (refusal := refuse(error)) is None:
                raise
            raise refusal from error
        if (progress := _CURRENT.get()) is not None:
            progress.has_engine = True
        return added

    engine_client.add_request = add_watched
