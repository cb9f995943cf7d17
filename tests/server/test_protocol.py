import json

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

from adaptive_head.options import EXTRA_ARGS_KEY, AdaptiveRequest
from server.protocol import (
    AdaptiveChatCompletionRequest,
    AdaptiveCompletionRequest,
    AdaptiveResponsesRequest,
)
from tests.server.fakes import make_report

CHAT = (
    AdaptiveChatCompletionRequest,
    ChatCompletionRequest,
    {"messages": [{"role": "user", "content": "hi"}]},
)
COMPLETION = (AdaptiveCompletionRequest, CompletionRequest, {"prompt": "hi"})
RESPONSES = (AdaptiveResponsesRequest, ResponsesRequest, {"input": "hi"})


@pytest.fixture(params=[CHAT, COMPLETION, RESPONSES], ids=["chat", "completion", "responses"])
def kinds(request):
    """Our request's class, vLLM's, and the smallest body of one."""
    return request.param


def parse(kinds, **fields):
    ours, _, body = kinds
    return ours.model_validate(body | fields)


def refuse(kinds, **fields) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as caught:
        parse(kinds, **fields)
    return caught.value


@pytest.mark.parametrize(
    ("sent", "understood"),
    [(0.7, 0.7), (1, 1.0), (0, 0.0), ("0.5", 0.5), ("adaptive", "adaptive"), (None, None)],
)
def test_temperature_is_a_number_a_number_as_text_adaptive_or_null(kinds, sent, understood):
    assert parse(kinds, temperature=sent).temperature == understood


def test_temperature_may_be_left_out(kinds):
    assert parse(kinds).temperature is None


@pytest.mark.parametrize(
    "sent",
    [
        '"adaptve"',
        '"Adaptive"',
        '""',
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        '"nan"',
        '"inf"',
        "true",
        "false",
        "[]",
        "[0.5]",
        "{}",
        '{"adaptive": 1}',
        "1" + "0" * 400,
    ],
)
def test_every_other_temperature_is_refused_by_name(kinds, sent):
    error = refuse(kinds, temperature=json.loads(sent))
    assert error.parameter == "temperature"
    assert '"adaptive"' in str(error)


def test_refusal_of_a_huge_temperature_is_short(kinds):
    assert len(str(refuse(kinds, temperature="x" * 1_000_000))) < 300


@pytest.mark.parametrize("sent", [{}, {"level": "token"}, {"policy": "entropy", "entropy": {}}])
def test_adaptive_is_an_object(kinds, sent):
    assert parse(kinds, adaptive=sent).adaptive == AdaptiveRequest(**sent)


def test_adaptive_may_be_null_or_left_out(kinds):
    assert parse(kinds, adaptive=None).adaptive is None
    assert parse(kinds).adaptive is None


@pytest.mark.parametrize(
    ("sent", "parameter"),
    [
        (1, "adaptive"),
        (True, "adaptive"),
        ("token", "adaptive"),
        ([], "adaptive"),
        ({"lvl": "token"}, "adaptive.lvl"),
        ({"level": "word"}, "adaptive.level"),
        ({"scale": "2"}, "adaptive.scale"),
        ({"min": float("nan")}, "adaptive.min"),
        ({"entropy": {"t": 1}}, "adaptive.entropy.t"),
        ({"two_phase": {"marker": ""}}, "adaptive.two_phase.marker"),
    ],
)
def test_a_wrong_adaptive_object_is_refused_by_the_path_of_the_field(kinds, sent, parameter):
    assert refuse(kinds, temperature="adaptive", adaptive=sent).parameter == parameter


def test_refusal_of_a_field_with_a_huge_name_is_short(kinds):
    error = refuse(kinds, adaptive={"x" * 1_000_000: 1})
    assert len(str(error)) < 1000
    assert error.parameter.startswith("adaptive.xxx")


@pytest.mark.parametrize("sent", [{"adaptive": "x"}, {"adaptive": 1, "other": 2}])
def test_the_key_that_carries_options_to_the_engine_cannot_be_sent(kinds, sent):
    assert refuse(kinds, vllm_xargs=sent).parameter == "vllm_xargs.adaptive"


@pytest.mark.parametrize("sent", [5, True, "adaptive", ["adaptive"]])
def test_vllm_xargs_of_a_wrong_type_is_left_to_vllm_to_refuse(kinds, sent):
    ours, stock, body = kinds
    with pytest.raises(ValueError) as expected:
        stock.model_validate(body | {"vllm_xargs": sent})
    with pytest.raises(ValueError) as found:
        ours.model_validate(body | {"vllm_xargs": sent})
    assert [e["loc"] for e in found.value.errors()] == [e["loc"] for e in expected.value.errors()]


def test_every_field_of_vllms_request_is_kept(kinds):
    ours, stock, _ = kinds
    for name, field in stock.model_fields.items():
        kept = ours.model_fields[name]
        if name != "temperature":
            assert (kept.annotation, kept.default) == (field.annotation, field.default)
            assert kept.metadata == field.metadata
    assert ours.model_fields.keys() - stock.model_fields.keys() == {"adaptive"}


def test_vllms_own_class_does_not_learn_our_fields(kinds):
    _, stock, body = kinds
    parse(kinds, adaptive={})
    stock.model_validate(body)
    assert "adaptive" not in stock.field_names


def to_params(request, defaults=None):
    return request.to_sampling_params(16, defaults or {})


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.4}, {"temperature": 0}, {"top_p": 0.5, "vllm_xargs": {"other": 1}}],
)
def test_an_ordinary_request_has_vllms_sampling_parameters(kinds, fields):
    _, stock, body = kinds
    expected = to_params(stock.model_validate(body | fields), {"temperature": 0.2})
    found = to_params(parse(kinds, **fields), {"temperature": 0.2})
    # A watermark's key and the like are no part of a parameter's equality, so compare the text.
    assert repr(found) == repr(expected)
    assert found.extra_args == expected.extra_args


def test_an_adaptive_request_is_sampled_at_one_whatever_the_servers_default(kinds):
    request = parse(kinds, temperature="adaptive")
    request.begin_report(make_report())
    params = to_params(request, {"temperature": 0.0, "top_k": 5})
    assert (params.temperature, params.top_k) == (1.0, 5)


def test_an_adaptive_request_carries_its_options_beside_other_xargs(kinds):
    request = parse(kinds, temperature="adaptive", vllm_xargs={"other": 1})
    report = make_report()
    request.begin_report(report)
    extra_args = to_params(request).extra_args
    assert extra_args == {"other": 1} | report.options.to_extra_args()
    assert type(extra_args[EXTRA_ARGS_KEY]) is dict
    assert request.vllm_xargs == {"other": 1}


def test_only_completions_take_many_prompts(kinds):
    request = parse(kinds)
    assert request.takes_many_prompts == isinstance(request, CompletionRequest)


def test_a_request_says_nothing_of_its_report_when_dumped(kinds):
    request = parse(kinds, temperature="adaptive")
    request.begin_report(make_report())
    assert "report" not in "".join(request.model_dump())
    assert request.model_copy().report is request.report
