"""What a request's body may contain: how many answers, and how long names and lists are.

Decided on the parsed JSON before vLLM's classes see it, alike for all routes. Types are left to
them, except where a wrong one breaks them. A text is bounded by the body's size and the model's
context.
"""

import json
from collections.abc import Collection
from http import HTTPStatus
from typing import Any

import msgspec

from adaptive_head.vllm.limits import Limits
from server.limits.body import read_fields
from server.limits.refusal import Refusal, exceeds

# Fields that take one name, and those that take one or many.
NAMES = frozenset(
    {
        "cache_salt",
        "id",
        "lora_name",
        "lora_path",
        "model",
        "name",
        "previous_response_id",
        "prompt_cache_key",
        "reasoning_effort",
        "request_id",
        "role",
        "safety_identifier",
        "service_tier",
        "tool_call_id",
        "tool_choice",
        "truncation",
        "type",
        "user",
    }
)
NAME_LISTS = frozenset({"bad_words", "include", "stop", "stop_sequences"})
# Fields whose items are each answered.
PROMPTS = frozenset({"prompt", "prompts", "items", "prompt_embeds", "questions"})
MESSAGES = frozenset({"messages", "input"})
TOKEN_IDS = frozenset({"prompt_token_ids", "query", "token_ids", "tokens"})
GRAMMARS = frozenset(
    {"output_config", "response_format", "structural_tag", "structured_outputs", "text"}
)
# Objects that hold fields of the same kind as the body itself.
NESTED = frozenset(
    {"function", "json_schema", "response_format", "sampling_params", "text", "tool_choice"}
)
# vLLM's validators read its fields before they know its type.
OBJECT = "structured_outputs"
_MAX_DEPTH = 4


def check_body(body: bytes, limits: Limits, *, is_json: bool = True) -> None:
    """Check the JSON in a body.

    Args:
        is_json: as in `read_fields`.

    Raises:
        Refusal: the body cannot be read, or a field exceeds a limit.
    """
    fields = read_fields(body, is_json=is_json)
    if fields is not None:
        check_fields(fields, limits)


def check_fields(fields: dict[str, Any], limits: Limits, path: str = "", depth: int = 0) -> None:
    """Check an object's fields.

    Args:
        path: of the object in the body, with a dot at its end.

    Raises:
        Refusal: a field exceeds a limit.
    """
    check_size(fields, limits, path)
    max_length = limits.max_name_length
    num_prompts = 1
    for key, value in fields.items():
        if len(key) > max_length:
            check_name(key, limits, path + key)
        kind = type(value)
        if kind is str:
            # Length first: most values are short, which spares them the look-up.
            if len(value) > max_length and (key in NAMES or key in NAME_LISTS):
                check_name(value, limits, path + key)
        elif kind is list:
            num_prompts *= check_list(key, value, limits, path + key)
        elif kind is dict:
            if key in GRAMMARS:
                check_grammar(value, limits, path + key)
            if key in PROMPTS:
                num_prompts *= len(value)
            if key in NESTED and depth < _MAX_DEPTH:
                check_fields(value, limits, f"{path}{key}.", depth + 1)
            else:
                check_keys(value, limits, f"{path}{key}.")
    if not isinstance(fields.get(OBJECT), dict | None):
        raise refuse_type(path + OBJECT)
    is_request = depth == 0 or path == "sampling_params."
    if not is_request or (num_prompts == 1 and "n" not in fields):
        return
    num_choices = num_prompts * read_count(fields.get("n"))
    if num_choices > limits.max_choices:
        param = f"{path}n" if num_prompts == 1 else f"{path}prompt"
        raise exceeds(limits, "max_choices", param, "prompts × n", num_choices)


def refuse_type(path: str) -> Refusal:
    """The refusal of a field that must be an object."""
    return Refusal(HTTPStatus.BAD_REQUEST, f"{path}: must be an object or null", path)


def check_list(key: str, items: list[Any], limits: Limits, path: str) -> int:
    """Check a list; how many prompts it stands for."""
    length = len(items)
    if key in MESSAGES:
        return check_messages(items, limits, path)
    first = items[0] if length else None
    if key in TOKEN_IDS or (key in PROMPTS and type(first) is int):
        if length > limits.max_token_ids:
            raise exceeds(limits, "max_token_ids", path, "token ids", length)
        return 1
    if key in PROMPTS:
        return max(length, 1)
    if length > limits.max_list_items:
        raise exceeds(limits, "max_list_items", path, "items", length)
    if key in NAME_LISTS:
        for index, item in enumerate(items):
            if type(item) is str and len(item) > limits.max_name_length:
                check_name(item, limits, f"{path}.{index}")
    elif type(first) is dict:
        for index, item in enumerate(items):
            if type(item) is dict:
                # Tools and the like: their schemas are texts as far as this goes.
                check_fields(item, limits, f"{path}.{index}.", _MAX_DEPTH - 1)
    return 1


def check_messages(messages: list[Any], limits: Limits, path: str) -> int:
    """Check a conversation, or several; how many there are."""
    if len(messages) > limits.max_messages:
        raise exceeds(limits, "max_messages", path, "messages", len(messages))
    max_length, max_items = limits.max_name_length, limits.max_list_items
    num_conversations = 0
    for index, message in enumerate(messages):
        if type(message) is list:
            num_conversations += check_messages(message, limits, f"{path}.{index}")
        if type(message) is not dict:
            continue
        check_size(message, limits, path)
        for key, value in message.items():
            if len(key) > max_length:
                check_name(key, limits, f"{path}.{index}.{key}")
            kind = type(value)
            if kind is str:
                if len(value) > max_length and key in NAMES:
                    check_name(value, limits, f"{path}.{index}.{key}")
            elif kind is list and len(value) > max_items:
                param = f"{path}.{index}.{key}"
                raise exceeds(limits, "max_list_items", param, "items", len(value))
    return num_conversations or 1


def check_name(name: str, limits: Limits, path: str) -> None:
    if len(name) > limits.max_name_length:
        raise exceeds(limits, "max_name_length", path, "characters", len(name))


def check_keys(fields: Collection[str], limits: Limits, path: str) -> None:
    """Check the names of an object's fields, and how many there are."""
    check_size(fields, limits, path)
    for key in fields:
        if len(key) > limits.max_name_length:
            check_name(key, limits, path + key)


def check_size(fields: Collection[str], limits: Limits, path: str) -> None:
    if len(fields) > limits.max_list_items:
        param = path.rstrip(".") or "body"
        raise exceeds(limits, "max_list_items", param, "fields", len(fields))


def check_grammar(grammar: Any, limits: Limits, path: str) -> None:
    """Check the size of what an answer must conform to.

    Raises:
        Refusal: it is too large.
    """
    try:
        size = len(msgspec.json.encode(grammar))
    except UnicodeEncodeError:
        size = len(json.dumps(grammar))
    if size > limits.max_grammar_bytes:
        raise exceeds(limits, "max_grammar_bytes", path, "bytes", size)


def read_count(value: Any) -> int:
    """How many answers per prompt `n` asks for; 1 where the route will not take it."""
    if value is None:
        return 1
    try:
        # As vLLM's classes do, take a number that comes as a string.
        return max(int(float(value)), 1)
    except (TypeError, ValueError, OverflowError):
        return 1
