"""What exceeds a limit is refused before a route sees it; what does not arrives as it was sent."""

import asyncio
import json
import os
import threading
from contextlib import suppress
from http import HTTPStatus
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from vllm.exceptions import GracefulHTTPError, QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from adaptive_head.options import parse_request
from adaptive_head.parameters import MAX_LIST_LEN
from adaptive_head.vllm.limits import Limits
from server.limits import grammars, messages
from server.limits.body import MAX_BRACKETS
from server.limits.door import MAX_INLINE_BYTES, Door
from server.limits.grammars import GrammarGate, check_grammars_in_threads
from server.limits.queue import Queue, refuse_full
from server.limits.shape import check_body
from tests.programs import HANG_S

SMALL = Limits(
    max_body_bytes=4000,
    max_header_bytes=200,
    max_read_seconds=0.2,
    max_name_length=20,
    max_choices=8,
    max_list_items=4,
    max_messages=5,
    max_token_ids=20,
    max_grammar_bytes=60,
)
LONG = "x" * 21


class Client:
    """Sends a request to a `Door` and keeps what comes back; behind it is a route that echoes."""

    def __init__(self, limits: Limits = SMALL, queue: Queue | None = None) -> None:
        self.sent: list[dict] = []
        self.seen: bytes | None = None
        self.unread = 0
        self._door = Door(self._echo, limits, queue or Queue())

    async def _echo(self, scope, receive, send) -> None:
        message = await receive()
        assert not message.get("more_body", False)
        self.seen = message.get("body", b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.seen})

    async def ask(
        self, *parts: bytes, path="/v1/completions", headers=(), method="POST", ends=True
    ):
        """Send a body in parts; without `ends`, one that does not end."""
        pending = list(parts or [b""])
        self.unread = len(pending)

        async def receive() -> dict:
            if not pending:
                await asyncio.sleep(3600)
            body = pending.pop(0)
            self.unread = len(pending)
            more_body = bool(pending) or not ends
            return {"type": "http.request", "body": body, "more_body": more_body}

        async def send(message: dict) -> None:
            self.sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": list(headers),
        }
        async with asyncio.timeout(HANG_S):
            await self._door(scope, receive, send)
        return self.sent[0]["status"]

    @property
    def error(self) -> dict:
        return json.loads(b"".join(message.get("body", b"") for message in self.sent))["error"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


async def refused(body: object, limits: Limits = SMALL) -> tuple[str, str]:
    """The field and the message of a 400."""
    client = Client(limits)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert await client.ask(content) == 400
    assert client.seen is None
    assert client.error["code"] == 400
    assert client.error["type"] == "BadRequestError"
    return client.error["param"], client.error["message"]


@pytest.mark.parametrize(
    ("body", "param", "option"),
    [
        ({"model": LONG}, "model", "--max-name-length"),
        ({"user": LONG}, "user", "--max-name-length"),
        ({"stop": LONG}, "stop", "--max-name-length"),
        ({"stop": ["a", LONG]}, "stop.1", "--max-name-length"),
        ({LONG: 1}, LONG, "--max-name-length"),
        ({"logit_bias": {LONG: 1}}, f"logit_bias.{LONG}", "--max-name-length"),
        ({"tools": [{"function": {"name": LONG}}]}, "tools.0.function.name", "--max-name-length"),
        ({"tools": [{"name": LONG}]}, "tools.0.name", "--max-name-length"),
        ({"tool_choice": {"function": {"name": LONG}}}, None, "--max-name-length"),
        ({"response_format": {"json_schema": {"name": LONG}}}, None, "--max-name-length"),
        ({"messages": [{"role": LONG}]}, "messages.0.role", "--max-name-length"),
        ({"input": [{"role": LONG}]}, "input.0.role", "--max-name-length"),
        ({"prompt": ["a"] * 9}, "prompt", "--max-choices"),
        ({"prompt": ["a"] * 3, "n": 3}, "prompt", "--max-choices"),
        ({"prompt": "a", "n": 9}, "n", "--max-choices"),
        ({"prompt": "a", "n": "9"}, "n", "--max-choices"),
        ({"prompt": [[1]] * 3, "n": 3.0}, "prompt", "--max-choices"),
        ({"n": 10**30}, "n", "--max-choices"),
        ({"messages": [[{"role": "user"}]] * 5, "n": 2}, "prompt", "--max-choices"),
        ({"items": ["a"] * 9}, "prompt", "--max-choices"),
        ({"questions": {key: {} for key in "abcd"}, "n": 3}, "prompt", "--max-choices"),
        ({"sampling_params": {"n": 9}}, "sampling_params.n", "--max-choices"),
        ({"stop_token_ids": [1] * 5}, "stop_token_ids", "--max-list-items"),
        ({"logit_bias": dict.fromkeys("abcde", 1)}, "logit_bias", "--max-list-items"),
        ({"messages": [{"content": [{}] * 5}]}, "messages.0.content", "--max-list-items"),
        (dict.fromkeys("abcde"), "body", "--max-list-items"),
        ({"messages": [{}] * 6}, "messages", "--max-messages"),
        ({"prompt": [1] * 21}, "prompt", "--max-token-ids"),
        ({"tokens": [1] * 21}, "tokens", "--max-token-ids"),
        ({"structured_outputs": {"regex": "a" * 60}}, "structured_outputs", "--max-grammar-bytes"),
        ({"text": {"format": {"a": "a" * 60}}}, "text", "--max-grammar-bytes"),
    ],
)
async def test_a_field_that_exceeds_a_limit_is_named_with_it(body, param, option):
    found, message = await refused(body)
    assert param is None or found == param
    assert message.startswith(f"{found}: at most ")
    assert option in message


@pytest.mark.parametrize(
    "body",
    [
        {"model": "x" * 16, "prompt": "y" * 3000, "n": 8, "user": None},
        {"prompt": [1] * 20, "n": 2, "stop": ["a", "b"], "logit_bias": {"1": 2}},
        {"prompt": ["a"] * 4, "n": 2},
        {"messages": [{"role": "user", "content": "z" * 3000}] * 1},
        {"n": None, "model": 5, "stop": {}, "messages": 1},
        {"n": "many", "prompt": []},
        {"tools": [{"n": 9, "prompt": "a"}]},
        {"prompt": float("nan")},
    ],
)
async def test_what_is_within_the_limits_goes_on_as_it_was_sent(body):
    client, content = Client(), json.dumps(body).encode()
    assert await client.ask(content) == 200
    assert client.seen == content


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 3000, b'{"a":'])
async def test_what_is_no_object_is_left_to_the_route(content):
    client = Client()
    assert await client.ask(content) == 200
    assert client.seen == content


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
async def test_no_encoding_that_the_routes_understand_gets_round_the_limits(encoding):
    assert (await refused(json.dumps({"n": 9}).encode(encoding)))[0] == "n"


