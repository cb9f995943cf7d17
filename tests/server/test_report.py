import pytest
from prometheus_client import CollectorRegistry
from vllm.outputs import SamplingMask

from adaptive_head.abstention import Abstention
from adaptive_head.decision import Decision, DecisionFlag
from adaptive_head.options import parse_request, resolve_options
from adaptive_head.vllm.wire import DecisionSender
from server.heads import ServedHead
from server.metrics import AdaptiveMetrics
from server.report import Report, summarise_all
from tests.server.fakes import describe_head, feed, make_output, make_report, sample

ENTROPY = {"policy": "entropy"}


def read_all(adaptive, *temperatures, finish_reason="stop"):
    """The report of an answer whose tokens had these temperatures."""
    report = make_report(adaptive)
    feed(report.begin_prompt(), (0, temperatures, finish_reason), finished=True)
    return report[0]


def test_a_whole_answer_is_summed_up():
    assert read_all({"report": "tokens"}, 0.3, 0.7, 0.7, 0.0).describe(show_tokens=True) == {
        "policy": "head",
        "head": "tok",
        "level": "token",
        "tokens": 4,
        "mean": 0.425,
        "min": 0.0,
        "max": 0.7,
        "histogram": {"0": 1, "0.3": 1, "0.7": 2},
        "temperatures": [0.3, 0.7, 0.7, 0.0],
    }


def test_a_summary_has_no_list_of_temperatures():
    whole = read_all({"report": "tokens"}, 0.3).describe(show_tokens=True)
    summary = read_all({"report": "summary"}, 0.3).describe(show_tokens=False)
    assert summary == {key: value for key, value in whole.items() if key != "temperatures"}


def test_a_policy_has_no_head():
    summary = read_all(ENTROPY, 0.5).describe(show_tokens=False)
    assert (summary["policy"], summary["head"]) == ("entropy", None)


def test_the_level_is_the_heads_own():
    assert read_all({"head": "seq"}, 0.5).describe(show_tokens=False)["level"] == "sequence"


def test_an_answer_without_tokens_has_no_mean():
    summary = read_all({}, finish_reason="abort").describe(show_tokens=False)
    assert (summary["tokens"], summary["histogram"]) == (0, {})
    assert summary["mean"] is summary["min"] is summary["max"] is None


def test_the_mean_is_rounded_to_millionths():
    assert read_all({}, 0.3, 0.3, 0.7).describe(show_tokens=False)["mean"] == 0.433333


@pytest.mark.parametrize(
    ("temperature", "key"),
    [(0.0, "0"), (1.0, "1"), (0.7, "0.7"), (0.35, "0.35"), (0.333333, "0.333333"), (10.0, "10")],
)
def test_a_heads_histogram_has_the_exact_temperatures(temperature, key):
    assert read_all({}, temperature).describe(show_tokens=False)["histogram"] == {key: 1}


@pytest.mark.parametrize(
    "adaptive",
    [
        {"policy": "entropy"},
        {"policy": "schedule"},
        {"policy": "list", "list": {"temperatures": [0.7]}},
        {"select": "mean"},
    ],
)
def test_a_histogram_of_continuous_temperatures_is_rounded_to_tenths(adaptive):
    summary = read_all(adaptive, 0.712345, 0.698, 0.04, 1.96).describe(show_tokens=False)
    assert summary["histogram"] == {"0": 1, "0.7": 2, "2": 1}
    assert (summary["min"], summary["max"]) == (0.04, 1.96)


def test_the_histogram_is_in_order_of_temperature():
    histogram = read_all({}, 10.0, 0.7, 0.0, 2.0).describe(show_tokens=False)["histogram"]
    assert list(histogram) == ["0", "0.7", "2", "10"]


def test_choices_are_numbered_through_the_prompts_of_a_request():
    report = make_report({"report": "tokens"}, num_choices=2, takes_many_prompts=True)
    first, second = report.begin_prompt(), report.begin_prompt()
    feed(second, (1, [0.7], None))
    feed(first, (0, [0.0], None), (1, [0.3], None))
    feed(second, (0, [1.0], None))
    lists = [report[index].describe(show_tokens=True)["temperatures"] for index in range(4)]
    assert lists == [[0.0], [0.3], [1.0], [0.7]]


def test_temperatures_leave_the_place_where_sampling_masks_are_expected():
    output = make_output((0, [0.3, 0.7], None))
    make_report().begin_prompt().read(output)
    assert output.outputs[0].sampling_mask is None
    assert output.outputs[0].token_ids == [300_000, 700_000]


def test_a_token_without_a_temperature_is_a_bug_that_shows():
    output = make_output((0, [0.3, 0.7], None))
    output.outputs[0].sampling_mask = SamplingMask([[1, *Decision(700_000)]])
    report = make_report().begin_prompt()
    with pytest.raises(AssertionError, match="a token came without a decision"):
        report.read(output)


def test_a_temperature_without_a_token_is_a_bug_that_shows():
    output = make_output((0, [0.3, 0.7], None))
    output.outputs[0].sampling_mask = SamplingMask(
        [[0, *Decision(300_000)], [2, *Decision(700_000)]]
    )
    report = make_report().begin_prompt()
    with pytest.raises(AssertionError, match="a decision came without its token"):
        report.read(output)


