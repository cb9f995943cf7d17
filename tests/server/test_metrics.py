import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from adaptive_head.abstention import Abstention
from adaptive_head.drift import accumulate_shares
from adaptive_head.options import parse_request, resolve_options
from server.counted_histogram import CountedHistogram
from server.heads import ServedHead
from server.metrics import DEFAULT_BUCKETS, AdaptiveMetrics, merge_buckets
from tests.server.fakes import HEADS, describe_head, sample

BUCKETS = (0.0, 0.5, 1.0)


def make_histogram() -> tuple[CollectorRegistry, CountedHistogram]:
    registry = CollectorRegistry()
    return registry, CountedHistogram("h", "help", ("l",), buckets=BUCKETS, registry=registry)


def read(registry) -> dict[tuple, float]:
    return {
        (found.name, found.labels.get("le")): found.value
        for family in registry.collect()
        for found in family.samples
        if not found.name.endswith("_created")
    }


@pytest.mark.parametrize("seed", range(5))
def test_observing_many_equals_observing_often(seed):
    randomness = random.Random(seed)
    (many, histogram), (often, reference) = make_histogram(), make_histogram()
    for _ in range(20):
        value = randomness.choice([0.0, 0.5, 1.0, randomness.uniform(0, 10)])
        count = randomness.randrange(4)
        histogram.labels("x").observe_many(value, count)
        for _ in range(count):
            reference.labels("x").observe(value)
    assert read(many) == pytest.approx(read(often))


def test_a_value_on_a_bound_belongs_to_that_bucket():
    registry, histogram = make_histogram()
    histogram.labels("x").observe_many(0.5, 3)
    assert [sample(registry, "h_bucket", le=le) for le in ("0.0", "0.5", "1.0", "+Inf")] == [
        0,
        3,
        3,
        3,
    ]


def test_a_histogram_without_its_labels_cannot_be_observed():
    _, histogram = make_histogram()
    with pytest.raises(ValueError, match="label"):
        histogram.observe_many(1.0, 1)


def test_prometheus_client_still_has_the_private_fields_that_are_used():
    _, histogram = make_histogram()
    child = histogram.labels("x")
    assert type(child) is CountedHistogram
    assert child._upper_bounds == [0.0, 0.5, 1.0, float("inf")]
    assert len(child._buckets) == 4
    for value in (child._sum, *child._buckets):
        value.inc(2)
        assert value.get() == 2
    child._raise_if_not_observable()
    assert histogram._kwargs["buckets"] == BUCKETS


def test_buckets_are_the_temperatures_of_all_heads():
    assert merge_buckets([(0.0, 0.7), (0.3, 0.7, 1.5)]) == (0.0, 0.3, 0.7, 1.5)
    assert merge_buckets([(2 / 3, 1.0)]) == (0.666667, 1.0), "as temperatures are observed"
    assert merge_buckets([]) == DEFAULT_BUCKETS == tuple(sorted(DEFAULT_BUCKETS))


def make_metrics(heads=HEADS):
    registry = CollectorRegistry()
    return registry, AdaptiveMetrics("smol", heads, registry)


def resolve(**adaptive):
    return resolve_options(parse_request(adaptive), HEADS, "tok", lambda marker: [7])


def test_every_observation_is_labelled_with_model_head_and_level():
    registry, metrics = make_metrics()
    metrics.count_tokens(resolve(), {300_000: 2, 700_000: 1})
    metrics.count_tokens(resolve(head="seq"), {0: 5})
    metrics.count_tokens(resolve(policy="entropy"), {123_456: 4})
    count = "adaptive_temperature_count"
    assert sample(registry, count, model="smol", head="tok", level="token") == 3
    assert sample(registry, count, model="smol", head="seq", level="sequence") == 5
    assert sample(registry, count, model="smol", head="entropy", level="token") == 4
    assert sample(registry, "adaptive_temperature_sum", head="tok") == pytest.approx(1.3)
    assert sample(registry, "adaptive_temperature_bucket", head="tok", le="0.3") == 2


def test_requests_are_counted_by_policy():
    registry, metrics = make_metrics()
    for options in (resolve(), resolve(), resolve(policy="constant")):
        metrics.count_request(options)
    assert sample(registry, "adaptive_requests_total", policy="head", head="tok") == 2
    assert sample(registry, "adaptive_requests_total", policy="constant", head="constant") == 1


def test_loaded_heads_are_described():
    heads = {"a": describe_head(trained=True), "b": describe_head("sequence", (0.0, 1.25))}
    registry, _ = make_metrics(heads)
    info = "adaptive_head_info"
    assert sample(registry, info) == 2
    assert sample(registry, info, head="a", trained="true", base_model="base") == 1
    assert sample(registry, info, head="b", trained="false", temperatures="0 1.25") == 1
    assert sample(registry, info, head="a", select="argmax", below_top="0.7") == 1
    assert sample(registry, info, head="b", select="argmax", below_top="0.0") == 1


def test_a_loaded_head_has_its_series_before_its_first_request():
    registry, _ = make_metrics()
    assert sample(registry, "adaptive_temperature_count", head="tok") == 0
    names = {found.name for family in registry.collect() for found in family.samples}
    assert {"adaptive_request_temperature_count", "adaptive_requests_total"} <= names


def test_the_choices_of_training_are_there_to_compare_with():
    shares = {"0.0": 0.25, "0.3": 0.0, "0.7": 0.5, "1.0": 0.25}
    trained = describe_head(training={"temperature_shares": shares})
    registry, _ = make_metrics({"a": trained, "b": describe_head(temperatures=(0.5, 2.0))})
    share = {
        found.labels["le"]: found.value
        for family in registry.collect()
        for found in family.samples
        if found.name == "adaptive_head_training_share"
    }
    expected = {"0.0": 0.25, "0.3": 0.25, "0.5": 0.25, "0.7": 0.75, "1.0": 1, "2.0": 1, "+Inf": 1}
    assert share == expected


def read_training(registry) -> dict[float, float]:
    return {
        float(found.labels["le"]): found.value
        for family in registry.collect()
        for found in family.samples
        if found.name == "adaptive_head_training_share"
    }


def describe_means(temperatures=(0.0, 1.0), **shares: float):
    """A head that serves means, which in training were in these buckets: t07=1 is (0.6, 0.7]."""
    names = {f"t{tenth:02}": str(tenth / 10) for tenth in range(21)}
    found = dict.fromkeys(names.values(), 0.0) | {names[key]: v for key, v in shares.items()}
    training = {"expected_temperature_shares": found} if shares else None
    return describe_head(temperatures=temperatures, select="mean", training=training)


def test_a_head_that_serves_means_has_buckets_of_a_tenth_and_its_choices():
    heads = {"a": describe_head(temperatures=(0.35, 3.0), select="mean"), "tok": HEADS["tok"]}
    registry, metrics = make_metrics(heads)
    bounds = {
        float(found.labels["le"])
        for family in registry.collect()
        for found in family.samples
        if found.name == "adaptive_temperature_bucket"
    }
    tenths = {float(f"{ones}.{tenth}") for ones in (0, 1) for tenth in range(10)}
    assert bounds == tenths | {2.0, 0.35, 3.0, math.inf}
    metrics.count_tokens(resolve(), {650_001: 1, 700_000: 2})
    bucket = "adaptive_temperature_bucket"
    assert [sample(registry, bucket, head="tok", le=le) for le in ("0.6", "0.7")] == [0, 3]
    # Its highest bucket, for the alert about the highest temperature.
    assert sample(registry, "adaptive_head_info", head="a", select="mean", below_top="2.0") == 1


def test_the_means_of_training_are_shown_where_a_small_shift_changes_little():
    registry, _ = make_metrics({"a": describe_means(t02=0.2, t05=0.5, t06=0.1, t09=0.2)})
    expected = {0.0: 0, 0.1: 0, 0.2: 0.2, 0.3: 0.2, 0.7: 0.8, 0.8: 0.8, 0.9: 1, 1.0: 1}
    # Next to 0.5 lies more than half. 0.4 has no more than half next to it.
    expected |= {0.4: 0.2, 0.6: 0.8} | {tenth / 10: 1 for tenth in range(10, 21)} | {math.inf: 1}
    assert read_training(registry) == pytest.approx(expected)


def test_a_law_in_one_bucket_is_shown_around_it_only():
    registry, _ = make_metrics({"a": describe_means(t08=1.0), "b": describe_means((0.05, 1.0))})
    shown = read_training(registry)
    assert shown[0.6] == 0 and shown[0.9] == 1
    assert not {0.7, 0.8} & shown.keys()
    assert 0.05 not in shown, "a bucket of another head, which training did not count by"


LAWS = st.lists(st.integers(0, 100), min_size=1, max_size=30)


@given(LAWS, LAWS, st.integers(-9, 9))
def test_no_shift_by_less_than_a_bucket_reaches_the_threshold_of_drift(first, second, shift):
    """Temperatures in hundredths; each moves by less than a tenth, all in one direction."""
    edges = np.arange(21) * 10
    trained = np.array(first + second)
    served = np.clip(trained + shift, 0, 100)
    counts = np.bincount(np.searchsorted(edges, trained), minlength=21)
    shares = {f"t{place:02}": count / len(trained) for place, count in enumerate(counts)}
    shown = accumulate_shares(describe_means(**shares), (*(edges / 100).tolist(), math.inf))
    assert shown.pop(math.inf) == pytest.approx(1)
    for bound, share in shown.items():
        assert abs(np.mean(served <= round(100 * bound)) - share) <= 0.5 + 1e-9


def test_a_head_that_comes_later_has_buckets_of_its_own():
    registry, metrics = make_metrics()
    metrics.count_tokens(resolve(), {300_000: 2})
    metrics.count_tokens(resolve(head="seq"), {300_000: 2})
    metrics.remove_head("tok", HEADS["tok"])
    metrics.add_head("tok", describe_head(temperatures=(0.1, 5.0)))
    metrics.count_tokens(resolve(), {100_000: 1, 5_000_000: 3})
    bucket = "adaptive_temperature_bucket"
    assert sample(registry, bucket, head="tok", le="0.1") == 1
    assert sample(registry, bucket, head="tok", le="1.0") == 1
    assert sample(registry, bucket, head="tok", le="5.0") == 4
    assert sample(registry, bucket, head="seq", le="0.3") == 2, "another head loses nothing"
    assert sample(registry, "adaptive_head_info", head="tok", temperatures="0.1 5") == 1
    assert sample(registry, "adaptive_head_info") == 2


def test_a_head_that_comes_back_keeps_its_counts():
    registry, metrics = make_metrics()
    metrics.count_tokens(resolve(), {300_000: 2})
    metrics.remove_head("tok", HEADS["tok"])
    assert sample(registry, "adaptive_head_info", head="tok") == 0
    metrics.add_head("tok", HEADS["tok"])
    assert sample(registry, "adaptive_temperature_count", head="tok") == 2


def test_a_canary_is_shown_until_it_ends():
    registry, metrics = make_metrics()
    metrics.set_canary("tok", "seq", 0.1)
    assert sample(registry, "adaptive_canary_share", head="tok", canary="seq") == 0.1
    metrics.set_canary("tok", "seq", 0)
    assert "adaptive_canary_share{" not in generate_latest(registry).decode()


def test_changes_of_heads_are_counted():
    registry, metrics = make_metrics()
    metrics.count_change("load", "refused")
    changes = "adaptive_head_changes_total"
    assert sample(registry, changes, model="smol", action="load", result="refused") == 1


def test_without_heads_the_policies_have_buckets():
    registry, metrics = make_metrics({})
    metrics.count_tokens(resolve(policy="entropy"), {650_000: 1})
    assert sample(registry, "adaptive_temperature_bucket", le="0.8") == 1
    assert sample(registry, "adaptive_temperature_bucket", le="0.6") == 0


def test_what_is_exported_is_what_prometheus_reads():
    registry, metrics = make_metrics()
    metrics.count_tokens(resolve(), {300_000: 2})
    metrics.count_answer(resolve(), 0.3)
    text = generate_latest(registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["adaptive_temperature"].type == "histogram"
    assert families["adaptive_request_temperature"].type == "histogram"
    assert families["adaptive_requests"].type == "counter"
    assert families["adaptive_head_info"].type == "gauge"
    assert all(family.documentation for family in families.values())


# The fakes import vLLM, which takes long.
ONE_API_PROCESS = """
import json
import sys

from adaptive_head.checkpoint import HeadMetadata
from adaptive_head.options import parse_request, resolve_options
from server.metrics import AdaptiveMetrics

HEADS = {
    name: HeadMetadata.model_validate_json(head)
    for name, head in json.loads(sys.argv[1]).items()
}
metrics = AdaptiveMetrics("smol", HEADS)
options = resolve_options(parse_request({}), HEADS, "tok")
metrics.count_request(options)
metrics.count_tokens(options, {300_000: 10, 700_000: 4})
metrics.count_answer(options, 0.4)
"""


def test_several_api_processes_add_up(tmp_path, request):
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    heads = {name: head.model_dump_json() for name, head in HEADS.items()}
    command = [sys.executable, "-c", ONE_API_PROCESS, json.dumps(heads)]
    root = request.config.rootpath
    processes = [subprocess.Popen(command, env=environment, cwd=root) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    assert sample(registry, "adaptive_requests_total") == 2
    assert sample(registry, "adaptive_temperature_count") == 28
    assert sample(registry, "adaptive_temperature_sum") == pytest.approx(2 * (3 + 2.8))
    assert sample(registry, "adaptive_temperature_bucket", le="0.3") == 20
    assert sample(registry, "adaptive_temperature_bucket", le="+Inf") == 28
    assert sample(registry, "adaptive_request_temperature_count") == 2
    assert sample(registry, "adaptive_head_info") == 2


def test_fallbacks_are_counted_from_0_for_heads_that_have_one():
    abstain = Abstention(threshold=0.5, fallback=1.7, statistic="margin")
    heads = HEADS | {"tok": HEADS["tok"].model_copy(update={"abstain": abstain})}
    registry, metrics = make_metrics(heads)
    name = "adaptive_abstained_tokens_total"
    counted = [
        (found.labels, found.value)
        for family in registry.collect()
        for found in family.samples
        if found.name == name
    ]
    labels = {"model": "smol", "head": "tok", "level": "token"}
    assert counted == [(labels, 0.0)]
    assert sample(registry, "adaptive_temperature_bucket", le="1.7", head="tok") == 0.0
    options = resolve_options(
        parse_request({}), {"tok": ServedHead("tok", 0, heads["tok"])}, "tok", None
    )
    metrics.count_abstained(options, 3)
    assert sample(registry, name, head="tok") == 3
    metrics.forget_head("tok", "token")
    assert sample(registry, name) == 0
