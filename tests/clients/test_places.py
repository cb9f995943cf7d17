"""Where an answer says how it was sampled: choices, usage, the last chunk, headers."""

import json
from urllib.parse import unquote

import httpx
import pytest

from server.cli import EMBEDDED_NAME
from tests.clients.conftest import AWKWARD

ALIAS = f"{EMBEDDED_NAME}:adaptive"
CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PROMPTS = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "ignore_eos": True},
    COMPLETION: {"prompt": "Hi", "max_tokens": 9, "ignore_eos": True},
    RESPONSES: {"input": "Hi", "max_output_tokens": 9, "ignore_eos": True},
}
ROUTES = pytest.mark.parametrize("path", PROMPTS)
STREAMED = pytest.mark.parametrize("path", [CHAT, COMPLETION])
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def ask(mock, path: str, **options) -> httpx.Response:
    body = {"model": EMBEDDED_NAME, "temperature": "adaptive"} | PROMPTS[path] | options
    return mock.post(path, body)


def answer(mock, path: str, **options) -> dict:
    return ask(mock, path, **options).raise_for_status().json()


def stream(mock, path: str, **options) -> list[dict]:
    """The chunks of a stream, or the events of one of the Responses API."""
    text = ask(mock, path, stream=True, **options).raise_for_status().text
    lines = [line.removeprefix("data: ") for line in text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def headers_of(response: httpx.Response) -> dict[str, str]:
    found = response.headers.items()
    return {name: value for name, value in found if name.startswith("x-adaptive")}


def summary_of(described: dict) -> dict:
    """An `adaptive` object without the list of its tokens' temperatures."""
    return {key: value for key, value in described.items() if key != "temperatures"}


@STREAMED
@pytest.mark.parametrize("detail", ["summary", "tokens"])
def test_usage_repeats_the_summary_of_an_answer(mock, path, detail):
    found = answer(mock, path, adaptive={"head": AWKWARD, "report": detail})
    described = found["choices"][0]["adaptive"]
    assert ("temperatures" in described) == (detail == "tokens")
    assert found["usage"]["adaptive"] == summary_of(described)


def test_usage_repeats_the_summary_of_a_response(mock):
    found = answer(mock, RESPONSES)
    assert found["usage"]["adaptive"] == found["adaptive"]
    *_, completed = stream(mock, RESPONSES)
    response = completed["response"]
    assert response["usage"]["adaptive"] == response["adaptive"]


@pytest.mark.parametrize(
    ("path", "options"), [(CHAT, {"n": 3}), (COMPLETION, {"prompt": ["a", "b"], "n": 2})]
)
def test_usage_lists_the_summaries_of_several_answers_in_their_order(mock, path, options):
    found = answer(mock, path, **options)
    choices = found["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    assert found["usage"]["adaptive"] == [choice["adaptive"] for choice in choices]
    chunks = stream(mock, path, stream_options={"include_usage": True}, **options)
    ends = {
        choice["index"]: choice["adaptive"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }
    assert chunks[-1]["usage"]["adaptive"] == [ends[index] for index in sorted(ends)]


@STREAMED
@pytest.mark.parametrize("report", ["summary", "tokens"])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("policy", ["head", "entropy"])
def test_a_streams_end_says_it_three_times(mock, path, report, continuous, policy):
    chunks = stream(
        mock,
        path,
        adaptive={"policy": policy, "report": report},
        stream_options={"include_usage": True, "continuous_usage_stats": continuous},
    )
    *begun, end, usage = chunks
    (choice,) = end["choices"]
    assert usage["choices"] == []
    assert usage["usage"]["adaptive"] == end["adaptive"] == summary_of(choice["adaptive"])
    assert (end["adaptive"]["head"] is None) == (policy == "entropy")
    # Neither the running counts of usage nor other chunks have it.
    assert not any("adaptive" in (chunk.get("usage") or {}) for chunk in [*begun, end])
    assert not any("adaptive" in chunk for chunk in begun)


@ROUTES
def test_headers_name_policy_head_and_mean(mock, path):
    response = ask(mock, path, adaptive={"head": "sequence"})
    mean = response.json()["usage"]["adaptive"]["mean"]
    assert headers_of(response) == {
        "x-adaptive-policy": "head",
        "x-adaptive-head": "sequence",
        "x-adaptive-mean": str(mean),
    }
    headers = headers_of(ask(mock, path, stream=True))
    assert headers == {"x-adaptive-policy": "head", "x-adaptive-head": "sequence"}


@ROUTES
def test_a_policy_without_a_head_has_no_header_for_one(mock, path):
    response = ask(mock, path, adaptive={"policy": "entropy"})
    assert headers_of(response).keys() == {"x-adaptive-policy", "x-adaptive-mean"}
    assert response.json()["usage"]["adaptive"]["head"] is None


@ROUTES
def test_a_heads_name_is_percent_encoded(mock, path):
    header = ask(mock, path, adaptive={"head": AWKWARD}).headers["x-adaptive-head"]
    assert header == "fr%C3%B6hlich%2050%25"
    assert unquote(header) == AWKWARD


def test_the_header_of_several_answers_is_the_mean_of_all_tokens(mock):
    options = {"adaptive": {"head": AWKWARD, "report": "tokens"}, "seed": 3}
    response = ask(mock, COMPLETION, prompt=["a", "b"], n=2, **options)
    temperatures = [
        temperature
        for choice in response.json()["choices"]
        for temperature in choice["adaptive"]["temperatures"]
    ]
    assert len(temperatures) == 36
    mean = sum(temperatures) / len(temperatures)
    assert float(response.headers["x-adaptive-mean"]) == pytest.approx(mean, abs=1e-6)


@ROUTES
def test_without_a_report_headers_say_what_chose_and_nothing_else_does(mock, path):
    response = ask(mock, path, adaptive={"report": "none"})
    assert headers_of(response).keys() == {"x-adaptive-policy", "x-adaptive-head"}
    assert '"adaptive"' not in response.text
    options = {} if path == RESPONSES else {"stream_options": {"include_usage": True}}
    assert not any(
        '"adaptive"' in json.dumps(chunk)
        for chunk in stream(mock, path, **options, adaptive={"report": "none"})
    )


@ROUTES
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_ordinary_answer_has_none_of_it(mock, path, is_stream):
    # On a connection that has just had an adaptive answer.
    ask(mock, path)
    options = WITH_USAGE if is_stream and path != RESPONSES else {"stream": is_stream}
    response = ask(mock, path, temperature=0.7, **options)
    assert response.is_success
    assert not headers_of(response)
    assert "adaptive" not in response.text


@ROUTES
def test_an_error_has_none_of_it(mock, path):
    response = ask(mock, path, max_tokens=10**6, max_output_tokens=10**6)
    assert response.status_code == 400
    assert not headers_of(response)


@ROUTES
@pytest.mark.parametrize("detail", ["none", "tokens"])
def test_an_answer_repeats_the_alias_that_was_asked_for(mock, path, detail):
    options = {"model": ALIAS, "adaptive": {"report": detail}}
    assert answer(mock, path, **options)["model"] == ALIAS
    chunks = stream(mock, path, **options)
    named = [chunk.get("response", chunk) for chunk in chunks]
    assert {content["model"] for content in named if "model" in content} == {ALIAS}
    assert answer(mock, path)["model"] == EMBEDDED_NAME


CONVERSATION = PROMPTS[CHAT]["messages"]
ELSEWHERE = {
    "/v1/messages": {"messages": CONVERSATION},
    "/v1/chat/completions/batch": {"messages": [CONVERSATION, CONVERSATION]},
    "/invocations": {"prompt": "Hi"},
}


@pytest.mark.parametrize("path", ELSEWHERE)
def test_every_other_route_has_the_headers_and_the_alias(mock, path):
    body = ELSEWHERE[path] | {"max_tokens": 9}
    response = mock.post(path, body | {"model": ALIAS, "adaptive": {"head": "sequence"}})
    found = response.raise_for_status().json()
    summaries = [part["adaptive"] for part in found.get("choices", [found])]
    num_tokens = sum(summary["tokens"] for summary in summaries)
    mean = sum(summary["mean"] * summary["tokens"] for summary in summaries) / num_tokens
    headers = headers_of(response)
    assert float(headers.pop("x-adaptive-mean")) == pytest.approx(mean, abs=1e-5)
    assert headers == {"x-adaptive-policy": "head", "x-adaptive-head": "sequence"}
    assert found["model"] == ALIAS
    response = mock.post(path, body | {"model": EMBEDDED_NAME, "temperature": 0.7})
    assert response.raise_for_status().json()["model"] == EMBEDDED_NAME
    assert not headers_of(response)


@pytest.mark.parametrize("path", ["/v1/messages", "/invocations"])
def test_streams_of_every_other_route_have_them_too(mock, path):
    body = ELSEWHERE[path] | {"max_tokens": 9, "stream": True, "model": ALIAS}
    response = mock.post(path, body).raise_for_status()
    assert headers_of(response).keys() == {"x-adaptive-policy", "x-adaptive-head"}
    lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    named = [event.get("message", event) for event in events]
    assert {content["model"] for content in named if "model" in content} == {ALIAS}
