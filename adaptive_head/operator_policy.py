"""What an operator decides about adaptive requests, whatever the clients send.

A policy for requests that choose none, a highest temperature for all of them, and a constant that
replaces them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from adaptive_head.abstention import Abstention
from adaptive_head.options import (
    AdaptiveRequest,
    Level,
    MarkerTokenizer,
    OptionError,
    Options,
    PolicyName,
    Selection,
    parse_request,
    quote,
    resolve_options,
)
from adaptive_head.parameters import ConstantParameters

POLICY_FLAG = "--adaptive-policy"
EXAMPLE = '{"policy": "constant", "constant": {"temperature": 0.6}}'


class _AnyHead(NamedTuple):
    """Stands for the default head, which may change while the server runs."""

    level: Level = "token"
    select: Selection = "argmax"
    abstain: Abstention | None = None


def read_policy(value: Any) -> AdaptiveRequest:
    """Validate the policy of requests that choose none, as far as that needs no tokenizer.

    Args:
        value: a policy's name, or an object like the `adaptive` of a request.

    Raises:
        OptionError: names the wrong field, "" for the whole, and says what would be valid.
    """
    if isinstance(value, AdaptiveRequest):
        return value
    if isinstance(value, str):
        value = {"policy": value}
        if value["policy"] not in get_args(PolicyName):
            raise _refuse_form(value["policy"])
    elif not isinstance(value, Mapping):
        raise _refuse_form(value)
    policy = parse_request(value)
    if policy.head is not None:
        raise OptionError("head", "leave it out; --default-head names the head")
    if policy.policy == "head" and policy.level is not None:
        raise OptionError("level", "leave it out; a head has one level only")
    if policy.policy == "head" and policy.abstain:
        raise OptionError("abstain", "may only be false; a head with a fallback abstains by itself")
    resolve_options(policy, {"": _AnyHead()}, "", lambda _: [0])
    return policy


def _refuse_form(value: Any) -> OptionError:
    names = ", ".join(get_args(PolicyName))
    message = f"must be one of {names}, or a JSON object such as {EXAMPLE}, got {quote(value)}"
    return OptionError("", message)


def check_marker(policy: AdaptiveRequest, tokenize_marker: MarkerTokenizer | None) -> None:
    """Check a policy that `read_policy` has read against the model's tokenizer.

    Raises:
        ValueError: two_phase cannot find its marker. Names the flag and the field.
    """
    if policy.policy != "two_phase":
        return
    try:
        resolve_options(policy, {}, None, tokenize_marker)
    except OptionError as error:
        raise ValueError(f"{POLICY_FLAG}: {describe_error(error)}") from None


def describe_error(error: OptionError) -> str:
    """What is wrong with an operator's policy, beginning with the field."""
    return f"{error.field}: {error}" if error.field else str(error)


def fill_in(request: AdaptiveRequest, policy: AdaptiveRequest) -> AdaptiveRequest:
    """Complete a request that chooses neither a policy nor a head with the operator's policy.

    What the request sets stays, down to single parameters of the policy; null sets nothing. A
    bound of the operator's policy gives way to one of the request that contradicts it.
    """
    if not policy.model_fields_set:
        return request
    given = {name for name in request.model_fields_set if getattr(request, name) is not None}
    if given & {"policy", "head"}:
        return request
    values = {name: _merge(getattr(request, name), getattr(policy, name)) for name in given}
    filled = policy.model_copy(update=values)
    if filled.min is not None and filled.max is not None and filled.min > filled.max:
        return filled.model_copy(update=dict.fromkeys({"min", "max"} - given))
    return filled


def _merge(value: Any, default: Any) -> Any:
    if not isinstance(value, BaseModel) or not isinstance(default, BaseModel):
        return value
    return default.model_copy(
        update={name: getattr(value, name) for name in value.model_fields_set}
    )


def bound_options(options: Options, highest: float | None) -> Options:
    """Let a request choose no temperature above the operator's highest; None is no bound.

    Raises:
        OptionError: the request's own lowest temperature is above it.
    """
    if highest is None or options.max <= highest:
        return options
    if options.min > highest:
        found = f"got {options.min:g}"
        raise OptionError("min", f"at most {highest:g} (--adaptive-max of the server), {found}")
    return replace(options, max=highest)


def make_constant(temperature: float) -> Options:
    """The options of a request that asks for one temperature and nothing else."""
    constant = ConstantParameters(temperature=temperature)
    return resolve_options(AdaptiveRequest(policy="constant", constant=constant), {}, None)