def test_tokens_are_reported_once_they_have_been_read():
    report = make_report({"report": "tokens"})
    prompt_report = report.begin_prompt()
    feed(prompt_report, (0, [0.3, 0.7], None))
    feed(prompt_report, (0, [0.7], None))
    assert report[0].take_ready() == [0.3, 0.7, 0.7]
    assert report[0].take_ready() == []
    feed(prompt_report, (0, [0.7, 0.7], None))
    assert report[0].take_ready() == [0.7, 0.7]


async def test_of_several_prompts_tokens_are_reported_once_vllm_has_them():
    """Its merging of prompts reads ahead."""
    report = make_report({"report": "tokens"}, num_choices=2, takes_many_prompts=True)
    report.begin_prompt()
    prompt_report = report.begin_prompt()
    steps = [[0.3, 0.7], [0.7], [], [0.7, 1.0]]
    outputs = [feed(prompt_report, (1, temperatures, None)) for temperatures in steps]

    async def merge():
        for output in outputs:
            yield 1, output

    given = [(place, report[3].take_ready()) async for place, _ in report.follow(merge())]
    assert given == [(1, temperatures) for temperatures in steps]
    assert report[0].num_given is None, "of which nothing has come"


def test_a_chat_has_one_prompt_and_completions_have_many():
    chat, completions = make_report(), make_report(takes_many_prompts=True)
    assert chat.begin_prompt() is chat.begin_prompt()
    assert completions.begin_prompt() is not completions.begin_prompt()
    assert completions[0] is not completions[1]


def test_a_head_is_held_until_its_last_holder_lets_go():
    head = ServedHead("tok", 0, describe_head())
    report = make_report(head=head)
    report.hold()
    with report.held():
        assert head.num_holders == 2
        report.release()
        assert head.num_holders == 1
    assert head.num_holders == 0
    with pytest.raises(ZeroDivisionError), report.held():
        _ = 1 / 0
    assert head.num_holders == 0


def test_tokens_are_counted_in_batches_and_at_the_end():
    registry = CollectorRegistry()
    prompt_report = make_report(num_choices=2, registry=registry).begin_prompt()

    def count():
        return sample(registry, "adaptive_temperature_count")

    feed(prompt_report, (0, [0.3] * 20, None))
    assert count() == 0
    feed(prompt_report, (1, [0.7] * 12, None))
    assert count() == 32
    feed(prompt_report, (0, [0.3], "stop"))
    assert count() == 32
    feed(prompt_report, (1, [0.3], "length"), finished=True)
    assert count() == 34
    prompt_report.flush()
    assert count() == 34
    assert sample(registry, "adaptive_temperature_sum") == pytest.approx(22 * 0.3 + 12 * 0.7)


def test_what_an_interrupted_answer_had_is_counted_too():
    registry = CollectorRegistry()
    prompt_report = make_report(registry=registry).begin_prompt()
    feed(prompt_report, (0, [0.3] * 5, None))
    prompt_report.flush()
    assert sample(registry, "adaptive_temperature_count") == 5
    assert sample(registry, "adaptive_request_temperature_count") == 0


def test_answers_are_counted_once_each_at_their_mean():
    registry = CollectorRegistry()
    prompt_report = make_report(num_choices=3, registry=registry).begin_prompt()
    feed(prompt_report, (0, [0.3], None), (1, [1.0], "stop"), (2, [], "abort"))
    feed(prompt_report, (0, [0.7], "length"), finished=True)
    assert sample(registry, "adaptive_request_temperature_count") == 2
    assert sample(registry, "adaptive_request_temperature_sum") == pytest.approx(1.5)


def test_prompts_are_counted_when_the_engine_gets_them():
    registry = CollectorRegistry()
    report = make_report(ENTROPY, num_choices=2, registry=registry, takes_many_prompts=True)
    for _ in range(2):
        report.begin_prompt().begin()
    assert sample(registry, "adaptive_requests_total", policy="entropy", head="entropy") == 2


def test_tokens_with_the_fallback_are_counted_where_the_head_can_abstain():
    abstain = Abstention(threshold=0.5, fallback=0.6, statistic="margin")
    metadata = describe_head().model_copy(update={"abstain": abstain})
    head = ServedHead("tok", 0, metadata)
    registry = CollectorRegistry()
    metrics = AdaptiveMetrics("smol", {"tok": metadata}, registry)
    for adaptive, shown in (({}, {"abstained": 2}), ({"abstain": False}, {})):
        request = parse_request(adaptive)
        options = resolve_options(request, {"tok": head}, "tok", None)
        report = Report(options, "summary", 1, metrics, head=head)
        prompt = report.begin_prompt()
        output = make_output((0, [0.6, 0.3, 0.6], "stop"), finished=True)
        fields = {"flags": DecisionFlag.ABSTAINED} if shown else {}
        fallback, chosen = Decision(600_000, **fields), Decision(300_000)
        mask = DecisionSender().send("r", [fallback, chosen, fallback])
        output.outputs[0].sampling_mask = SamplingMask(mask.to_nested_list())
        prompt.read(output)
        described = report[0].describe(show_tokens=False)
        assert {key: described[key] for key in described.keys() & {"abstained"}} == shown
        assert described["histogram"] == {"0.3": 1, "0.6": 2}
        assert summarise_all([prompt]).get("abstained") == shown.get("abstained")
    assert sample(registry, "adaptive_abstained_tokens_total") == 2