async def test_a_large_body_is_checked_too():
    body = {"prompt": "a" * MAX_INLINE_BYTES, "n": 9}
    param, _ = await refused(body, SMALL.model_copy(update={"max_body_bytes": 10**6}))
    assert param == "n"


@pytest.mark.parametrize("item", ["[]", "{}", '"["'])
async def test_a_body_with_very_many_brackets_is_refused_before_it_is_parsed(item):
    brackets = ",".join([item] * MAX_BRACKETS)
    client = Client(SMALL.model_copy(update={"max_body_bytes": 10**7}))
    assert await client.ask(f'{{"prompt": [{brackets}]}}'.encode()) == 400
    assert client.error["message"].startswith(f"body: at most {MAX_BRACKETS} opening brackets")


async def test_a_body_in_parts_arrives_whole():
    client = Client()
    assert await client.ask(b'{"prompt"', b': "a"', b"}") == 200
    assert client.seen == b'{"prompt": "a"}'


async def test_a_body_that_says_that_it_is_too_large_is_read_to_its_end_once_refused():
    client = Client()
    headers = [(b"content-length", b"8000")]
    assert await client.ask(*[b"x" * 1000] * 8, headers=headers) == 413
    assert client.seen is None
    assert client.error["param"] == "body"
    assert "at most 4000 bytes, got 8000 (--max-body-bytes" in client.error["message"]
    assert client.unread == 0
    assert [message["more_body"] for message in client.sent[1:]] == [True, False]


