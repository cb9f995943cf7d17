"""The server as a user starts it, the real model, and the client library that users have."""

import json
import time

import pytest

from tests.server.conftest import HANG_S, MODEL, TEMPERATURES

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "Tell me about foxes."}]
TOKENS = {"adaptive": {"report": "tokens"}, "return_token_ids": True}
SHAPE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "introduce", "parameters": SHAPE, "strict": True}}


def summary_of(adaptive: dict) -> dict:
    return {key: value for key, value in adaptive.items() if key != "temperatures"}


def assert_sound(adaptive: dict, num_tokens: int) -> None:
    temperatures = adaptive["temperatures"]
    assert set(temperatures) <= set(TEMPERATURES)
    assert len(temperatures) == adaptive["tokens"] == num_tokens
    assert adaptive["mean"] == pytest.approx(sum(temperatures) / num_tokens, abs=1e-6)
    assert (adaptive["min"], adaptive["max"]) == (min(temperatures), max(temperatures))
    counts = {f"{value:g}": temperatures.count(value) for value in set(temperatures)}
    assert adaptive["histogram"] == counts


@pytest.fixture
def chat(client):
    def create(**options):
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "seed": 1}
        return client.chat.completions.create(**body | {"temperature": "adaptive"} | options)

    return create


@pytest.fixture
def complete(client):
    def create(**options):
        body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "seed": 1}
        return client.completions.create(**body | {"temperature": "adaptive"} | options)

    return create


@pytest.fixture
def respond(client):
    def create(**options):
        body = {"model": MODEL, "input": "Tell me a joke.", "max_output_tokens": 8}
        return client.responses.create(**body | {"temperature": "adaptive"} | options)

    return create


def collect(chunks) -> dict[int, dict]:
    """What the chunks say of each choice; each chunk lists the temperatures of its tokens."""
    answers = {}
    for chunk in chunks:
        for choice in chunk.choices:
            answer = answers.setdefault(choice.index, {"token_ids": [], "temperatures": []})
            token_ids = choice.model_extra.get("token_ids") or []
            adaptive = choice.model_extra.get("adaptive") or {}
            assert len(adaptive.get("temperatures", [])) == len(token_ids)
            answer["token_ids"] += token_ids
            answer["temperatures"] += adaptive.get("temperatures", [])
            if choice.finish_reason is not None:
                assert "summary" not in answer
                answer["summary"] = summary_of(adaptive)
    return answers


def expect(choices) -> dict[int, dict]:
    """The same of a blocking answer."""
    return {
        choice.index: {
            "token_ids": choice.model_extra["token_ids"],
            "temperatures": choice.model_extra["adaptive"]["temperatures"],
            "summary": summary_of(choice.model_extra["adaptive"]),
        }
        for choice in choices
    }


@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_says_what_its_temperatures_were(chat, n):
    answer = chat(n=n, extra_body=TOKENS)
    assert len(answer.choices) == n
    for choice in answer.choices:
        assert_sound(choice.model_extra["adaptive"], len(choice.model_extra["token_ids"]))
    total = sum(choice.model_extra["adaptive"]["tokens"] for choice in answer.choices)
    assert total == answer.usage.completion_tokens


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_is_the_blocking_one_token_by_token(chat, n):
    options = {"n": n, "extra_body": TOKENS, "max_tokens": 8}
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "adaptive" not in chunks[0].choices[0].model_extra
    assert chunks[-1].usage.completion_tokens == 8 * n
    assert collect(chunks) == expect(chat(**options).choices)


def test_streamed_prompts_with_choices_are_the_blocking_ones(complete):
    options = {"prompt": ["Once upon", "The capital of France"], "n": 2, "extra_body": TOKENS}
    assert collect(complete(stream=True, **options)) == expect(complete(**options).choices)


def test_a_stop_string_ends_the_temperatures_with_the_tokens(complete):
    options = {"stop": [" time", ","], "max_tokens": 24, "extra_body": TOKENS}
    (choice,) = complete(**options).choices
    assert choice.finish_reason == "stop"
    assert_sound(choice.model_extra["adaptive"], len(choice.model_extra["token_ids"]))
    assert collect(complete(stream=True, **options)) == expect([choice])


def test_logprobs_and_temperatures_are_of_the_same_tokens(complete, chat):
    (choice,) = complete(logprobs=1, extra_body=TOKENS).choices
    assert len(choice.logprobs.tokens) == len(choice.model_extra["adaptive"]["temperatures"])
    chunks = chat(logprobs=True, stream=True, extra_body={"adaptive": {"report": "tokens"}})
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.logprobs):
        assert len(choice.logprobs.content) == len(choice.model_extra["adaptive"]["temperatures"])


def test_a_report_is_a_summary_unless_asked_otherwise(chat):
    (choice,) = chat().choices
    assert choice.model_extra["adaptive"] == summary_of(choice.model_extra["adaptive"])
    (choice,) = chat(extra_body={"adaptive": {"report": "none"}}).choices
    assert "adaptive" not in choice.model_extra
    told = [c for chunk in chat(stream=True) for c in chunk.choices if "adaptive" in c.model_extra]
    assert [choice.finish_reason for choice in told] == ["length"]
    silent = chat(stream=True, extra_body={"adaptive": {"report": "none"}})
    assert not [c for chunk in silent for c in chunk.choices if "adaptive" in c.model_extra]


