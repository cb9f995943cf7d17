import contextlib
import dataclasses
import math
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_head.abstention import Abstention
from adaptive_head.options import OptionError, Options, parse_request, quote, resolve_options


class FakeHead(NamedTuple):
    level: str
    select: str = "argmax"
    abstain: Abstention | None = None


HEADS = {"default": FakeHead("token"), "whole": FakeHead("sequence")}
MARKERS = {
    "</think>": [7],
    "<think>": [6],
    "[/THINK]": [9],
    "</three>": [1, 2, 3],
    "<three>": [4, 3],
    "</eight>": [*range(8)],
    "<eight>": [*range(9)],
    "</nine>": [*range(9)],
    "</end>": [(1 << 31) - 1],
    "<end>": [],
    "</>": [],
}


def tokenize(marker: str) -> list[int]:
    return MARKERS.get(marker, [100, 101, 102])


def resolve(value, heads=HEADS, default_head="default", tokenizer=tokenize) -> Options:
    return resolve_options(parse_request(value), heads, default_head, tokenizer)


def refusal(value, **kwargs) -> OptionError:
    with pytest.raises(OptionError) as caught:
        resolve(value, **kwargs)
    return caught.value


VALID = [
    {"head": "default"},
    {"head": None},
    {"level": "token"},
    {"level": None},
    {"level": "sequence", "head": "whole"},
    {"policy": "head"},
    {"policy": "entropy"},
    {"policy": "schedule"},
    {"policy": "two_phase"},
    {"policy": "constant"},
    {"select": "argmax"},
    {"select": "sample"},
    {"select": "mean"},
    {"select": None},
    {"min": 0},
    {"min": 10.0},
    {"min": None},
    {"max": 0.0},
    {"max": 10},
    {"max": None},
    {"min": 0.5, "max": 0.5},
    {"scale": 10.0},
    {"scale": 1e-6},
    {"abstain": None},
    {"abstain": False},
    {"report": "none"},
    {"report": "summary"},
    {"report": "tokens"},
    {"policy": "entropy", "level": "sequence"},
    {"policy": "entropy", "entropy": {}},
    {"policy": "entropy", "entropy": {"t0": 0.0, "theta": 0.0}},
    {"policy": "entropy", "entropy": {"t0": 10.0, "theta": 100.0}},
    {"policy": "schedule", "schedule": {"start": 0, "end": 10, "tokens": 1}},
    {"policy": "schedule", "schedule": {"tokens": 10_000_000}},
    {"policy": "two_phase", "two_phase": {"thinking": 0.0, "answer": 10.0}},
    {"policy": "two_phase", "two_phase": {"marker": "[/THINK]"}},
    {"policy": "constant", "level": "sequence"},
    {"policy": "constant", "constant": {"temperature": 0.0}},
    {"policy": "constant", "constant": {"temperature": 10.0}},
    {"policy": "list", "list": {"temperatures": [0]}},
    {"policy": "list", "level": "token", "list": {"temperatures": [0.0, 10.0] * 2048}},
]


@pytest.mark.parametrize("value", VALID, ids=str)
def test_valid_options_resolve(value):
    assert isinstance(resolve(value), Options)


NOT_TEMPERATURES = [-0.01, 10.01, 1e300, 10**400, math.nan, math.inf, -math.inf, True, "0.5", [1.0]]
WRONG_TEXT = [0, True, 1.5, ["token"], {}, b"token"]

