import pytest
from vllm.exceptions import VLLMValidationError

from adaptive_head.operator_policy import make_constant, read_policy
from server.admission import admit
from server.heads import Canary
from server.protocol import AdaptiveChatCompletionRequest, AdaptiveCompletionRequest
from server.report import current_report
from tests.server.fakes import ADAPTER, MODEL, make_http_request, make_state


def make_request(**fields):
    body = {"model": MODEL, "prompt": "hi"}
    return AdaptiveCompletionRequest.model_validate(body | fields)


def try_admit(state=None, **fields):
    """The request after admission, and whether it is adaptive."""
    request = make_request(**fields)
    admit(request, make_http_request(state or make_state()))
    return request, request.report is not None


def refuse(state=None, **fields) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as caught:
        try_admit(state, **fields)
    return caught.value


@pytest.mark.parametrize("temperature", [None, 0.0, 0.7, "1.5"])
def test_an_ordinary_request_passes_unchanged(temperature):
    request, is_adaptive = try_admit(temperature=temperature)
    assert not is_adaptive
    unchanged = make_request(temperature=temperature, request_id=request.request_id)
    assert request == unchanged
    assert request.report is None


def test_temperature_adaptive_asks_for_the_default_head():
    request, is_adaptive = try_admit(temperature="adaptive")
    assert is_adaptive
    assert (request.report.options.policy, request.report.options.name) == ("head", "tok")
    assert request.temperature == 1.0


def test_an_adaptive_object_alone_asks_for_it_too():
    request, is_adaptive = try_admit(adaptive={"head": "seq"})
    assert is_adaptive
    assert (request.report.options.name, request.report.options.level) == ("seq", "sequence")


@pytest.mark.parametrize("temperature", [None, "adaptive", 0.3])
@pytest.mark.parametrize("name", [MODEL, "smol-2"])
def test_a_models_adaptive_name_asks_for_it_whatever_the_temperature(name, temperature):
    request, is_adaptive = try_admit(model=f"{name}:adaptive", temperature=temperature)
    assert is_adaptive
    assert request.model == name
    assert request.temperature == 1.0


@pytest.mark.parametrize("name", ["other:adaptive", f"{MODEL}:adaptive:adaptive", ":adaptive"])
def test_an_unknown_name_is_left_to_vllm_to_refuse(name):
    request, is_adaptive = try_admit(model=name)
    assert not is_adaptive
    assert request.model == name


def test_a_model_served_under_a_name_that_ends_like_that_keeps_it():
    state = make_state(served_names=("odd:adaptive",))
    assert try_admit(state, model="odd:adaptive")[1] is False
    request, is_adaptive = try_admit(state, model="odd:adaptive:adaptive")
    assert (request.model, is_adaptive) == ("odd:adaptive", True)


def test_a_request_may_leave_the_model_out():
    request, is_adaptive = try_admit(model=None, temperature="adaptive")
    assert (request.model, is_adaptive) == (None, True)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(None, True), ("adaptive", True), (0.7, False), (0.0, False)]
)
def test_an_operator_can_make_requests_without_a_temperature_adaptive(temperature, expected):
    state = make_state(adaptive_by_default=True)
    assert try_admit(state, temperature=temperature)[1] is expected


@pytest.mark.parametrize("by_default", [False, True])
def test_a_number_and_an_adaptive_object_contradict_each_other(by_default):
    error = refuse(make_state(adaptive_by_default=by_default), temperature=0.5, adaptive={})
    assert error.parameter == "temperature"
    assert "0.5" in str(error)


def test_a_wrong_option_is_refused_with_its_path_and_the_loaded_heads():
    error = refuse(temperature="adaptive", adaptive={"head": "gone"})
    assert error.parameter == "adaptive.head"
    assert "seq, tok" in str(error)


def test_without_heads_only_the_policies_work():
    state = make_state(heads={})
    assert refuse(state, temperature="adaptive").parameter == "adaptive.head"
    assert try_admit(state, adaptive={"policy": "entropy"})[1]


def test_a_head_does_not_serve_an_adapter():
    error = refuse(model=ADAPTER, temperature="adaptive")
    assert error.parameter == "model"
    assert ADAPTER in str(error) and MODEL in str(error)


@pytest.mark.parametrize("policy", ["entropy", "schedule", "two_phase", "constant"])
def test_a_policy_serves_an_adapter(policy):
    assert try_admit(model=ADAPTER, adaptive={"policy": policy})[1]


def test_an_ordinary_request_to_an_adapter_passes():
    assert not try_admit(model=ADAPTER, temperature=0.7)[1]


def test_beam_search_is_refused_only_for_adaptive_requests():
    error = refuse(temperature="adaptive", use_beam_search=True)
    assert error.parameter == "use_beam_search"
    assert not try_admit(temperature=0.0, use_beam_search=True)[1]


@pytest.mark.parametrize(("fields", "num_choices"), [({}, 1), ({"n": 3}, 3)])
def test_the_report_has_a_place_for_every_choice_of_every_prompt(fields, num_choices):
    report = try_admit(temperature="adaptive", **fields)[0].report
    for _ in range(2):
        report.begin_prompt()
    assert report[2 * num_choices - 1]
    with pytest.raises(IndexError):
        report[2 * num_choices]


def test_a_chat_without_a_number_of_answers_has_one():
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": "adaptive", "n": None}
    request = AdaptiveChatCompletionRequest.model_validate(body)
    admit(request, make_http_request(make_state()))
    request.report.begin_prompt()
    with pytest.raises(IndexError):
        request.report[1]


