"""The comparison: its plan, its statistics against an independent reference, its report."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from loadtests.compare import make_plan
from loadtests.measurements import Block, Measurements, assign_kinds, order_blocks
from loadtests.ratios import bootstrap_ratio, compare_blocks, measure_cpu, measure_speed
from loadtests.report import make_rows, sum_temperatures, write_report
from loadtests.scenario import Mix, ScenarioError
from tests.loadtests.samples import make_scenario

URL = "http://127.0.0.1:1"


def test_who_goes_first_alternates():
    order = list(order_blocks(2))
    assert [pair for pair, _ in order] == [-1, -1, 0, 0, 1, 1]
    first = [arm for _, arm in order[::2]]
    assert first == ["fixed", "adaptive", "fixed"]
    assert all({order[i][1], order[i + 1][1]} == {"adaptive", "fixed"} for i in (0, 2, 4))


def test_users_are_shared_out_by_weight():
    mix = Mix(chat=3, batch=1, long_prompt=1, leaving=5)
    assert sorted(assign_kinds(mix, 5)) == ["batch", "chat", "chat", "chat", "long_prompt"]
    assert assign_kinds(mix, 1) == ["chat"]
    assert assign_kinds(Mix(batch=1), 3) == ["batch"] * 3


def test_a_comparison_needs_both_arms_and_a_client_that_stays():
    with pytest.raises(ScenarioError, match="styles: "):
        make_plan(make_scenario(styles=[{"temperature": 0.7}]), URL, URL, 1, 1)
    with pytest.raises(ScenarioError, match="mix: "):
        make_plan(make_scenario(mix={"leaving": 1}), URL, URL, 1, 1)
    assert make_plan(make_scenario(), URL, URL, 1, 1).scenario.work.ignore_eos


def test_the_interval_is_that_of_all_resamples():
    """Reference: every one of the 5^5 equally likely resamples, instead of random ones."""
    ratios = [0.8, 0.95, 1.0, 1.1, 1.6]
    means = sorted(
        math.prod(resample) ** (1 / 5) for resample in itertools.product(ratios, repeat=5)
    )
    found = bootstrap_ratio(ratios, seed=0)
    assert found.mean == pytest.approx(math.prod(ratios) ** (1 / 5))
    # Random resamples hit a rank within a per cent of the exact one.
    for value, share in ((found.low, 0.025), (found.high, 0.975)):
        rank = np.searchsorted(means, [value - 1e-9, value + 1e-9]) / len(means)
        assert rank[0] - 0.01 <= share <= rank[1] + 0.01
    assert not found.is_clear


def test_the_inverse_comparison_is_the_inverse():
    ratios = [0.8, 0.9, 0.95, 1.2]
    one, other = (bootstrap_ratio(values, 3) for values in (ratios, [1 / r for r in ratios]))
    assert one.mean * other.mean == pytest.approx(1)
    assert (one.low * other.high, one.high * other.low) == pytest.approx((1, 1))


def test_a_clear_difference_is_clear():
    assert bootstrap_ratio([1.1, 1.2, 1.15], 0).is_clear


def make_block(arm, pair, seconds, **changes) -> Block:
    fields = {
        "cpu_seconds": seconds / 4,
        "num_requests": 4,
        "num_tokens": 100,
        "ttfts": [0.1, 0.3],
        "itls": [0.01, 0.02],
    }
    if arm == "adaptive":
        fields["temperatures"] = {"tok": {"0.3": 60, "1": 40}}
    return Block(arm=arm, pair=pair, seconds=seconds, **fields | changes)


def make_measurements(*blocks: Block, num_pairs=3, **fields) -> Measurements:
    plan = make_plan(make_scenario(), URL, URL, num_pairs, 2)
    versions = {"adaptive": "0.32.0", "fixed": "0.32.0"}
    fields = {"model": "smol", "versions": versions, "heads": {"tok": (0.3, 0.7, 1.0)}} | fields
    return Measurements(plan=plan, blocks=list(blocks), **fields)


def make_pairs(num_pairs=3) -> list[Block]:
    """Adaptive blocks that take twice as long, after two that warm up."""
    return [
        make_block(arm, pair, seconds)
        for pair in range(-1, num_pairs)
        for arm, seconds in (("adaptive", 4.0), ("fixed", 2.0))
    ]


def test_pairs_are_divided_and_warming_up_does_not_count():
    blocks = make_pairs()
    blocks[0].seconds = 1e9
    measurements = make_measurements(*blocks)
    speed = compare_blocks(measurements.list_pairs(), measure_speed, 0)
    assert speed.pairs == [0.5] * 3
    assert (speed.mean, speed.low, speed.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_pair_with_a_failure_or_without_its_other_half_is_left_out():
    blocks = make_pairs()
    blocks[2].failures = ["no usage"]
    measurements = make_measurements(*blocks[:-1])
    assert [pair[0].pair for pair in measurements.list_pairs()] == [1]
    assert measurements.is_broken


def test_temperatures_that_were_never_chosen_are_shown_too():
    assert sum_temperatures(make_measurements(*make_pairs(2))) == {
        "tok": {0.3: 120, 0.7: 0, 1.0: 80}
    }


def test_the_report_says_what_was_measured_and_asks_nobody(tmp_path):
    rows = write_report(make_measurements(*make_pairs()), tmp_path)
    assert [row.verdict for row in rows] == [
        "no difference seen",
        "no difference seen",
        "adaptive worse by 50.0%",
        "adaptive worse by 100.0%",
    ]
    markdown = (tmp_path / "report.md").read_text()
    html = (tmp_path / "report.html").read_text()
    for text in (markdown, html):
        for known in ("smol", "0.500", "adaptive worse by 50.0%", "0.32.0", "3 pairs are few"):
            assert known in text
    for picture in re.findall(r"\]\((\w+\.png)\)", markdown):
        assert (tmp_path / picture).stat().st_size > 1000
    assert html.count("<svg") == 3
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'<\s]+", html)) <= namespaces
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", html)
    assert "#010203" not in html
    saved = json.loads((tmp_path / "measurements.json").read_text())
    assert make_rows(Measurements.model_validate(saved)) == rows


def test_the_report_does_not_hide_failures(tmp_path):
    blocks = make_pairs()
    blocks[3].failures = ["choice 0: <3 temperatures>"]
    wrong = ["the clients counted 5 tokens, but"]
    write_report(make_measurements(*blocks, wrong_tokens=wrong), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "choice 0: &lt;3 temperatures&gt;" in html
    assert "Tokens do not add up: the clients counted 5 tokens" in html


def test_without_a_whole_pair_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="no pair of blocks"):
        write_report(make_measurements(make_block("fixed", 0, 1.0)), tmp_path)
    assert (tmp_path / "measurements.json").is_file()


def test_a_block_too_short_for_the_kernels_clock_has_no_processor_time():
    block = make_block("fixed", 0, 1.0, cpu_seconds=0.6)
    assert measure_cpu(block) == pytest.approx(0.15)
    block.cpu_seconds = 0.02
    assert measure_cpu(block) is None
    pairs = [(make_block("adaptive", 0, 2.0), block)]
    assert compare_blocks(pairs, measure_cpu, 0) is None


def test_what_was_not_streamed_has_no_latencies(tmp_path):
    blocks = [
        make_block(arm, pair, 1.0, ttfts=[], itls=[], cpu_seconds=0)
        for pair in range(3)
        for arm in ("adaptive", "fixed")
    ]
    rows = write_report(make_measurements(*blocks), tmp_path)
    assert [row.name for row in rows] == ["tokens per second"]
    assert not (tmp_path / "latencies.png").exists()