def test_an_ordinary_answer_says_nothing(chat, complete, respond):
    for choice in (chat(temperature=0.7).choices[0], complete(temperature=0.7).choices[0]):
        assert "adaptive" not in choice.model_extra
    assert "adaptive" not in respond(temperature=0.7).model_extra


def test_a_model_name_makes_clients_that_send_numbers_adaptive(chat):
    answer = chat(model=f"{MODEL}:adaptive", temperature=0.7)
    assert answer.choices[0].model_extra["adaptive"]["head"] == "tok"
    assert answer.model == f"{MODEL}:adaptive"


def test_a_sequences_temperature_is_chosen_once(chat):
    extra_body = {"adaptive": {"head": "seq", "report": "tokens"}}
    for choice in chat(n=3, extra_body=extra_body).choices:
        assert choice.model_extra["adaptive"]["level"] == "sequence"
        assert len(set(choice.model_extra["adaptive"]["temperatures"])) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"policy": "constant", "constant": {"temperature": 0.25}}, [0.25] * 4),
        ({"policy": "schedule", "schedule": {"start": 1, "end": 0, "tokens": 2}}, [1, 0.5, 0, 0]),
        ({"policy": "two_phase", "two_phase": {"thinking": 1.2}}, [1.2] * 4),
        ({"min": 0.5, "max": 0.5}, [0.5] * 4),
        ({"scale": 0.5, "max": 0.0}, [0.0] * 4),
    ],
)
def test_policies_and_bounds_do_as_they_say(complete, options, expected):
    extra_body = {"adaptive": options | {"report": "tokens"}, "ignore_eos": True}
    (choice,) = complete(max_tokens=4, extra_body=extra_body).choices
    assert choice.model_extra["adaptive"]["temperatures"] == expected


def test_structured_output_is_valid(chat):
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SHAPE}}
    (choice,) = chat(response_format=schema, max_tokens=160, extra_body=TOKENS).choices
    assert json.loads(choice.message.content).keys() == {"name", "age"}
    assert_sound(choice.model_extra["adaptive"], len(choice.model_extra["token_ids"]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_with_valid_arguments(chat, stream):
    choice = {"type": "function", "function": {"name": "introduce"}}
    options = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 160, "stream": stream}
    answer = chat(extra_body={"adaptive": {"report": "tokens"}}, **options)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
        arguments = "".join(call.function.arguments or "" for call in calls)
        told = [choice.model_extra.get("adaptive") or {} for choice in choices]
        num_listed = sum(len(adaptive.get("temperatures", ())) for adaptive in told)
        assert num_listed == told[-1]["tokens"]
    else:
        (call,) = answer.choices[0].message.tool_calls
        arguments = call.function.arguments
        assert_sound(answer.choices[0].model_extra["adaptive"], answer.usage.completion_tokens)
    assert json.loads(arguments).keys() == {"name", "age"}


def test_a_response_says_what_its_temperatures_were(respond):
    answer = respond(extra_body=TOKENS)
    assert_sound(answer.model_extra["adaptive"], answer.usage.output_tokens)


def assert_deltas_list_them(events) -> None:
    *events, last = events
    assert last.type == "response.completed"
    adaptive = last.response.model_extra["adaptive"]
    assert_sound(adaptive, last.response.usage.output_tokens)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    listed = [t for delta in deltas for t in delta.model_extra["adaptive"]["temperatures"]]
    # A token without text, such as the last, makes no delta.
    assert listed == adaptive["temperatures"][: len(listed)]
    assert len(listed) >= len(deltas) > 5


def test_a_streamed_response_lists_them_on_its_deltas(respond):
    assert_deltas_list_them(respond(stream=True, extra_body=TOKENS))


def test_a_background_stream_can_be_read_later(client, respond):
    with respond(stream=True, store=True, background=True, extra_body=TOKENS) as stream:
        name = next(iter(stream)).response.id
    assert_deltas_list_them(client.responses.retrieve(name, stream=True))


def test_stored_and_background_responses_say_it_too(client, respond):
    stored = respond(store=True)
    again = client.responses.retrieve(stored.id)
    assert again.model_extra["adaptive"] == stored.model_extra["adaptive"]
    background = respond(store=True, background=True)
    deadline = time.monotonic() + HANG_S
    while background.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        background = client.responses.retrieve(background.id)
    assert background.model_extra["adaptive"]["tokens"] == background.usage.output_tokens


def test_models_and_heads_are_listed(client, server):
    models = {model.id: model for model in client.models.list()}
    assert models.keys() == {MODEL, f"{MODEL}:adaptive"}
    heads = server.get("/v1/adaptive/heads").json()["data"]
    assert [(head["id"], head["level"], head["default"]) for head in heads] == [
        ("tok", "token", True),
        ("seq", "sequence", False),
    ]
    assert heads[0]["temperatures"] == list(TEMPERATURES)


def test_the_schema_describes_what_may_be_sent(server):
    schema = server.get("/openapi.json").json()
    assert "/v1/adaptive/heads" in schema["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].rsplit("/", 1)[1]
        properties = schema["components"]["schemas"][name]["properties"]
        assert {"const": "adaptive", "type": "string"} in properties["temperature"]["anyOf"]
        assert "AdaptiveRequest" in json.dumps(properties["adaptive"])
