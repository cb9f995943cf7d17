"""Bodies that are wrong in ways which a schema does not think of.

Each is a request that a route takes, with a few values in it replaced.
"""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.fuzz.sending import Case

MAX_BYTES = 64_000
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {"messages": [CHAT["messages"]], "max_tokens": 2},
    "/v1/completions": {"prompt": ["hi"], "max_tokens": 2},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "max_output_tokens": 2,
    },
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/v1/completions/render": {"prompt": "hi"},
    "/v1/chat/completions/render": CHAT,
    "/inference/v1/generate": {"token_ids": [1], "sampling_params": {"max_tokens": 2}},
    "/inference/v1/abort_requests": {"request_ids": ["a"]},
    "/generative_scoring": {"query": "hi", "items": ["a"], "label_token_ids": [1, 2]},
    "/invocations": CHAT,
}
# Fields that are in a request only if someone asks for them.
EXTRAS: dict[str, Any] = {
    "adaptive": {"policy": "schedule", "schedule": {"start": 1.0, "end": 0.5, "tokens": 2}},
    "chat_template_kwargs": {"a": 1},
    "documents": [{"title": "a", "text": "b"}],
    "echo": True,
    "extra_body": {},
    "logit_bias": {"1": 1.0},
    "logprobs": 1,
    "mm_processor_kwargs": {},
    "n": 2,
    "prompt_logprobs": 1,
    "reasoning": {"effort": "low"},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
    "stop": ["a"],
    "stream_options": {"include_usage": True},
    "structured_outputs": {"choice": ["a", "b"]},
    "temperature": "adaptive",
    "text": {"format": {"type": "json_object"}},
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "top_logprobs": 1,
    "vllm_xargs": {"a": 1},
}
PARTS: list[Any] = [
    {"type": kind, kind: value}
    for kind in ("text", "input_text", "output_text", "refusal", "thinking", "tool_result")
    for value in ("a", None, {"a": 1})
]
PARTS += [
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"},
    {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text"}]},
    {"type": "reasoning", "summary": [], "content": None},
    {"type": "item_reference", "id": "a"},
    {"type": "tool_use", "id": "a", "name": "f", "input": None},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "input_image", "image_url": "http://127.0.0.1:9/a.png"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A"}},
    {"type": "input_file", "file_id": "a"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]},
    {"role": "tool", "content": [{"type": "text", "text": "a"}]},
    {"role": "developer", "content": [PARTS[0]], "name": "a"},
]


def nest(depth: int, *, is_list: bool) -> Any:
    """A value of lists, or objects, within each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308,
    -0.0, float("nan"), float("inf"), -float("inf"),
    "", " ", "a", "0", "1", "none", "auto", "required", "json_object", "text", "[DONE]", "{}",
    "\0", "\ud800", "a\udfff", "\u202e", "🦊" * 50, "%s{}{{}}{%", "<|im_end|>", "\n\n",
    "/a" * 120, "/a" * 8000, "a" * 256, "a" * 257, "a" * 60_000, "(a*)*b", "(", "[" * 200,
    [], [[]], [None], [0], [-1], [2**63], [1.5], ["a"], ["\ud800"], [{}], [True], ["a"] * 1025,
    [1] * 5000, [[1]], [["a"]], [[[]]], [{"type": "a"}],
    {}, {"a": 1}, {"": None}, {"\ud800": 1}, {"type": None}, {"type": "object"}, {"type": "a"},
    {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"json": {"$ref": "#"}}, {"regex": "(a*)*b{1,900}"}, {"regex": "("}, {"grammar": "root ::="},
    {"choice": []}, {"choice": [""]}, {"choice": [1]}, {"structural_tag": "{}"}, {"json": "["},
    {"json": {"type": "string", "pattern": "(a{1,300}){1,30}"}}, {"-1": 1}, {"a" * 300: 1},
    nest(30, is_list=True), nest(30, is_list=False), nest(300, is_list=True),
    nest(300, is_list=False), nest(450, is_list=True), nest(450, is_list=False),
    *PARTS, PARTS,
]  # fmt: skip
RAW = [
    b"", b" ", b"{", b"[]", b"null", b"5", b'"a"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}" * 2,
    *(b'{"prompt": %b}' % (b"[" * depth + b"]" * depth) for depth in (600, 900, 950)),
    b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": ' + b"[" * 60_000, b'{"\xed\xa0\x80": 1}',
    '{"prompt": "a"}'.encode("utf-16"), '{"prompt": "a"}'.encode("utf-32-le"), b"a=1&b=2",
]  # fmt: skip
MEDIA_TYPES = ["application/json"] * 30 + ["application/json; charset=utf-16", "text/plain", ""]


def list_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from list_places(child, (*path, key))


def put(body: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        body = body[key]
    body[path[-1]] = value


def make_body(rng: Random, model: str, template: dict[str, Any], fields: list[str]) -> Any:
    """A request with a few values replaced."""
    body = json.loads(json.dumps({"model": model} | template))
    for name in rng.sample(sorted(EXTRAS), rng.choice((0, 0, 1, 3))):
        body[name] = json.loads(json.dumps(EXTRAS[name]))
    if rng.random() < 0.4:
        body["stream"] = True
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(list_places(body))
        # A route's own fields most of all, as long as it says which it has.
        path = (rng.choice(fields),) if fields and rng.random() < 0.5 else rng.choice(places)
        put(body, path, json.loads(json.dumps(rng.choice(VALUES))))
        if not isinstance(body, dict):
            break
    return body


def hostile_cases(
    rng: Random, model: str, fields: dict[str, list[str]], count: int
) -> Iterator[Case]:
    """Requests that no client means to send.

    Args:
        fields: for each route, the names of the fields that it documents.
    """
    for _ in range(count):
        path = rng.choice(sorted(BODIES))
        if rng.random() < 0.03:
            content = rng.choice(RAW)
        else:
            body = make_body(rng, model, BODIES[path], fields.get(path, []))
            content = json.dumps(body).encode()
        if rng.random() < 0.02:
            cut = rng.randrange(len(content) + 1)
            content = content[:cut] + rng.randbytes(3) + content[cut + 3 :]
        if len(content) <= MAX_BYTES:
            yield Case("POST", path, content, {"content-type": rng.choice(MEDIA_TYPES)})
