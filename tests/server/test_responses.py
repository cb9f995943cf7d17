"""The Responses API: what an answer and its events say of the temperature, and when it says no."""

import json
import time
from contextlib import nullcontext

import pytest
from vllm.exceptions import VLLMValidationError

from server.responses import write_events
from tests.server.conftest import HANG_S, MODEL
from tests.server.fakes import make_report

PATH = "/v1/responses"
BODY = {"model": MODEL, "input": "Hi", "max_output_tokens": 6}
ADAPTIVE = {"temperature": "adaptive", "adaptive": {"policy": "schedule", "report": "tokens"}}

WAYS = [{}, {"stream": True}, {"background": True, "store": True}]


def read_events(server, **fields) -> list[dict]:
    with server.http.stream("POST", PATH, json=BODY | {"stream": True} | fields) as response:
        assert response.is_success, response.read()
        lines = [*response.iter_lines()]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def ask(server, **fields) -> dict:
    response = server.post(PATH, BODY | fields)
    assert response.is_success, response.text
    return response.json()


def test_an_adaptive_answer_has_no_one_temperature(mock_server):
    answer = ask(mock_server, **ADAPTIVE, store=True)
    assert answer["temperature"] is None and answer["adaptive"]["policy"] == "schedule"
    stored = mock_server.get(f"{PATH}/{answer['id']}").json()
    assert stored["temperature"] is None
    assert ask(mock_server, temperature=0.5)["temperature"] == 0.5
    assert ask(mock_server, temperature=1.0)["temperature"] == 1.0


def test_an_adaptive_answer_in_the_background_has_none_either(mock_server):
    answer = ask(mock_server, **ADAPTIVE, store=True, background=True)
    deadline = time.monotonic() + HANG_S
    while answer["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        assert answer["temperature"] is None
        answer = mock_server.get(f"{PATH}/{answer['id']}").json()
    assert answer["temperature"] is None and answer["adaptive"]["tokens"] > 0


def test_no_event_has_a_temperature_and_one_has_the_last_tokens(mock_server):
    # Without a word there is no text, and so no event of one.
    events = read_events(mock_server, **ADAPTIVE, ignore_eos=True)
    shown = [event["response"]["temperature"] for event in events if "response" in event]
    assert shown == [None] * 3
    assert events[0]["type"] == "response.created"
    listed = [
        temperature
        for event in events
        for temperature in (event.get("adaptive") or {}).get("temperatures", ())
    ]
    assert listed == events[-1]["response"]["adaptive"]["temperatures"]
    ordinary = read_events(mock_server, temperature=0.5)
    shown = [event["response"]["temperature"] for event in ordinary if "response" in event]
    assert shown == [0.5] * 3


def test_the_last_token_which_is_no_text_is_on_the_text_s_end(mock_server):
    for seed in range(20):
        events = read_events(mock_server, **ADAPTIVE, max_output_tokens=60, seed=seed)
        (done,) = [event for event in events if event["type"] == "response.output_text.done"]
        if events[-1]["response"]["status"] == "completed":
            break
    assert len(done["adaptive"]["temperatures"]) == 1


@pytest.mark.parametrize("temperature", ["adaptive", 0.5])
@pytest.mark.parametrize(
    "how", [{}, {"stream": True}, {"background": True, "store": True}], ids=str
)
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"truncation": None}, "truncation"),
        ({"stop_token_ids": [-2]}, "stop_token_ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ],
)
def test_a_client_s_mistake_is_a_400_before_the_answer_begins(
    mock_server, how, fields, field, temperature
):
    response = mock_server.post(PATH, BODY | {"temperature": temperature} | how | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert field in f"{error['param']} {error['message']}"


async def test_a_mistake_that_is_found_late_is_not_called_the_server_s():
    async def refused():
        raise VLLMValidationError("a bad grammar", parameter="structured_outputs")
        yield

    (event,) = [e async for e in write_events(refused(), make_report(), False, nullcontext())]
    assert (event.code, event.message) == ("invalid_request_error", "a bad grammar")
    assert event.param == "structured_outputs"
