"""The selector of vLLM's V1 runner, through the table of policies."""

import pytest

from adaptive_head.selector import TemperatureSelector
from tests.policy_table import CASES, check, expect, run_token_by_token
from tests.selection import CPU, HEADS


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