async def test_a_body_that_grows_too_large_is_read_to_its_end_once_refused():
    client = Client()
    assert await client.ask(*[b"x" * 1000] * 8) == 413
    assert client.unread == 0
    assert client.headers[b"connection"] == b"close"


async def test_a_body_that_does_not_come_is_not_waited_for():
    client = Client()
    assert await client.ask(b'{"prompt":', ends=False) == 408
    assert "--max-read-seconds" in client.error["message"]
    assert client.headers[b"connection"] == b"close"


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_long_headers_are_refused(method):
    client = Client()
    headers = [(b"a", b"x" * 100), (b"b", b"x" * 100)]
    assert await client.ask(headers=headers, method=method) == 431
    assert client.error["param"] == "headers"


async def test_a_client_that_leaves_is_left_to_the_route():
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())

    async def receive():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    await Door(app, SMALL, Queue())(scope, receive, None)
    assert seen == [{"type": "http.disconnect"}]


class FullEngine:
    """An engine client whose queue is full."""

    def check_admission(self, n=1):
        raise QueueOverflowError()


@pytest.mark.parametrize(("path", "status"), [("/v1/completions", 503), ("/tokenize", 200)])
async def test_a_full_queue_refuses_what_goes_to_the_engine(path, status):
    queue = Queue()
    queue.watch(FullEngine())
    client = Client(queue=queue)
    assert await client.ask(b"{}", path=path) == status
    if status == 503:
        assert client.headers[b"retry-after"] == b"5"
        assert "--max-num-queued-reqs" in client.error["message"]


async def test_a_request_that_does_not_fit_the_queue_is_told_when_to_come_again():
    response = await refuse_full(None, QueueOverflowError())
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert json.loads(response.body)["error"]["code"] == 503


async def test_other_errors_with_a_status_of_their_own_keep_it():
    response = await refuse_full(None, GracefulHTTPError("it runs already", HTTPStatus.CONFLICT))
    assert response.status_code == 409
    error = json.loads(response.body)["error"]
    assert (error["message"], error["type"]) == ("it runs already", "Conflict")


# Each takes the stock function seconds: `/a` repeated, as paths, in many words.
ATTACKS = ["/a" * 30_000, "/a-" * 30_000, ("/a" * 50 + " ") * 600, "/home/a" * 9000, "\n" * 60_000]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: repr(attack[:8]))
def test_no_message_keeps_vllms_sanitizer_busy(attack):
    thread = threading.Thread(target=messages.sanitize_bounded, args=[attack], daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert not thread.is_alive()


def test_ordinary_messages_are_what_vllm_makes_of_them():
    for message in ("temperature must be 1", "no file /srv/models/a/b.py here", "x" * 100):
        assert messages.sanitize_bounded(message) == messages._stock_sanitize(message)
    assert messages.sanitize_bounded("y" * 101) == "y" * 100 + "…"


def test_all_of_vllms_routes_have_the_bounded_sanitizer():
    from vllm.entrypoints.serve.exception_handling import error_response, utils
    from vllm.entrypoints.serve.exception_handling.handlers import http, validation

    messages.bound_messages()
    for module in (utils, error_response, http, validation):
        assert module.sanitize_message is messages.sanitize_bounded


@pytest.fixture
def gate(monkeypatch):
    """A gate to an engine that only notes what it is handed, with a check that can be held up."""
    monkeypatch.setattr(grammars, "NUM_SLOTS", 1)
    monkeypatch.setattr(grammars, "MAX_LATE", 2)
    may_end = threading.Event()
    added, slow = [], []

    def check(params):
        if params.structured_outputs.regex == "slow":
            slow.append(threading.current_thread())
            may_end.wait(HANG_S)
        if params.structured_outputs.regex == "wrong":
            raise VLLMValidationError("wrong")
        params.structured_outputs._backend = "checked"

    async def add_request(request_id, prompt, params, **kwargs):
        added.append(params)
        return request_id

    made = GrammarGate(add_request, check, Limits(max_grammar_seconds=0.2))
    yield SimpleNamespace(
        add=made.add_request, added=added, slow=slow, may_end=may_end, slots=made._slots
    )
    may_end.set()


def ask_for(regex: str) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex))


async def test_a_grammar_is_checked_and_goes_on(gate):
    params = ask_for("good")
    assert await gate.add("r", "p", params) == "r"
    assert gate.added[0].structured_outputs._backend == "checked"
    with pytest.raises(VLLMValidationError, match="wrong"):
        await gate.add("r", "p", ask_for("wrong"))
    assert await gate.add("r", "p", ask_for("good")) == "r"


async def test_a_slow_grammar_is_refused_and_holds_up_no_other(gate):
    with pytest.raises(VLLMValidationError, match="--max-grammar-seconds") as caught:
        await gate.add("r", "p", ask_for("slow"))
    assert caught.value.parameter == "structured_outputs"
    assert await gate.add("r", "p", ask_for("good")) == "r"
    (thread,) = gate.slow
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19


async def test_grammars_are_refused_while_too_many_slow_ones_go_on(gate, monkeypatch):
    monkeypatch.setattr(grammars, "MAX_LATE", 1)
    with pytest.raises(VLLMValidationError):
        await gate.add("r", "p", ask_for("slow"))
    with pytest.raises(GracefulHTTPError, match="being checked") as busy:
        await gate.add("r", "p", ask_for("good"))
    assert busy.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE
    assert await gate.add("r", "p", SamplingParams()) == "r"
    gate.may_end.set()
    async with asyncio.timeout(HANG_S):
        while len(gate.added) == 1:
            await asyncio.sleep(0.01)
            with suppress(GracefulHTTPError):
                await gate.add("r", "p", ask_for("good"))


async def test_more_grammars_than_are_checked_at_once_wait_and_then_come_again(gate):
    async with gate.slots:
        with pytest.raises(GracefulHTTPError, match="being checked"):
            await gate.add("r", "p", ask_for("good"))
    assert await gate.add("r", "p", ask_for("good")) == "r"


async def test_vllms_check_runs_in_the_thread_and_nowhere_else():
    """vLLM's own: a grammar that is wrong is refused as before, and the processor checks none."""
    config = SimpleNamespace(backend="xgrammar")
    processor = SimpleNamespace(
        structured_outputs_config=config,
        model_config=SimpleNamespace(is_diffusion=False),
        tokenizer=object(),
    )
    added = []

    async def add_request(request_id, prompt, params):
        # As `InputProcessor` does, on the event loop.
        params._validate_structured_outputs(
            processor.model_config, processor.structured_outputs_config, processor.tokenizer
        )
        added.append(params)

    client = SimpleNamespace(input_processor=processor, add_request=add_request)
    await check_grammars_in_threads(client, Limits(max_grammar_seconds=HANG_S))
    assert processor.structured_outputs_config is None
    await client.add_request("r", "p", ask_for("[ab]+"))
    assert added[0].structured_outputs._backend == "xgrammar"
    with pytest.raises(VLLMValidationError, match="regex"):
        await client.add_request("r", "p", ask_for("("))


async def test_the_compilers_are_loaded_before_the_first_request(monkeypatch):
    """And a server starts even where they cannot be."""
    checked = []

    def check(params, *_):
        checked.append(params.structured_outputs.regex)
        raise ImportError("no compiler")

    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", check)
    processor = SimpleNamespace(structured_outputs_config=None, model_config=None, tokenizer=None)
    client = SimpleNamespace(input_processor=processor, add_request=None)
    await check_grammars_in_threads(client, Limits())
    assert len(checked) == 1


def test_the_handler_of_a_full_queue_survives_vllms_own():
    """vLLM registers its handlers after the plugin's; the most specific class decides."""
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.exception_handler(GracefulHTTPError)(refuse_full)
    init_exception_handler(app)
    assert app.exception_handlers[GracefulHTTPError] is refuse_full
    assert QueueOverflowError.__mro__[1] is GracefulHTTPError


def test_the_longest_list_of_temperatures_is_within_the_limits():
    adaptive = {"policy": "list", "list": {"temperatures": [0.7] * MAX_LIST_LEN}}
    check_body(json.dumps({"prompt": "a", "adaptive": adaptive}).encode(), Limits())
    assert parse_request(adaptive).list.temperatures == [0.7] * MAX_LIST_LEN
