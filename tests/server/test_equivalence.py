"""With a number as temperature this server is vLLM's, token by token."""

import json
import os
import sys

import pytest
import vllm

from adaptive_head.embedded_model import prepare
from tests.server.conftest import ENGINE_OPTIONS, MODEL, begin_main_server, begin_server, begun

pytestmark = pytest.mark.engine

COMPLETIONS = {
    "greedy": {"temperature": 0},
    "cool": {"temperature": 0.3},
    "warm": {"temperature": 0.7},
    "one": {"temperature": 1.0},
    "hot": {"temperature": 1.8},
    "default": {},
    "null": {"temperature": None},
    "text": {"temperature": "0.7"},
    "top_p": {"temperature": 0.9, "top_p": 0.8},
    "filters": {"temperature": 1.0, "top_k": 20, "min_p": 0.05},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    "repetition": {"temperature": 0, "repetition_penalty": 1.4},
    "bias": {"temperature": 0.5, "logit_bias": {"260": 3.0}},
    "choices": {"temperature": 0.8, "n": 3},
    "prompts": {"temperature": 0.8, "prompt": ["One", "Two"], "n": 2},
    "stop": {"temperature": 0.7, "stop": [" time", ","]},
    "logprobs": {"temperature": 0.7, "logprobs": 2},
    "echo": {"temperature": 0.7, "echo": True, "logprobs": 1},
    "beams": {"temperature": 0, "use_beam_search": True, "n": 2, "max_tokens": 3},
}
CHATS = {
    "plain": {"temperature": 0.7},
    "logprobs": {"temperature": 0.7, "logprobs": True, "top_logprobs": 2, "n": 2},
    "bounded": {"temperature": 0.7, "max_completion_tokens": 3},
}
REFUSED = {
    "negative": {"temperature": -1},
    "too hot": {"temperature": 99},
    "top_p": {"top_p": 7},
    "model": {"model": "other"},
    "xargs": {"vllm_xargs": 5},
    "prompt": {"prompt": None},
}


def begin_processes(background):
    begin_main_server(background)
    begin_stock_server(background)


def begin_stock_server(background):
    assert "VLLM_PLUGINS" not in os.environ
    entry = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    begin_server(background, "stock", [*entry, "--model", str(prepare()), *ENGINE_OPTIONS])


@pytest.fixture(scope="module")
def stock(background):
    """vLLM's own server, with the same options for its engine."""
    begin_stock_server(background)
    with begun(background, "stock") as stock:
        yield stock


def complete(server, options, **more) -> dict:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "seed": 1}
    response = server.post("/v1/completions", body | {"return_token_ids": True} | options | more)
    return response.json() | {"status": response.status_code}


def chat(server, options) -> dict:
    messages = [{"role": "user", "content": "Tell me about foxes."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "seed": 1}
    response = server.post("/v1/chat/completions", body | {"return_token_ids": True} | options)
    return response.json() | {"status": response.status_code}


def without_names(answer: dict) -> dict:
    """An answer without what differs between two requests, or between two configurations."""
    names = ("id", "created", "system_fingerprint")
    return {key: value for key, value in answer.items() if key not in names}


def about(value):
    """The same, with logprobs as equal as they are where batches form by chance."""
    match value:
        case dict():
            return {key: about(item) for key, item in value.items()}
        case list():
            return [about(item) for item in value]
        case float():
            return pytest.approx(value, abs=1e-3)
    return value


def test_both_servers_run_the_vllm_under_test(server, stock):
    for which in (server, stock):
        assert which.get("/version").json() == {"version": vllm.__version__}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completions_are_vllms(server, stock, case):
    ours, theirs = (complete(which, COMPLETIONS[case]) for which in (server, stock))
    assert ours["status"] == 200
    assert without_names(ours) == about(without_names(theirs))


@pytest.mark.parametrize("case", CHATS)
def test_chats_are_vllms(server, stock, case):
    ours, theirs = (chat(which, CHATS[case]) for which in (server, stock))
    assert ours["status"] == 200
    assert without_names(ours) == about(without_names(theirs))


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_vllms(server, stock, case):
    ours, theirs = (complete(which, REFUSED[case]) for which in (server, stock))
    assert ours["status"] in (400, 404)
    # Except that a name which does not exist is answered with one more that does.
    error = ours["error"]
    error["message"] = error["message"].replace(f", {MODEL}:adaptive.", ".")
    assert ours == theirs


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "One"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Tell me of foxes."}]}),
    ],
)
@pytest.mark.parametrize("options", [{}, {"n": 2}, {"stop": [" the", "."], "max_tokens": 40}])
def test_streams_are_vllms(server, stock, path, prompt, options):
    body = {"model": MODEL, "max_tokens": 12, "seed": 1, "temperature": 0.7, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | prompt | options

    def read(which) -> list[list[dict]]:
        response = which.post(path, body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert done == "[DONE]"
        found = [without_names(json.loads(event)) for event in events]
        # Several answers come in turns as they may.
        choices = [[event for event in found if chooses(event, i)] for i in range(2)]
        return [*choices, [event for event in found if not event["choices"]]]

    ours = read(server)
    assert len(ours[0]) > 3
    assert ours == read(stock)


def chooses(event: dict, index: int) -> bool:
    """Whether an event is of this answer."""
    return any(choice["index"] == index for choice in event["choices"])
