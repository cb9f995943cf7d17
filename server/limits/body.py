"""Reads the JSON in a request's body."""

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import msgspec

from server.limits.refusal import Refusal, bound_param

# Each costs far more than its two characters once it is parsed. A text may contain brackets, too;
# one with as many of them as this fits no model.
MAX_BRACKETS = 1 << 18
_MAX_REASON_LEN = 200
_decode = msgspec.json.decode


def read_fields(body: bytes, *, is_json: bool = True) -> dict[str, Any] | None:
    """Read the fields of a JSON object; None for any other value, which the route judges.

    Args:
        is_json: whether the client says that the body is JSON. Another kind of body need not be.

    Raises:
        Refusal: the body is not JSON, has too many lists and objects, or one of its texts has a
            lone surrogate.
    """
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        message = f"body: at most {MAX_BRACKETS} opening brackets, of lists and objects"
        raise Refusal(HTTPStatus.BAD_REQUEST, message, "body")
    try:
        value = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The routes' own parser takes more: NaN, lone surrogates, UTF-16.
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            if is_json:
                raise refuse_unreadable(error) from None
            return None
        check_texts(value)
    return value if type(value) is dict else None


def refuse_unreadable(error: Exception) -> Refusal:
    """The refusal of a body that cannot be parsed."""
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    message = f"body: not valid JSON: {reason[:_MAX_REASON_LEN]}"
    return Refusal(HTTPStatus.BAD_REQUEST, message, "body")


def check_texts(value: object) -> None:
    """Check that every text of a parsed body can be encoded.

    Half of a UTF-16 surrogate pair is valid in JSON and in a Python string, but not in UTF-8: it
    breaks the tokenizer, the message to the engine, and an answer that quotes it.

    Raises:
        Refusal: a text has a lone surrogate.
    """
    # Iterators rather than calls: what the parser could read is nested as deeply as Python allows.
    path: list[str] = []
    open_items = [iterate([value])]
    while open_items:
        for key, item in open_items[-1]:
            check_text(key, path)
            if isinstance(item, str):
                check_text(item, [*path, key])
            elif isinstance(item, dict | list):
                path.append(key)
                open_items.append(iterate(item))
                break
        else:
            open_items.pop()
            del path[-1:]


def iterate(container: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    """The items of an object or a list, with their names or indices."""
    if isinstance(container, dict):
        yield from container.items()
    else:
        for index, item in enumerate(container):
            yield str(index), item


def check_text(text: str, path: list[str]) -> None:
    """Check a text; where it is a field's name, `path` is that of the object that has the field.

    Raises:
        Refusal: it has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # The first step is into the body itself.
        param = bound_param(".".join(path[1:]) or "body")
        code, position = ord(text[error.start]), error.start
        message = f"{param}: not valid Unicode: lone surrogate U+{code:04X} at character {position}"
        raise Refusal(HTTPStatus.BAD_REQUEST, message, param) from None
