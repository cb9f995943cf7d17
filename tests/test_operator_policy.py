import json

import pytest

from adaptive_head.operator_policy import (
    bound_options,
    check_marker,
    fill_in,
    make_constant,
    read_policy,
)
from adaptive_head.options import AdaptiveRequest, OptionError, parse_request, resolve_options
from adaptive_head.vllm.settings import AdaptiveSettings, read_settings
from tests.test_options import HEADS, resolve, tokenize


def merge(policy, request):
    """The options of a request on a server with this policy."""
    filled = fill_in(parse_request(request), read_policy(policy))
    return resolve_options(filled, HEADS, "default", tokenize)


@pytest.mark.parametrize("name", ["head", "entropy", "schedule", "two_phase", "constant"])
def test_a_policys_name_is_the_policy_with_its_default_parameters(name):
    assert merge(name, {}) == resolve({"policy": name})


POLICY = {
    "policy": "entropy",
    "entropy": {"t0": 0.8, "theta": 0.3},
    "level": "sequence",
    "min": 0.2,
    "max": 0.9,
    "scale": 0.5,
    "report": "none",
}


@pytest.mark.parametrize(
    ("request_", "changed"),
    [
        ({}, {}),
        ({"report": "tokens"}, {}),
        ({"min": 0.1}, {"min": 0.1}),
        ({"max": 1.5, "scale": 2.0}, {"max": 1.5, "scale": 2.0}),
        ({"level": "token"}, {"level": "token"}),
        ({"entropy": {"t0": 0.4}}, {"entropy": {"t0": 0.4, "theta": 0.3}}),
        ({"min": None, "head": None, "entropy": None}, {}),
        ({"max": 0.1}, {"min": None, "max": 0.1}),
        ({"min": 0.95}, {"min": 0.95, "max": None}),
    ],
)
def test_what_a_request_sets_stays_and_the_policy_completes_it(request_, changed):
    assert merge(POLICY, request_) == resolve(POLICY | changed)


def test_the_report_of_a_request_stays():
    policy = read_policy(POLICY)
    assert fill_in(parse_request({}), policy).report == "none"
    assert fill_in(parse_request({"report": "tokens"}), policy).report == "tokens"


@pytest.mark.parametrize(
    "request_",
    [
        {"policy": "head"},
        {"policy": "entropy"},
        {"policy": "constant", "constant": {"temperature": 0.1}},
        {"head": "whole"},
        {"head": "default", "max": 0.4},
    ],
)
def test_a_request_that_chooses_a_policy_or_a_head_gets_nothing_of_the_operators(request_):
    assert merge(POLICY, request_) == resolve(request_)


def test_parameters_of_another_policy_are_the_clients_mistake():
    with pytest.raises(OptionError, match="goes with policy constant, not entropy") as caught:
        merge("entropy", {"constant": {"temperature": 0.1}})
    assert caught.value.field == "constant"


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ("warm", "", "must be one of head, entropy, schedule, two_phase, constant"),
        (5, "", '{"policy": "constant"'),
        (["entropy"], "", "got list"),
        ({"policy": "warm"}, "policy", "'entropy'"),
        ({"policy": "entropy", "entropy": {"t0": 99}}, "entropy.t0", "less than or equal to 10"),
        ({"policy": "entropy", "entropy": {"T0": 1}}, "entropy.T0", "the fields are t0, theta"),
        ({"entropy": {"t0": 1}}, "entropy", "goes with policy entropy, not head"),
        ({"policy": "constant", "select": "mean"}, "select", "goes with policy head"),
        ({"policy": "constant", "min": 0.5, "max": 0.4}, "min", "above max 0.4"),
        ({"policy": "schedule", "level": "sequence"}, "level", "token only"),
        ({"head": "mine"}, "head", "--default-head"),
        ({"level": "token"}, "level", "one level only"),
        ({"abstain": True}, "abstain", "may only be false"),
        ({"policy": "constant", "abstain": True}, "abstain", "goes with policy head"),
    ],
)
def test_a_wrong_policy_is_refused_with_its_field(value, field, words):
    with pytest.raises(OptionError) as caught:
        read_policy(value)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_a_marker_must_suit_the_tokenizer():
    policy = read_policy({"policy": "two_phase", "two_phase": {"marker": "</nine>"}})
    with pytest.raises(ValueError, match=r"--adaptive-policy: two_phase\.marker: .* is 9 tokens"):
        check_marker(policy, tokenize)
    with pytest.raises(ValueError, match="--adaptive-policy: policy: two_phase needs a tokenizer"):
        check_marker(read_policy("two_phase"), None)
    check_marker(read_policy("two_phase"), tokenize)
    check_marker(read_policy("head"), None)


@pytest.mark.parametrize("policy", [{}, {"policy": "constant"}, {"policy": "entropy", "max": 0.8}])
def test_no_policy_may_exceed_the_highest_temperature(policy):
    options = resolve(policy)
    assert bound_options(options, None) == options
    assert bound_options(options, 0.7).max == 0.7
    assert bound_options(resolve(policy | {"max": 0.3}), 0.7).max == 0.3
    with pytest.raises(OptionError, match=r"at most 0.4 \(--adaptive-max of the server\), got 0.5"):
        bound_options(resolve(policy | {"min": 0.5}), 0.4)
    assert bound_options(resolve(policy | {"min": 0.5}), 0.5).max == 0.5


def test_a_constant_has_no_bounds_and_no_scale():
    asked = {"policy": "constant", "constant": {"temperature": 0.6}}
    assert make_constant(0.6) == resolve(asked)


@pytest.mark.parametrize("value", [None, "entropy", POLICY, {"scale": 0.5, "select": "mean"}])
def test_a_policy_survives_its_way_to_the_processes(value):
    settings = AdaptiveSettings.model_validate({"adaptive_policy": value, "adaptive_max": 1})
    sent = json.loads(json.dumps({"adaptive": settings.model_dump(mode="json")}))
    arrived = read_settings(sent)
    assert arrived.adaptive_max == 1.0
    expected = None if value is None else read_policy(value)
    assert arrived.adaptive_policy == expected
    assert isinstance(expected, AdaptiveRequest | None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"adaptive_policy": "warm"}, "adaptive.adaptive_policy: must be one of head, entropy"),
        (
            {"adaptive_policy": {"policy": "entropy", "entropy": {"t0": 99}}},
            "adaptive.adaptive_policy: entropy.t0: Input should be",
        ),
        ({"adaptive_max": 11}, "adaptive.adaptive_max: Input should be"),
        ({"adaptive_max": "warm"}, "adaptive.adaptive_max: Input should be"),
        (
            {"adaptive_policy": {"min": 0.5}, "adaptive_max": 0.4},
            "--adaptive-policy: min: must be at most 0.4, the --adaptive-max, got 0.5",
        ),
    ],
)
def test_wrong_settings_are_refused_with_their_field(fields, words):
    with pytest.raises(ValueError) as caught:
        read_settings({"adaptive": fields})
    assert words in str(caught.value)
