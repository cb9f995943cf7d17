"""What is run, on its way to locust: it takes no arguments of others, but the environment."""

import os
from collections.abc import Mapping

from loadtests.scenario import Scenario, ScenarioError, load_scenario

SCENARIO = "LOADTEST_SCENARIO"
SCALE = "LOADTEST_SCALE"
DURATION = "LOADTEST_DURATION"
# The name under which vLLM's server reads it.
API_KEY = "VLLM_API_KEY"
DEFAULT_SCENARIO = "steady"


def read_scenario(environment: Mapping[str, str] = os.environ) -> Scenario:
    """The scenario that the environment names, adjusted as it says.

    Raises:
        ScenarioError: a variable is wrong, or the scenario is.
    """
    scale = _read_number(environment, SCALE)
    duration = _read_number(environment, DURATION)
    scenario = load_scenario(environment.get(SCENARIO) or DEFAULT_SCENARIO)
    return scenario.adjust(1.0 if scale is None else scale, duration)


def make_headers(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What shows the API key of the environment to a server; empty where there is none."""
    key = environment.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _read_number(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ScenarioError(f"{name} must be a number above 0, got {text!r}")
    return number
