"""Whatever a client sends, it is told what is wrong, and the server goes on."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.conftest import MODEL

pytestmark = pytest.mark.engine

PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
}
# Parts of bodies, and what `error.param` says of them.
WRONG = [
    ('"temperature": "adaptve"', "temperature"),
    ('"temperature": NaN', "temperature"),
    ('"temperature": 1e999', "temperature"),
    ('"temperature": -Infinity', "temperature"),
    ('"temperature": true', "temperature"),
    ('"temperature": [1]', "temperature"),
    ('"temperature": {}', "temperature"),
    ('"temperature": ""', "temperature"),
    ('"temperature": "\\ud800"', "temperature"),
    ('"temperature": -0.1', "temperature"),
    ('"temperature": 0.5, "adaptive": {}', "temperature"),
    ('"adaptive": 1', "adaptive"),
    ('"adaptive": []', "adaptive"),
    ('"adaptive": "token"', "adaptive"),
    ('"adaptive": {"\\ud800": 1}', "adaptive"),
    ('"adaptive": {"lvl": "token"}', "adaptive.lvl"),
    ('"adaptive": {"level": "word"}', "adaptive.level"),
    ('"adaptive": {"head": "gone"}', "adaptive.head"),
    ('"adaptive": {"head": 1}', "adaptive.head"),
    ('"adaptive": {"head": "seq", "level": "token"}', "adaptive.level"),
    ('"adaptive": {"policy": "magic"}', "adaptive.policy"),
    ('"adaptive": {"policy": "entropy", "head": "tok"}', "adaptive.head"),
    ('"adaptive": {"policy": "entropy", "entropy": {"t": 1}}', "adaptive.entropy.t"),
    ('"adaptive": {"entropy": {}}', "adaptive.entropy"),
    ('"adaptive": {"policy": "schedule", "level": "sequence"}', "adaptive.level"),
    ('"adaptive": {"policy": "schedule", "schedule": {"tokens": 0}}', "adaptive.schedule.tokens"),
    ('"adaptive": {"select": "best"}', "adaptive.select"),
    ('"adaptive": {"min": 1, "max": 0.5}', "adaptive.min"),
    ('"adaptive": {"max": NaN}', "adaptive.max"),
    ('"adaptive": {"max": 11}', "adaptive.max"),
    ('"adaptive": {"scale": 0}', "adaptive.scale"),
    ('"adaptive": {"scale": true}', "adaptive.scale"),
    ('"adaptive": {"report": "all"}', "adaptive.report"),
    ('"vllm_xargs": {"adaptive": "token"}', "vllm_xargs.adaptive"),
    ('"temperature": "adaptive", "top_p": 7', "top_p"),
]


def send(server, path: str, part: str, stream=False) -> httpx.Response:
    body = json.dumps({"model": MODEL, "stream": stream} | PATHS[path])
    return server.post(path, f"{body[:-1]}, {part}}}".encode())


def assert_answers(server) -> None:
    response = send(server, "/v1/completions", '"temperature": "adaptive"')
    assert response.is_success
    assert response.json()["choices"][0]["adaptive"]["tokens"] > 0


@pytest.mark.parametrize("stream", [False, True], ids=["blocking", "streaming"])
@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_field_is_named(server, path, stream):
    for part, param in WRONG:
        response = send(server, path, part, stream)
        assert response.status_code == 400, part
        error = response.json()["error"]
        assert error["param"] == param, part
        assert error["code"] == 400
        assert 10 < len(error["message"]) < 400, part
    assert_answers(server)


def test_beam_search_cannot_be_adaptive(server):
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = send(server, path, '"temperature": "adaptive", "use_beam_search": true')
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "use_beam_search"


def test_an_unknown_model_is_not_found(server):
    body = {"model": "other:adaptive", "prompt": "hi"}
    assert server.post("/v1/completions", body).status_code == 404


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b'{"temperature":' + b"[" * 100_000],
)
def test_a_body_that_is_no_request_is_refused(server, content):
    for path in PATHS:
        assert server.post(path, content).status_code == 400


def test_a_huge_prompt_is_refused(server):
    huge = "fox " * 250_000
    for path, body in (
        ("/v1/completions", {"prompt": huge}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": huge}]}),
        ("/v1/responses", {"input": huge}),
    ):
        response = server.post(path, {"model": MODEL, "temperature": "adaptive"} | body)
        assert response.status_code == 400
        assert "maximum context length" in response.json()["error"]["message"]
    assert_answers(server)


def test_a_refusal_does_not_send_back_a_huge_field(server):
    part = json.dumps({"adaptive": {"x" * 1_000_000: 1}, "temperature": "adaptive"})[1:-1]
    response = send(server, "/v1/completions", part)
    assert response.status_code == 400
    assert len(response.content) < 2000


def test_a_crowd_of_bad_requests_disturbs_nobody(server):
    alone = send(server, "/v1/completions", '"temperature": 0').json()["choices"]
    with ThreadPoolExecutor(32) as pool:
        bad = [
            pool.submit(send, server, [*PATHS][number % 3], WRONG[number % len(WRONG)][0])
            for number in range(100)
        ]
        good = pool.submit(send, server, "/v1/completions", '"temperature": 0')
    assert {future.result().status_code for future in bad} == {400}
    assert good.result().json()["choices"] == alone
    assert_answers(server)
