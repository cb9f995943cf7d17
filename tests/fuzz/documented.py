"""Requests that `/openapi.json` allows, and ones that it does not."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.fuzz.sending import Case

# Not to be asked in passing: they change the server for everybody.
LEFT_OUT = {"/scale_elastic_ep", "/is_scaling_elastic_ep"}
# Routes whose bodies are those of others, or answers, which take long to make up.
REPEATED = ("/batch", "/count_tokens", "/derender", "/render")
# schemathesis would send it in chunks, which is another test's.
_DROPPED_HEADERS = {"transfer-encoding", "content-length"}


def list_fields(document: dict[str, Any], path: str) -> list[str]:
    """The names of the fields that a route documents."""
    try:
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
    except KeyError:
        return []
    names: set[str] = set()
    for reference in schema.get("anyOf", [schema]):
        name = reference["$ref"].rpartition("/")[2]
        names |= document["components"]["schemas"][name]["properties"].keys()
    return sorted(names)


def ask_documented(
    document: dict[str, Any],
    num_examples: int,
    number: int,
    ask: Callable[[Case], None],
    *,
    has_all: bool,
) -> None:
    """Send requests to every route of a document, half of them wrong.

    Args:
        num_examples: how many of each kind per route.
        number: the seed; equal numbers ask the same.
        has_all: whether to ask the routes that repeat others, too.
    """
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if operation.path in LEFT_OUT or (operation.path.endswith(REPEATED) and not has_all):
            continue
        modes = [GenerationMode.POSITIVE]
        # A route without a body can hardly be asked in a wrong way, which takes long to find out.
        if list(operation.body) or has_all:
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            # Only generated: a failure is shown as it is, and all of them are.
            @settings(
                max_examples=num_examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @seed(number)
            @given(operation.as_strategy(generation_mode=mode))
            def ask_one(case: Any) -> None:
                ask(convert(case))

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ask_one()
            except Unsatisfiable:
                # A route without any parameter cannot be asked in a wrong way at all.
                assert mode == GenerationMode.NEGATIVE


def convert(case: Any) -> Case:
    """A request of schemathesis' as ours."""
    parts = case.as_transport_kwargs(base_url="http://server")
    content = parts.get("data") or b""
    if "json" in parts:
        content = json.dumps(parts["json"])
    headers = {
        name: str(value)
        for name, value in (parts.get("headers") or {}).items()
        if name.lower() not in _DROPPED_HEADERS
    }
    return Case(
        parts["method"],
        parts["url"].removeprefix("http://server"),
        content.encode() if isinstance(content, str) else content,
        headers,
        tuple((parts.get("params") or {}).items()),
    )