# A path in the request's `adaptive` object, the policy that it goes with, and wrong values.
INVALID = [
    ("head", "head", ["nobody", "", "entropy", "x" * 10_000, *WRONG_TEXT]),
    ("level", "head", ["", "Token", "sentence", *WRONG_TEXT]),
    ("policy", "head", ["", "HEAD", "learned", None, *WRONG_TEXT]),
    ("select", "head", ["", "greedy", *WRONG_TEXT]),
    ("report", "head", ["", "all", None, *WRONG_TEXT]),
    ("min", "head", NOT_TEMPERATURES),
    ("max", "head", NOT_TEMPERATURES),
    ("scale", "head", [0, 0.0, -1.0, None, *NOT_TEMPERATURES]),
    ("entropy", "entropy", [1.0, "1", [], True]),
    ("entropy.t0", "entropy", [None, *NOT_TEMPERATURES]),
    ("entropy.theta", "entropy", [-0.1, 100.1, math.nan, math.inf, True, None, "1", 10**400]),
    ("schedule", "schedule", [256, [], True]),
    ("schedule.start", "schedule", [None, *NOT_TEMPERATURES]),
    ("schedule.end", "schedule", [None, *NOT_TEMPERATURES]),
    ("schedule.tokens", "schedule", [0, -1, 10_000_001, 10**400, 2.5, math.nan, True, "9", None]),
    ("two_phase", "two_phase", ["</think>", [], True]),
    ("two_phase.thinking", "two_phase", [None, *NOT_TEMPERATURES]),
    ("two_phase.answer", "two_phase", [None, *NOT_TEMPERATURES]),
    ("two_phase.marker", "two_phase", ["", "x" * 65, "\ud800", None, 7, True, "</nine>", "</>"]),
    ("constant", "constant", [0.7, [], True]),
    ("constant.temperature", "constant", [None, *NOT_TEMPERATURES]),
    ("abstain", "head", [True, 1, 0.5, "true", {}, []]),
    ("list", "list", [None, [0.7], 0.7, True]),
    ("list.temperatures", "list", [None, [], 0.7, "0.7", {}, (0.7,), [0.7] * 4097]),
]


def at_path(path: str, policy: str, value) -> dict:
    parent, _, child = path.rpartition(".")
    return {"policy": policy} | ({parent: {child: value}} if parent else {path: value})


@pytest.mark.parametrize(
    ("path", "policy", "value"),
    [
        pytest.param(path, policy, value, id=f"{path}={value!r:.20}")
        for path, policy, values in INVALID
        for value in values
    ],
)
def test_an_invalid_value_is_refused_under_its_own_name(path, policy, value):
    error = refusal(at_path(path, policy, value))
    assert error.field == path
    assert 0 < len(str(error)) < 400


@pytest.mark.parametrize("value", [None, True, 1, "token", ["level", "token"], 1.5, b"{}"])
def test_adaptive_must_be_an_object(value):
    error = refusal(value)
    assert error.field == ""
    assert "must be an object" in str(error)


@pytest.mark.parametrize(
    ("value", "field", "known"),
    [
        ({"temprature": 1}, "temprature", "level"),
        ({"": 1}, "", "level"),
        ({"entropy": {"T0": 1}}, "entropy.T0", "t0, theta"),
        ({"schedule": {"length": 1}}, "schedule.length", "start, end, tokens"),
        ({"two_phase": {"final": 1}}, "two_phase.final", "thinking, answer, marker"),
        ({"constant": {"value": {"deep": []}}}, "constant.value", "temperature"),
    ],
)
def test_an_unknown_field_is_refused_with_the_known_ones(value, field, known):
    error = refusal(value)
    assert error.field == field
    assert "unknown field" in str(error)
    assert known in str(error)


@pytest.mark.parametrize(("value", "field"), [({1: 2}, "1"), ({"entropy": {1: 2}}, "entropy.1")])
def test_a_field_s_name_must_be_text(value, field):
    assert refusal(value).field == field


def test_the_defaults_are_the_default_head_at_its_own_level():
    assert resolve({}) == Options("head", "default", "token", "argmax", 1.0, 0.0, 10.0)
    assert resolve({}, default_head="whole").level == "sequence"


def test_everything_that_a_request_says_is_kept():
    value = {"head": "whole", "select": "sample", "min": 0.1, "max": 0.9, "scale": 1.5}
    assert resolve(value) == Options("head", "whole", "sequence", "sample", 1.5, 0.1, 0.9)


@pytest.mark.parametrize(
    ("value", "parameters"),
    [
        ({"policy": "entropy"}, (0.7, 1.0)),
        ({"policy": "entropy", "entropy": {"t0": 0.4, "theta": 3}}, (0.4, 3.0)),
        ({"policy": "schedule"}, (1.0, 0.3, 256.0)),
        ({"policy": "schedule", "schedule": {"start": 0.2, "end": 2, "tokens": 9}}, (0.2, 2.0, 9)),
        ({"policy": "two_phase"}, (1.0, 0.3)),
        ({"policy": "two_phase", "two_phase": {"thinking": 0.8, "answer": 0}}, (0.8, 0.0)),
        ({"policy": "constant"}, (0.7,)),
        ({"policy": "constant", "constant": {"temperature": 0.2}}, (0.2,)),
        ({"policy": "head"}, ()),
    ],
)
def test_parameters_stand_in_their_documented_order(value, parameters):
    options = resolve(value)
    assert options.parameters == parameters
    assert all(type(parameter) is float for parameter in options.parameters)


