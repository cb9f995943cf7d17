import logging
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.sampling_params import SamplingParams

from adaptive_head.operator_policy import make_constant, read_policy
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.compat import UnsupportedError
from server.head_routes import HEADS_PATH
from server.override_routes import OVERRIDE_PATH
from server.playground import PLAYGROUND_PATH
from server.plugin import AdaptiveEndpoints, announce, require_engine_side
from server.protocol import AdaptiveResponsesRequest
from server.responses import AdaptiveServingResponses
from server.routes import (
    BATCH_PATH,
    CHAT_PATH,
    COMPLETION_PATH,
    MESSAGES_PATH,
    MODELS_PATH,
    RESPONSES_PATH,
)
from tests.server.fakes import describe_head, feed, make_report, make_state

ARGS = Namespace(
    host=None,
    port=8123,
    uds=None,
    ssl_certfile=None,
    api_key=None,
    otlp_traces_endpoint=None,
    additional_config={},
)


@pytest.mark.parametrize(
    ("worker", "scheduler", "option"),
    [
        ("auto", None, f"--worker-cls {WORKER_CLS}, found auto"),
        (WORKER_CLS, None, f"--scheduler-cls {SCHEDULER_CLS}, found None"),
        ("auto", SCHEDULER_CLS, "--worker-cls"),
    ],
)
def test_an_engine_without_our_side_is_refused_with_the_missing_option(worker, scheduler, option):
    with pytest.raises(UnsupportedError) as caught:
        require_engine_side(worker, scheduler)
    assert option in str(caught.value)
    assert "adaptive-serve" in str(caught.value)


def test_an_engine_with_our_side_is_accepted():
    require_engine_side(WORKER_CLS, SCHEDULER_CLS)


@pytest.fixture
def announced(caplog, monkeypatch):
    """The lines that a start-up prints last."""
    # vLLM's loggers do not propagate, which keeps them from caplog.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)

    def run(args=ARGS, override=None, **state) -> str:
        caplog.clear()
        with caplog.at_level("INFO", logger="vllm"):
            made = make_state(**state)
            made.heads.override = override
            announce(made, args)
        return "\n".join(caplog.messages)

    return run


def test_the_announcement_says_where_what_and_how(announced):
    text = announced(adaptive_by_default=True)
    assert "http://0.0.0.0:8123/v1" in text
    assert "smol:adaptive" in text
    assert "default adaptive" in text
    assert "tok (token, default) [0 0.3 0.7 1]" in text
    assert "seq (sequence) [0 0.3 0.7 1]" in text


@pytest.mark.parametrize(
    ("changes", "key", "is_warned"),
    [
        ({"host": "127.0.0.1"}, None, False),
        ({"host": "localhost"}, None, False),
        ({"host": "::1"}, None, False),
        ({"host": None}, None, True),
        ({"host": "0.0.0.0"}, "", True),
        ({"host": "::"}, None, True),
        ({"host": "gpu-7.example"}, None, True),
        ({"host": "0.0.0.0"}, "key", False),
        ({"host": None, "api_key": ["key"]}, None, False),
        ({"host": None, "uds": "/run/socket"}, None, False),
    ],
)
def test_a_server_that_all_may_use_is_warned_of(
    announced, caplog, monkeypatch, changes, key, is_warned
):
    monkeypatch.setenv("VLLM_API_KEY", key or "")
    text = announced(Namespace(**vars(ARGS) | changes))
    has_key = bool(key or changes.get("api_key"))
    assert ("API key needed" in text) == has_key
    assert ("API key none" in text) != has_key
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert any("VLLM_API_KEY" in record.getMessage() for record in warnings) == is_warned


def test_the_announcement_does_not_hide_that_a_head_is_untrained(announced):
    assert "UNTRAINED" in announced(heads={"a": describe_head(trained=False)})
    assert "UNTRAINED" not in announced(heads={"a": describe_head(trained=True)})


def test_a_default_head_that_has_failed_the_gate_is_warned_of(announced, caplog):
    local = Namespace(**vars(ARGS) | {"host": "127.0.0.1"})
    for outcome, is_warned in [("failed", True), ("passed", False), (None, False)]:
        judged = describe_head(trained=True).model_copy(update={"gate": outcome})
        announced(args=local, heads={"a": judged})
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert bool(warnings) == is_warned
        assert all("a has failed the gate" in record.getMessage() for record in warnings)


def test_the_announcement_says_that_policies_work_without_heads(announced):
    assert "none; the learning-free policies work without" in announced(heads={})


def test_the_announcement_says_what_the_operator_has_decided(announced):
    text = announced()
    assert "  policy " not in text and "  max " not in text and "OVERRIDE" not in text
    policy = read_policy({"policy": "entropy", "entropy": {"t0": 0.8, "theta": 0.3}})
    text = announced(policy=policy, max_temperature=0.9, override=make_constant(0.6))
    assert '"policy":"entropy"' in text and '"t0":0.8' in text
    assert "max     0.9" in text
    assert "OVERRIDE: every adaptive request gets 0.6" in text


def test_the_routes_are_those_of_vllm_and_the_list_of_heads():
    app = FastAPI()
    app.state.args = ARGS
    known = {route.path for route in app.routes}
    AdaptiveEndpoints().attach_router(app)
    added = {path for path in app.openapi()["paths"]} - known
    assert added == {
        CHAT_PATH,
        BATCH_PATH,
        COMPLETION_PATH,
        RESPONSES_PATH,
        MESSAGES_PATH,
        MODELS_PATH,
        HEADS_PATH,
        HEADS_PATH + "/{name}",
        HEADS_PATH + "/{name}/training",
        OVERRIDE_PATH,
    }


def test_the_playground_is_there_unless_it_is_switched_off(announced):
    off = Namespace(**vars(ARGS) | {"additional_config": {"adaptive": {"playground": False}}})
    for args, is_there in [(ARGS, True), (off, False)]:
        app = FastAPI()
        app.state.args = args
        AdaptiveEndpoints().attach_router(app)
        assert any(route.path == PLAYGROUND_PATH for route in app.routes) == is_there
        assert (PLAYGROUND_PATH in announced(args=args)) == is_there


PARAMS = SamplingParams(max_tokens=1)


@pytest.fixture
def respond(monkeypatch):
    """The finished response and the delta of one token, by our handler over vLLM's."""

    async def full(handler, request, *_):
        return ResponsesResponse.model_construct()

    async def stream(handler, request, *_):
        yield SimpleNamespace(type="response.output_text.delta")

    monkeypatch.setattr(OpenAIServingResponses, "responses_full_generator", full)
    monkeypatch.setattr(OpenAIServingResponses, "responses_stream_generator", stream)

    async def run(request, parser=None):
        handler = AdaptiveServingResponses.__new__(AdaptiveServingResponses)
        handler.parser = parser
        passed = request, PARAMS, None, None, "smol"
        response = await handler.responses_full_generator(*passed)
        (delta,) = [event async for event in handler.responses_stream_generator(*passed)]
        return (response.model_extra or {}).get("adaptive"), getattr(delta, "adaptive", None)

    return run


def make_response_request(detail, **fields) -> AdaptiveResponsesRequest:
    request = AdaptiveResponsesRequest.model_validate({"input": "hi"} | fields)
    request.begin_report(make_report({"report": detail}))
    feed(request.report.begin_prompt(), (0, [0.7], "stop"), finished=True)
    return request


@pytest.mark.parametrize("detail", ["none", "summary", "tokens"])
async def test_a_response_says_as_much_as_asked(respond, detail):
    full, delta = await respond(make_response_request(detail))
    assert (full is None) == (detail == "none")
    assert ("temperatures" in (full or {})) == (detail == "tokens")
    assert delta == ({"temperatures": [0.7]} if detail == "tokens" else None)


async def test_a_response_with_hidden_reasoning_is_only_summed_up(respond):
    request = make_response_request("tokens", include_reasoning=False)
    full, delta = await respond(request, parser=object())
    assert (full["tokens"], "temperatures" in full, delta) == (1, False, None)
    full, delta = await respond(request, parser=None)
    assert (full["temperatures"], delta) == ([0.7], {"temperatures": [0.7]})


async def test_an_ordinary_response_says_nothing(respond):
    for kind in (ResponsesRequest, AdaptiveResponsesRequest):
        assert await respond(kind.model_validate({"input": "hi"})) == (None, None)