def test_an_adaptive_request_is_the_current_one_and_holds_its_head():
    state = make_state()
    head = state.heads.by_name["tok"]
    request, _ = try_admit(state, temperature="adaptive")
    assert current_report() is request.report
    assert head.num_holders == 1
    try_admit(state, adaptive={"policy": "entropy"})
    refuse(state, adaptive={"head": "tok", "level": "word"})
    assert head.num_holders == 1


@pytest.mark.parametrize("detail", ["none", "summary", "tokens"])
def test_the_report_is_as_detailed_as_asked(detail):
    assert try_admit(adaptive={"report": detail})[0].report.detail == detail


def test_what_the_default_cannot_serve_stays_ordinary():
    state = make_state(adaptive_by_default=True)
    assert try_admit(state)[1]
    assert not try_admit(state, model=ADAPTER)[1]
    assert not try_admit(state, use_beam_search=True)[1]


def test_a_seed_leaves_room_for_every_choice():
    """Beyond int64 vLLM's worker raises, which ends the engine."""
    largest = (1 << 63) - 1
    assert try_admit(temperature="adaptive", seed=largest)[1]
    assert try_admit(temperature="adaptive", seed=largest - 2, n=3)[1]
    error = refuse(temperature="adaptive", seed=largest - 1, n=3)
    assert error.parameter == "seed"
    assert str(largest - 2) in str(error)


ENTROPY = read_policy({"policy": "entropy", "entropy": {"t0": 0.8, "theta": 0.3}, "scale": 0.5})


def test_the_servers_policy_answers_where_a_request_chooses_none():
    state = make_state(heads={}, policy=ENTROPY)
    for fields in ({"temperature": "adaptive"}, {"model": f"{MODEL}:adaptive"}, {"adaptive": {}}):
        options = try_admit(state, **fields)[0].report.options
        assert (options.policy, options.parameters, options.scale) == ("entropy", (0.8, 0.3), 0.5)
    report = try_admit(state, adaptive={"report": "tokens", "max": 0.4})[0].report
    assert (report.detail, report.options.max, report.options.scale) == ("tokens", 0.4, 0.5)


def test_a_request_may_choose_another_policy_or_a_head():
    state = make_state(policy=ENTROPY)
    for adaptive, name in [
        ({"head": "seq"}, "seq"),
        ({"policy": "head"}, "tok"),
        ({"policy": "constant"}, "constant"),
    ]:
        options = try_admit(state, adaptive=adaptive)[0].report.options
        assert (options.name, options.scale) == (name, 1.0)


def test_a_policy_without_a_head_serves_adapters_by_default_too():
    state = make_state(adaptive_by_default=True, policy=ENTROPY)
    assert try_admit(state, model=ADAPTER)[1]
    assert not try_admit(state, use_beam_search=True)[1]


@pytest.mark.parametrize(
    ("adaptive", "expected"),
    [({}, 0.8), ({"max": 0.5}, 0.5), ({"max": 2.0}, 0.8), ({"policy": "constant"}, 0.8)],
)
def test_no_adaptive_temperature_is_above_the_highest(adaptive, expected):
    state = make_state(max_temperature=0.8)
    assert try_admit(state, adaptive=adaptive)[0].report.options.max == expected


def test_a_canary_is_bounded_too():
    state = make_state(max_temperature=0.8)
    state.heads.set_canary("tok", Canary("seq", 100.0))
    options = try_admit(state, temperature="adaptive")[0].report.options
    assert (options.name, options.max) == ("seq", 0.8)


def test_a_lowest_temperature_above_the_highest_is_refused_and_a_fixed_one_is_not():
    state = make_state(max_temperature=0.8)
    error = refuse(state, adaptive={"min": 0.9})
    assert error.parameter == "adaptive.min"
    assert "at most 0.8 (--adaptive-max of the server), got 0.9" in str(error)
    request, is_adaptive = try_admit(state, temperature=1.5)
    assert (request.temperature, is_adaptive) == (1.5, False)


@pytest.mark.parametrize(
    "adaptive", [{}, {"head": "seq", "max": 0.1}, {"policy": "entropy", "scale": 3.0}]
)
def test_an_override_answers_every_adaptive_request_and_no_other(adaptive):
    state = make_state()
    state.heads.override = make_constant(0.6)
    report = try_admit(state, adaptive=adaptive)[0].report
    assert report.options == make_constant(0.6)
    report.begin_prompt()
    described = report[0].describe(show_tokens=False)
    assert (described["policy"], described["head"], described["override"]) == (
        "constant",
        None,
        True,
    )
    assert all(head.num_holders == 0 for head in state.heads)
    assert try_admit(state, temperature=0.3)[0].temperature == 0.3
    state.heads.override = None
    report = try_admit(state, adaptive=adaptive)[0].report
    report.begin_prompt()
    assert "override" not in report[0].describe(show_tokens=False)


def test_a_request_for_the_overrides_own_constant_is_marked_while_it_is_on():
    adaptive = {"policy": "constant", "constant": {"temperature": 0.6}}
    state = make_state()
    assert not try_admit(state, adaptive=adaptive)[0].report.is_override
    state.heads.override = make_constant(0.6)
    assert try_admit(state, adaptive=adaptive)[0].report.is_override


def test_an_override_accepts_what_is_accepted_without_it():
    state = make_state()
    state.heads.override = make_constant(0.6)
    assert refuse(state, adaptive={"head": "gone"}).parameter == "adaptive.head"
    assert refuse(state, model=ADAPTER, temperature="adaptive").parameter == "model"
