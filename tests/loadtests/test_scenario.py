import pytest
import yaml

from adaptive_head.options import parse_request
from loadtests.scenario import Scenario, ScenarioError, list_scenarios, load_scenario
from loadtests.settings import read_scenario
from tests.loadtests.samples import make_scenario

WRONG = [
    ({"wind": 1}, "wind: Extra inputs"),
    ({"stages": []}, "stages: Tuple should have at least 1 item"),
    ({"stages": [{"duration": 1, "users": 0, "spawn_rate": 1}]}, "stages.0.users: Input should be"),
    ({"mix": {"chat": 0}}, "mix: at least one weight must be above 0"),
    ({"mix": {"cat": 1}}, "mix.cat: Extra inputs"),
    ({"styles": [{"temperature": "hot"}]}, "styles.0.temperature"),
    (
        {"styles": [{"temperature": 0.7, "adaptive": {"report": "none"}}]},
        'styles.0: adaptive goes with temperature "adaptive"',
    ),
    ({"work": {"max_tokens": [9, 3]}}, "work.max_tokens: must be two numbers, the smaller"),
    ({"work": {"max_tokens": [0, 3]}}, "work.max_tokens: must be at least 1"),
    ({"limits": {"max_failed": 2}}, "limits.max_failed: Input should be"),
    ({"mix": {"batch": 1}, "styles": [{"temperature": 0}]}, "work.batch_n: must be 1 where"),
]


@pytest.fixture
def write(tmp_path):
    def run(content) -> str:
        path = tmp_path / "scenario.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return run


@pytest.mark.parametrize("name", list_scenarios())
def test_every_scenario_that_ships_is_valid_and_says_what_it_is_for(name):
    scenario = load_scenario(name)
    assert scenario.about.endswith(".")
    for style in scenario.styles:
        if style.adaptive is not None:
            parse_request(style.adaptive)


def test_the_scenarios_are_those_that_are_promised():
    assert {"smoke", "steady", "spike", "soak", "saturation"} <= set(list_scenarios())
    assert load_scenario("steady").duration == 300


@pytest.mark.parametrize(("change", "sentence"), WRONG)
def test_a_mistake_is_one_sentence_that_names_the_field(write, change, sentence):
    path = write(make_scenario().model_dump(mode="json") | change)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path)
    assert sentence in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_yaml_or_not_there_is_said_so(write):
    with pytest.raises(ScenarioError, match="not YAML"):
        load_scenario(write("stages: ["))
    with pytest.raises(ScenarioError, match=r"no scenario 'storm'.*one of .*smoke"):
        load_scenario("storm")


def test_a_scenario_is_scaled_and_stretched():
    stages = [
        {"duration": 10, "users": 4, "spawn_rate": 2},
        {"duration": 30, "users": 1, "spawn_rate": 1},
    ]
    scenario = make_scenario(stages=stages).adjust(scale=1.5, duration=20)
    assert [(s.duration, s.users, s.spawn_rate) for s in scenario.stages] == [(5, 6, 6), (15, 2, 3)]
    assert make_scenario(stages=stages).adjust() == make_scenario(stages=stages)


def test_the_environment_picks_and_adjusts():
    environment = {"LOADTEST_SCENARIO": "smoke", "LOADTEST_SCALE": "2", "LOADTEST_DURATION": "5"}
    assert read_scenario(environment) == load_scenario("smoke").adjust(2, 5)
    assert read_scenario({"LOADTEST_SCALE": ""}) == load_scenario("steady")


@pytest.mark.parametrize("value", ["fast", "0", "-1", "inf", "nan"])
def test_a_wrong_variable_is_named(value):
    with pytest.raises(ScenarioError, match=f"LOADTEST_SCALE .* got '{value}'"):
        read_scenario({"LOADTEST_SCALE": value})


def test_a_scenario_survives_json():
    scenario = load_scenario("smoke")
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario
