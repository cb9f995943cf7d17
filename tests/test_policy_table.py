"""The selector of vLLM's V1 runner, through the table of policies."""

import pytest

from adaptive_head.selector import TemperatureSelector
from tests.policy_table import CASES, check, expect, run_token_by_token
from tests.selection import CPU, HEADS, make_options


@pytest.mark.parametrize("name", CASES)
def test_v1_agrees_with_the_reference(name):
    selector = TemperatureSelector(HEADS, 4, CPU)
    check(selector, CASES[name], run_token_by_token(selector, CASES[name]))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("head-")])
def test_the_table_has_heads_that_choose_and_heads_that_abstain(name):
    first, second = expect(CASES[name])[0]
    flags = {decision.has_abstained for decision in (*first, *second)}
    assert flags == ({False} if name.endswith("always") else {False, True})
    if CASES[name].level == "sequence":
        assert len({decision.temperature for decision in first}) == 1


@pytest.mark.parametrize(
    "name", ["head-token-mean-margin", "head-token-sample-always", "entropy-token"]
)
def test_reported_temperatures_are_given_again_to_the_last_bit(name):
    """So the same seed draws the same tokens, and so the same answer."""
    found = run_token_by_token(TemperatureSelector(HEADS, 4, CPU), CASES[name])[0]
    reported = tuple(round(temperature * 1e6) / 1e6 for temperature, _ in found)
    replay = make_options("list", temperatures=reported)
    again = run_token_by_token(TemperatureSelector(HEADS, 4, CPU), replay)[0]
    assert [value for value, _ in again] == [value for value, _ in found]
