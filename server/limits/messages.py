"""How long an error message may be.

vLLM removes file paths from its error messages by expressions that backtrack: the time grows with
the square of the length of a word such as `/a/a/a`, and faster still. Messages quote what clients
send, and the event loop waits meanwhile.
"""

import re

from vllm.entrypoints.serve.exception_handling import utils

from server.limits.replacing import replace_function

MAX_MESSAGE_LEN = 2000
# 2000 characters in words of this length take vLLM 8 ms.
MAX_WORD_LEN = 100
_LONG_WORD = re.compile(rf"(\S{{{MAX_WORD_LEN}}})\S+")
_stock_sanitize = utils.sanitize_message


def shorten(message: str) -> str:
    """Cut a message, and the words in it, to lengths that can be read and sanitised."""
    if len(message) > MAX_MESSAGE_LEN:
        message = message[:MAX_MESSAGE_LEN] + "…"
    return _LONG_WORD.sub(r"\1…", message)


def sanitize_bounded(message: str) -> str:
    """vLLM's `sanitize_message`, of a message that has been shortened."""
    return _stock_sanitize(shorten(message))


def bound_messages() -> None:
    """Let all of vLLM's routes sanitise shortened messages only.

    Its exception handlers call the function, and so do its routes.
    """
    replace_function(_stock_sanitize, sanitize_bounded)