def test_a_policy_is_named_after_itself_and_needs_no_head():
    options = resolve({"policy": "entropy"}, heads={}, default_head=None)
    assert (options.name, options.level) == ("entropy", "token")


def test_a_level_that_the_head_was_not_made_for_is_refused():
    error = refusal({"level": "sequence"})
    assert error.field == "level"
    assert "'default' was made for level 'token'" in str(error)
    assert refusal({"level": "token", "head": "whole"}).field == "level"


@pytest.mark.parametrize("policy", ["schedule", "two_phase", "list"])
def test_a_policy_that_changes_along_the_answer_has_no_sequence_level(policy):
    given = {"list": {"list": {"temperatures": [0.7]}}}.get(policy, {})
    error = refusal({"policy": policy, "level": "sequence"} | given)
    assert error.field == "level"
    assert policy in str(error)


def test_an_unknown_head_is_refused_with_the_loaded_ones():
    error = refusal({"head": "nobody"})
    assert error.field == "head"
    assert "'nobody'" in str(error)
    assert "default, whole" in str(error)


def test_without_a_head_the_policies_are_offered():
    error = refusal({}, heads={}, default_head=None)
    assert error.field == "head"
    assert "entropy, schedule, two_phase, constant" in str(error)
    assert "loaded: none" in str(refusal({"head": "x"}, heads={}, default_head=None))


def test_min_above_max_is_refused():
    error = refusal({"min": 0.9, "max": 0.2})
    assert error.field == "min"
    assert "0.9" in str(error)
    assert "0.2" in str(error)


@pytest.mark.parametrize("own", ["argmax", "sample", "mean"])
def test_a_request_without_select_gets_the_heads_own(own):
    heads = {"default": FakeHead("token", own)}
    assert resolve({}, heads).select == resolve({"select": None}, heads).select == own
    for asked in ("argmax", "sample", "mean"):
        assert resolve({"select": asked}, heads).select == asked


@pytest.mark.parametrize(
    ("value", "is_continuous"),
    [
        ({}, False),
        ({"select": "sample"}, False),
        ({"select": "mean"}, True),
        ({"policy": "entropy"}, True),
        ({"policy": "schedule"}, True),
        ({"policy": "two_phase"}, False),
        ({"policy": "constant"}, False),
        ({"policy": "list", "list": {"temperatures": [0.7]}}, True),
    ],
)
def test_some_temperatures_are_of_no_table(value, is_continuous):
    assert resolve(value).is_continuous == is_continuous


@pytest.mark.parametrize("policy", ["entropy", "schedule", "two_phase", "constant"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("head", "default"), ("select", "argmax"), ("abstain", True), ("abstain", False)],
)
def test_the_head_s_options_are_refused_with_another_policy(policy, field, value):
    error = refusal({"policy": policy, field: value})
    assert error.field == field
    assert policy in str(error)


@pytest.mark.parametrize("policy", ["head", "entropy", "schedule", "two_phase", "constant"])
@pytest.mark.parametrize("other", ["entropy", "schedule", "two_phase", "constant"])
def test_another_policy_s_parameters_are_refused(policy, other):
    if policy != other:
        assert refusal({"policy": policy, other: {}}).field == other


@pytest.mark.parametrize(
    ("marker", "end", "start"),
    [
        ("</think>", (7,), (6,)),
        ("[/THINK]", (9,), ()),
        ("</end>", ((1 << 31) - 1,), ()),
        ("</three>", (1, 2, 3), (4, 3)),
        ("</eight>", tuple(range(8)), ()),
    ],
)
def test_a_marker_becomes_its_tokens_and_those_of_its_opening_twin(marker, end, start):
    options = resolve({"policy": "two_phase", "two_phase": {"marker": marker}})
    assert (options.marker_token_ids, options.start_token_ids) == (end, start)


