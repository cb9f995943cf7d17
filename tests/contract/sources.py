"""vLLM's source as a test reads it: blanks do not count."""

import inspect
from typing import Any


def source(thing: Any) -> str:
    """The source of a module, class or function, without blanks."""
    return "".join(inspect.getsource(thing).split())


def assert_in_order(thing: Any, *fragments: str) -> None:
    """The fragments occur in the source of `thing`, each after the one before it."""
    text, start = source(thing), 0
    for fragment in fragments:
        start = text.find("".join(fragment.split()), start)
        assert start >= 0, f"{thing.__qualname__}: {fragment!r} is gone or has moved"


def assert_parameters(function: Any, *names: str) -> None:
    """The first parameters of `function` have these names; more may follow."""
    found = tuple(inspect.signature(function).parameters)
    assert found[: len(names)] == names, f"{function.__qualname__} takes {found}"
