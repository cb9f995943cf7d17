"""vLLM's source as a test reads it, and requests as the worker sees them."""

import ast
import inspect
import textwrap
from typing import Any

import torch
from vllm.sampling_params import SamplingParams

from adaptive_head.options import AdaptiveRequest, Options, resolve_options

CPU = torch.device("cpu")


def source(thing: Any) -> str:
    """The source of a module, class or function, without blanks."""
    return "".join(inspect.getsource(thing).split())


def parse(function: Any) -> ast.AST:
    """The syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


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


def options_of(**fields: Any) -> Options:
    """The options of a request to a server without heads."""
    return resolve_options(AdaptiveRequest(**fields), {}, None)


def constant(temperature: float) -> Options:
    """The policy that always chooses this temperature."""
    return options_of(policy="constant", constant={"temperature": temperature})


def params_of(options: Options | None, **fields: Any) -> SamplingParams:
    """A request's parameters as they reach the worker; without options an ordinary one's."""
    extra_args = None if options is None else options.to_extra_args()
    return SamplingParams(**{"temperature": 1.0, "extra_args": extra_args} | fields)