@pytest.mark.parametrize(("marker", "count"), [("</nine>", 9), ("</>", 0)])
def test_a_marker_of_too_many_tokens_or_none_is_refused(marker, count):
    error = refusal({"policy": "two_phase", "two_phase": {"marker": marker}})
    assert error.field == "two_phase.marker"
    assert f"{marker!r} is {count} tokens" in str(error)
    assert "1 to 8 tokens" in str(error)


def test_a_refused_marker_is_not_quoted_at_length():
    value = {"policy": "two_phase", "two_phase": {"marker": "\U0010ffff" * 64}}
    assert len(str(refusal(value, tokenizer=lambda marker: [1] * 500))) < 300


def test_only_two_phase_has_markers():
    for policy in ("head", "entropy", "schedule", "constant"):
        options = resolve({"policy": policy})
        assert options.marker_token_ids == options.start_token_ids == ()


def test_markers_travel_as_lists():
    value = {"policy": "two_phase", "two_phase": {"marker": "</three>"}}
    entry = resolve(value).to_extra_args()["adaptive"]
    assert (entry["marker_token_ids"], entry["start_token_ids"]) == ([1, 2, 3], [4, 3])
    assert entry["parameters"] == [1.0, 0.3]


def test_two_phase_without_a_tokenizer_is_refused():
    assert refusal({"policy": "two_phase"}, tokenizer=None).field == "policy"


ABSTAINING = FakeHead("token", "mean", Abstention(threshold=0.25, fallback=0.6, statistic="margin"))


@pytest.mark.parametrize(
    ("value", "can_abstain"), [({}, True), ({"abstain": True}, True), ({"abstain": False}, False)]
)
def test_a_head_abstains_in_its_own_way_unless_it_is_told_not_to(value, can_abstain):
    options = resolve(value, {"default": ABSTAINING})
    assert options.can_abstain == can_abstain
    assert options.parameters == ((0.25, 0.6, 0.0) if can_abstain else ())
    assert Options.from_extra_args(options.to_extra_args()) == options


def test_a_head_without_a_fallback_cannot_be_asked_to_abstain():
    error = refusal({"abstain": True})
    assert error.field == "abstain"
    assert "head 'default' cannot abstain" in str(error)


def test_a_wrong_entry_of_a_list_is_named():
    value = {"policy": "list", "list": {"temperatures": [0.1, 0.2, 10.5, "x"]}}
    error = refusal(value)
    assert error.field == "list.temperatures.2"
    assert "less than or equal to 10" in str(error)


def test_the_lengths_of_lists_are_stated():
    for temperatures, limit in (([], "at least 1"), ([0.7] * 5000, "at most 4096")):
        error = refusal({"policy": "list", "list": {"temperatures": temperatures}})
        assert limit in str(error)


def test_a_list_travels_with_its_options():
    options = resolve({"policy": "list", "list": {"temperatures": [0.5, 1]}})
    assert (options.name, options.level, options.temperatures) == ("list", "token", (0.5, 1.0))
    assert Options.from_extra_args(options.to_extra_args()) == options
    for wrong in ([], [11.0], [0.7] * 4097):
        entry = options.to_extra_args()["adaptive"] | {"temperatures": wrong}
        with pytest.raises(OptionError):
            Options.from_extra_args({"adaptive": entry})


temperatures = st.floats(0.0, 10.0)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELD_NAMES = ["head", "level", "policy", "select", "min", "max", "scale", "report", "entropy"]
FIELD_NAMES += ["schedule", "two_phase", "constant"]
FIXED = {"deadline": None, "derandomize": True, "database": None}


@st.composite
def valid_requests(draw) -> dict:
    low, high = sorted([draw(temperatures), draw(temperatures)])
    value = {"min": low, "max": high, "scale": draw(st.floats(0.01, 10.0))}
    policy = draw(st.sampled_from(["head", "entropy", "schedule", "two_phase", "constant"]))
    parameters = {
        "head": st.none(),
        "entropy": st.fixed_dictionaries({"t0": temperatures, "theta": st.floats(0, 100)}),
        "schedule": st.fixed_dictionaries(
            {"start": temperatures, "end": temperatures, "tokens": st.integers(1, 10**7)}
        ),
        "two_phase": st.fixed_dictionaries(
            {
                "thinking": temperatures,
                "marker": st.sampled_from(["</think>", "</end>", "</eight>"]),
            }
        ),
        "constant": st.fixed_dictionaries({"temperature": temperatures}),
    }
    if policy == "head":
        chosen = draw(st.sampled_from(["default", "whole"]))
        return value | {
            "head": chosen,
            "select": draw(st.sampled_from(["argmax", "sample", "mean"])),
        }
    return value | {"policy": policy, policy: draw(parameters[policy])}


