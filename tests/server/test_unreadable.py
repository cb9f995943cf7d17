"""What vLLM answered with a 500, with an error in another form, or not at all."""

import json

import pytest

from tests.server.conftest import MODEL

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "Hi"}]
HALF = "\ud800"
UNREADABLE = {
    "grammar that is a text": (CHAT, {"messages": MESSAGES, "structured_outputs": "a+"}),
    "grammar that is a list": (COMPLETION, {"prompt": "a", "structured_outputs": ["a"]}),
    "regex that is a number": (COMPLETION, {"prompt": "a", "structured_outputs": {"regex": 1}}),
    "schema that is a list": (COMPLETION, {"prompt": "a", "structured_outputs": {"json": [1]}}),
    "stop": (COMPLETION, {"prompt": "a", "stop": HALF}),
    "stops": (CHAT, {"messages": MESSAGES, "stop": ["a", HALF]}),
    "request_id": (COMPLETION, {"prompt": "a", "request_id": HALF}),
    "prompt": (COMPLETION, {"prompt": f"a{HALF}"}),
    "message": (CHAT, {"messages": [{"role": "user", "content": HALF}]}),
    "field's name": (CHAT, {"messages": MESSAGES, HALF: 1}),
    "refusal": (
        RESPONSES,
        {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
    ),
}


def assert_refused(response, status: int) -> None:
    error = response.json()["error"]
    assert response.status_code == error["code"] == status, response.text
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "streaming"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_a_400(mock_server, case, stream):
    path, body = UNREADABLE[case]
    body = {"model": MODEL, "max_tokens": 2, "stream": stream} | body
    assert_refused(mock_server.post(path, json.dumps(body).encode()), 400)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[", b'{"model": }', b"{} {}"])
@pytest.mark.parametrize("path", [CHAT, COMPLETION, RESPONSES, "/tokenize", "/invocations"])
def test_what_does_not_parse_is_refused_in_openais_form(mock_server, path, content):
    assert_refused(mock_server.post(path, content), 400)


def test_what_does_not_exist_is_refused_in_openais_form(mock_server):
    assert_refused(mock_server.post("/v1/nothing", {}), 404)
    assert_refused(mock_server.get("/nothing"), 404)
    assert_refused(mock_server.get(CHAT), 405)
