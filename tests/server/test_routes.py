"""Every route takes the adaptive name, and every route that generates serves adaptive requests."""

import json

import pytest

from tests.server.conftest import MODEL

NAME = f"{MODEL}:adaptive"
MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPERATURES = {0.0, 0.3, 0.7, 1.0, 1.3}
MESSAGES_PATH, BATCH_PATH = "/v1/messages", "/v1/chat/completions/batch"
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    MESSAGES_PATH: {"messages": MESSAGES, "max_tokens": 4},
    BATCH_PATH: {"messages": [MESSAGES, MESSAGES], "max_tokens": 4, "ignore_eos": True},
}
# SageMaker's one route for chats and completions.
INVOCATIONS = ["/v1/chat/completions", "/v1/completions"]
OTHERS = {
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
}
ADAPTIVE = {"temperature": "adaptive", "adaptive": {"head": "tok", "report": "tokens"}}


def ask(server, path, **fields):
    response = server.post(path, {"model": MODEL} | fields)
    assert response.is_success, response.text
    return response.json()


def find_summaries(answer) -> list[dict]:
    """Those of an answer in any form, on itself or on its choices."""
    return [part["adaptive"] for part in answer.get("choices", [answer]) if "adaptive" in part]


@pytest.mark.parametrize("path", BODIES | OTHERS)
def test_every_route_takes_the_adaptive_name(mock_server, path):
    answer = ask(mock_server, path, **(BODIES | OTHERS)[path], model=NAME)
    summaries = find_summaries(answer)
    assert all(summary["head"] == "tok" for summary in summaries)
    assert len(summaries) == (0 if path in OTHERS else len(answer.get("choices", [answer])))


@pytest.mark.parametrize("path", INVOCATIONS)
def test_invocations_take_the_adaptive_name(mock_server, path):
    (summary,) = find_summaries(ask(mock_server, "/invocations", **BODIES[path], model=NAME))
    assert summary["head"] == "tok"


def test_the_adaptive_name_is_listed_as_a_child_and_in_the_404(mock_server):
    cards = {card["id"]: card for card in mock_server.get("/v1/models").json()["data"]}
    assert list(cards) == [MODEL, NAME]
    assert cards[NAME]["parent"] == MODEL and cards[MODEL]["parent"] is None
    missing = mock_server.post("/tokenize", {"model": "gone", "prompt": "Hi"})
    assert missing.status_code == 404
    assert NAME in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (MESSAGES_PATH, BODIES[MESSAGES_PATH]),
        (BATCH_PATH, BODIES[BATCH_PATH]),
        *(("/invocations", BODIES[path]) for path in INVOCATIONS),
    ],
    ids=["messages", "batch", "invoked chat", "invoked completion"],
)
class TestEachRoute:
    def test_it_serves_adaptive_requests(self, mock_server, path, body):
        before = mock_server.sum_metric("adaptive_temperature_count", head="tok")
        answer = ask(mock_server, path, **body, **ADAPTIVE)
        summaries = find_summaries(answer)
        assert len(summaries) == len(answer.get("choices", [answer]))
        for summary in summaries:
            assert summary["policy"] == "head" and summary["head"] == "tok"
            assert len(summary["temperatures"]) == summary["tokens"]
            assert set(summary["temperatures"]) <= TEMPERATURES
        num_tokens = sum(summary["tokens"] for summary in summaries)
        counted = mock_server.sum_metric("adaptive_temperature_count", head="tok") - before
        assert counted == num_tokens > 0

    def test_it_can_keep_its_temperatures_to_itself(self, mock_server, path, body):
        options = {"temperature": "adaptive", "adaptive": {"report": "none"}}
        assert not find_summaries(ask(mock_server, path, **body, **options))

    def test_its_ordinary_answers_are_ordinary(self, mock_server, path, body):
        before = mock_server.sum_metric("adaptive_requests_total")
        assert not find_summaries(ask(mock_server, path, **body, temperature=0.5))
        assert mock_server.sum_metric("adaptive_requests_total") == before

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"adaptive": {"head": "gone"}}, "adaptive.head"),
            ({"adaptive": {"lvl": "token"}}, "adaptive.lvl"),
            ({"temperature": 0.5, "adaptive": {}}, "temperature"),
            ({"temperature": "adaptve"}, "temperature"),
            ({"temperature": "adaptive", "top_p": "wide"}, "top_p"),
            ({"vllm_xargs": {"adaptive": 1}}, "vllm_xargs.adaptive"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_is_wrong_is_a_400_that_names_the_field(
        self, mock_server, path, body, fields, field
    ):
        response = mock_server.post(path, {"model": MODEL} | body | fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert field in (error.get("param") or error["message"])


def test_a_messages_error_has_anthropics_form(mock_server):
    body = BODIES[MESSAGES_PATH] | {"model": MODEL, "adaptive": {"head": "gone"}}
    found = mock_server.post(MESSAGES_PATH, body).json()
    assert found["type"] == "error"
    assert found["error"]["message"].startswith("adaptive.head: unknown head 'gone'")


@pytest.mark.parametrize("detail", ["summary", "tokens"])
def test_a_messages_stream_ends_with_its_summary(mock_server, detail):
    adaptive = {"policy": "schedule", "schedule": {"tokens": 4}, "report": detail}
    body = BODIES[MESSAGES_PATH] | {"model": MODEL, "stream": True}
    events = []
    body |= {"temperature": "adaptive", "adaptive": adaptive}
    with mock_server.http.stream("POST", MESSAGES_PATH, json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    shown = {event["type"]: event["adaptive"] for event in events if "adaptive" in event}
    summary = shown["message_delta"]
    assert summary["policy"] == "schedule" and summary["tokens"] > 0
    temperatures = [
        temperature
        for event in events
        for temperature in event.get("adaptive", {}).get("temperatures", ())
    ]
    assert len(temperatures) == (summary["tokens"] if detail == "tokens" else 0)
    assert events[-1]["type"] == "message_stop"


def test_invocations_of_a_header_s_model_are_of_that_model(mock_server):
    body = json.dumps(BODIES["/v1/completions"] | {"model": MODEL, "temperature": 0.5})
    headers = {"content-type": "application/json", "X-Amzn-SageMaker-Adapter-Identifier": "gone"}
    missing = mock_server.http.post("/invocations", content=body, headers=headers)
    assert missing.status_code == 404, missing.text
    headers["X-Amzn-SageMaker-Adapter-Identifier"] = NAME
    answer = mock_server.http.post("/invocations", content=body, headers=headers)
    assert len(find_summaries(answer.json())) == 1


def test_invocations_of_other_kinds_are_vllms(mock_server):
    for body, part in ((b"{", "JSON"), (b"[]", "JSON object"), (b'{"input": "Hi"}', "")):
        response = mock_server.post("/invocations", body)
        assert response.status_code == 400, response.text
        assert part in response.json()["error"]["message"]