@settings(max_examples=200, **FIXED)
@given(valid_requests())
def test_options_survive_the_way_to_the_engine(value):
    options = resolve(value)
    wire = msgspec.msgpack.encode({"other": 1} | options.to_extra_args())
    assert Options.from_extra_args(msgspec.msgpack.decode(wire)) == options


@settings(max_examples=300, **FIXED)
@given(st.dictionaries(st.sampled_from(FIELD_NAMES) | st.text(max_size=4), json_values))
def test_any_json_object_resolves_or_is_refused(value):
    with contextlib.suppress(OptionError):
        options = resolve(value)
        assert options.min <= options.max


@pytest.mark.parametrize("extra_args", [None, {}, {"other": {"policy": "head"}}])
def test_an_ordinary_request_carries_no_options(extra_args):
    assert Options.from_extra_args(extra_args) is None


@pytest.mark.parametrize(
    "junk", [None, True, 1, "head", [], {}, {"policy": "head"}, [["policy", "head"]]]
)
def test_an_entry_of_another_shape_is_refused(junk):
    with pytest.raises(OptionError, match="not made by to_extra_args"):
        Options.from_extra_args({"adaptive": junk})


@pytest.mark.parametrize(
    ("field", "junk"),
    [
        ("policy", "nothing"),
        ("policy", "constant"),
        ("policy", None),
        ("name", 5),
        ("name", "another"),
        ("level", "sentence"),
        ("select", "x"),
        ("scale", math.nan),
        ("scale", "wide"),
        ("min", None),
        ("min", math.inf),
        ("max", [1.0]),
        ("parameters", None),
        ("parameters", "ab"),
        ("parameters", [1.0]),
        ("parameters", [1.0, 1.0, 1.0]),
        ("parameters", [1.0, math.nan]),
        ("parameters", [1.0, {}]),
        ("marker_token_ids", None),
        ("marker_token_ids", 7),
        ("marker_token_ids", "x"),
        ("marker_token_ids", ["7"]),
        ("marker_token_ids", [7.0]),
        ("marker_token_ids", [True]),
        ("marker_token_ids", [-1]),
        ("marker_token_ids", [1] * 9),
        ("marker_token_ids", [[1]]),
        ("start_token_ids", [1, 1 << 31]),
        ("start_token_ids", [1 << 63]),
        ("start_token_ids", [1] * 9),
    ],
)
def test_an_entry_with_a_wrong_value_is_refused(field, junk):
    entry = resolve({"policy": "entropy"}).to_extra_args()["adaptive"]
    with pytest.raises(OptionError, match="not made by to_extra_args"):
        Options.from_extra_args({"adaptive": entry | {field: junk}})


def test_an_entry_with_a_missing_or_unknown_field_is_refused():
    entry = resolve({}).to_extra_args()["adaptive"]
    missing = {name: value for name, value in entry.items() if name != "scale"}
    for wrong in (missing, entry | {"surprise": 1}):
        with pytest.raises(OptionError, match="not made by to_extra_args"):
            Options.from_extra_args({"adaptive": wrong})


@settings(max_examples=300, **FIXED)
@given(st.sampled_from([field.name for field in dataclasses.fields(Options)]), json_values)
def test_any_entry_is_read_or_refused(field, junk):
    entry = resolve({"policy": "schedule"}).to_extra_args()["adaptive"] | {field: junk}
    with contextlib.suppress(OptionError):
        options = Options.from_extra_args({"adaptive": entry})
        assert options is not None
        assert options.policy in ("head", options.name)


@pytest.mark.parametrize("field", ["policy", "scale", "parameters"])
def test_options_are_frozen(field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(resolve({}), field, None)


def test_an_error_never_prints_what_is_in_a_list_or_an_object():
    deep: list = []
    for _ in range(20_000):
        deep = [deep]
    assert quote(deep) == "list"
    assert quote("x" * 100) == "'" + "x" * 79


def test_a_field_name_cannot_break_the_line():
    with pytest.raises(OptionError) as caught:
        parse_request({"x\ny": 1})
    assert "\n" not in caught.value.field
