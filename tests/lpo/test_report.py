import getpass
import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from adaptive_head.lpo.arms import Arm, Setting, read_heads
from adaptive_head.lpo.choices import describe_choices
from adaptive_head.lpo.comparison import (
    BEATS,
    LOSES,
    TOO_FEW,
    UNDECIDED,
    Comparison,
    Opponent,
    judge_win_rate,
)
from adaptive_head.lpo.plots import draw_plots
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.lpo.report import write_report, write_verdict
from adaptive_head.lpo.rewards import build_reward
from adaptive_head.lpo.statistics import Interval, bootstrap_groups, make_interval
from adaptive_head.lpo.summaries import ArmSummary, summarise_arm
from adaptive_head.lpo.tables import render_tables
from adaptive_head.lpo.tuning import choose_best_fixed
from tests.lpo.evaluation_setup import (
    FakeEngine,
    decode,
    make_experiment,
    make_prompts,
    run,
    save_heads,
)
from tests.lpo.samples import make_response

PLOTS = ["temperatures.png", "win_rates.png", "positions.png", "spans.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished evaluation with majority votes."""
    folder = tmp_path_factory.mktemp("report")
    experiment = make_experiment(num_responses=4, majority=True, num_train_prompts=4)
    run(folder, FakeEngine(), experiment, num_prompts=25)
    return folder / "evaluation"


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def build_rewards(experiment):
    return {
        task: {name: build_reward(name, reward) for name, reward in config.rewards.items()}
        for task, config in experiment.tasks.items()
    }


def make_summary(kind: str, scores: dict[str, list[dict]], temperature=None, **fields):
    """A summary of made-up scores, by prompt."""
    settings = dict.fromkeys(("sums", "stories"), Setting(0.0))
    arm = Arm(f"{kind}-{temperature}", kind, settings, 1, temperature=temperature)
    means = {"sums": 0.5, "stories": 0.5}
    defaults = {"votes": {}, "temperatures": means, "num_tokens": 1, "finish_reasons": {}}
    return ArmSummary(arm, {k: tuple(v) for k, v in scores.items()}, **defaults | fields)


def give_sums(values: list[list[float]]) -> dict[str, list[dict]]:
    return {f"sums/test/{i}": [{"correct": v} for v in row] for i, row in enumerate(values)}


def give_stories(values: list[list[tuple[float, float]]]) -> dict[str, list[dict]]:
    return {
        f"stories/test/{i}": [{"starts": a, "varied": b} for a, b in row]
        for i, row in enumerate(values)
    }


def compare(own: ArmSummary, other: ArmSummary, task: str, num_prompts: int, **evaluation):
    experiment = make_experiment(**evaluation)
    comparison = Comparison(
        experiment, make_prompts("test", num_prompts), build_rewards(experiment)
    )
    return comparison.compare_on_task([own], [Opponent("x", "X", {task: [other]})], task)


def test_rows_are_means_over_prompts_of_means_over_samples():
    own = make_summary("head", give_sums([[1, 1], [1, 0], [0, 0]] * 10))
    other = make_summary("fixed", give_sums([[0, 1], [0, 1], [0, 1]] * 10))
    head, row = compare(own, other, "sums", 30)
    assert head["metric"]["mean"] == pytest.approx(0.5)
    assert "win_rate" not in head
    assert row["metric"]["mean"] == pytest.approx(0.5)
    assert row["difference"]["mean"] == pytest.approx(0.0)
    # By sample: win, tie; win, loss; tie, loss.
    assert row["win_rate"]["mean"] == pytest.approx((0.75 + 0.5 + 0.25) / 3)
    # The same intervals as those of the prompts' own numbers.
    groups, seed = [str(i) for i in range(30)], [make_experiment().derive_seed("bootstrap"), 0]
    for name, of_prompts in (("difference", [0.5, 0.0, -0.5]), ("win_rate", [0.75, 0.5, 0.25])):
        values = np.array(of_prompts * 10)
        draws = bootstrap_groups(values, groups, ["sums"] * 30, 100, seed)
        expected = make_interval(values.mean(), draws, 30)
        assert row[name] == pytest.approx(vars(expected))


def test_comparisons_of_one_table_are_corrected_for_their_number():
    rng = np.random.default_rng(0)
    own = make_summary("head", give_sums(rng.integers(2, size=(60, 1)).tolist()))
    other = make_summary("fixed", give_sums(rng.integers(2, size=(60, 1)).tolist()))
    experiment = make_experiment(num_responses=1, num_bootstrap=5000)
    comparison = Comparison(experiment, make_prompts("test", 60), build_rewards(experiment))
    widths = {}
    for num in (1, 20):
        opponents = [Opponent("x", "X", {"sums": [other]})] * num
        rate = comparison.compare_on_task([own], opponents, "sums")[1]["win_rate"]
        widths[num] = rate["high"] - rate["low"]
    # Student's quantiles with 59 degrees of freedom: 2.00 and 3.15.
    assert widths[20] / widths[1] == pytest.approx(3.15 / 2.00, rel=0.1)


def test_prompts_of_one_group_count_as_one():
    own = make_summary("head", give_sums([[1]] * 19 + [[0]] * 41))
    other = make_summary("fixed", give_sums([[0]] * 60))
    experiment = make_experiment(num_responses=1)
    prompts = make_prompts("test", 60)[:60]
    grouped = [replace(p, group=str(i % 19)) for i, p in enumerate(prompts)]
    comparison = Comparison(experiment, grouped, build_rewards(experiment))
    opponent = Opponent("x", "X", {"sums": [other]})
    _, row = comparison.compare_on_task([own], [opponent], "sums")
    assert comparison.count_groups("sums") == 19
    assert row["win_rate"]["low"] is None
    assert row["verdict"] == TOO_FEW
    nameless = [replace(prompt, group="") for prompt in prompts]
    comparison = Comparison(experiment, nameless, build_rewards(experiment))
    with pytest.raises(DataError, match="prompt sums/test/0: group: missing"):
        comparison.compare_on_task([own], [opponent], "sums")


def test_training_seeds_and_streams_are_averaged():
    # Two seeds, two streams of one answer each, 30 prompts.
    first = make_summary("head", give_sums([[1, 1]] * 30))
    second = make_summary("head", give_sums([[0, 1]] * 30))
    other = make_summary("fixed", give_sums([[0, 0]] * 30))
    experiment = make_experiment(num_responses=1, num_streams=2)
    comparison = Comparison(experiment, make_prompts("test", 30), build_rewards(experiment))
    opponent = Opponent("x", "X", {"sums": [other]})
    head, row = comparison.compare_on_task([first, second], [opponent], "sums")
    assert head["metric"]["mean"] == pytest.approx(0.75)
    assert row["win_rate"]["mean"] == pytest.approx(0.875)
    # Prompts do not differ, seeds and streams do.
    assert row["win_rate"]["low"] < 0.875 < row["win_rate"]["high"]


def test_differences_are_paired_by_prompt():
    # Prompts differ much, the arms little: unpaired, the interval would be 30 times wider.
    level = np.linspace(0, 10, 40)
    own = make_summary("head", give_sums([[v + 0.1] for v in level]))
    other = make_summary("fixed", give_sums([[v] for v in level]))
    _, row = compare(own, other, "sums", 40, num_responses=1)
    assert row["difference"]["low"] == pytest.approx(0.1)
    assert row["difference"]["high"] == pytest.approx(0.1)
    assert row["metric"]["high"] - row["metric"]["low"] > 1


def test_further_rewards_break_ties_of_the_metric():
    own = make_summary("head", give_stories([[(1.0, 0.2), (0.5, 0.9), (0.5, 0.3), (0.5, 0.3)]]))
    other = make_summary("fixed", give_stories([[(0.5, 0.9), (0.5, 0.3), (0.5, 0.3), (0.5, 0.9)]]))
    _, row = compare(own, other, "stories", 1, num_responses=4)
    assert row["win_rate"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert row["difference"]["mean"] == pytest.approx(0.5 / 4)


def test_votes_are_compared_beside_single_answers():
    own = make_summary(
        "head",
        give_sums([[1, 0], [0, 0], [1, 1]]),
        votes={"sums/test/0": (1.0,), "sums/test/1": (0.5,), "sums/test/2": (1.0,)},
    )
    other = make_summary(
        "fixed",
        give_sums([[0, 0], [1, 0], [1, 1]]),
        votes={"sums/test/0": (0.5,), "sums/test/1": (1.0,), "sums/test/2": (1.0,)},
    )
    rows = compare(own, other, "sums", 3, majority=True)
    assert [(row["kind"], row["votes"]) for row in rows] == [
        ("head", 1),
        ("x", 1),
        ("head", 2),
        ("x", 2),
    ]
    assert rows[2]["metric"]["mean"] == pytest.approx(2.5 / 3)
    assert rows[3]["difference"]["mean"] == pytest.approx(0.0)
    assert rows[3]["win_rate"]["mean"] == pytest.approx(0.5)
    assert len(compare(own, other, "sums", 3)) == 2


def test_an_average_weighs_tasks_the_same_whatever_their_prompts():
    scores = give_sums([[1], [1], [1], [1]]) | give_stories([[(0.0, 0.0)]])
    own = make_summary("head", scores)
    other = make_summary("fixed", give_sums([[0]] * 4) | give_stories([[(1.0, 0.0)]]))
    experiment = make_experiment(num_responses=1)
    prompts = [*make_prompts("test", 4)[:4], *make_prompts("test", 1)[1:]]
    comparison = Comparison(experiment, prompts, build_rewards(experiment))
    opponent = Opponent("x", "X", {"sums": [other], "stories": [other]})
    head, row = comparison.compare_on_average([own], [opponent], ["sums", "stories"])
    assert head["metric"]["mean"] == pytest.approx(0.5)
    assert row["win_rate"]["mean"] == pytest.approx(0.5)
    assert row["arm"] == other.arm.name


def choose(sums: dict[float, list[float]], stories: dict[float, list[float]], order=1):
    """The best fixed temperatures, given the tasks' metrics on training prompts."""
    experiment = make_experiment()
    answers, arms = {}, []
    for temperature in [*sums][::order]:
        settings = dict.fromkeys(experiment.tasks, Setting(temperature))
        name = f"train-fixed-{temperature}"
        arms.append(Arm(name, "train", settings, 1, family="fixed", temperature=temperature))
        answers[name] = [
            make_response(f"sums/train/{i}", 0, scores={"correct": v})
            for i, v in enumerate(sums[temperature])
        ] + [
            make_response(f"stories/train/{i}", 0, scores={"starts": v, "varied": 0.0})
            for i, v in enumerate(stories[temperature])
        ]
    return choose_best_fixed(experiment, answers, arms)


def test_the_best_fixed_temperature_wins_most_often_in_its_task():
    best = choose(
        # 0.9 has the highest mean, from one prompt.
        {0.0: [0.2, 0.2, 0.0], 0.3: [0.3, 0.3, 0.3], 0.9: [0.0, 0.0, 9.0]},
        {0.0: [0.0, 0.0], 0.3: [0.1, 0.1], 0.9: [0.9, 0.9]},
    )
    assert best.by_task == {"sums": 0.3, "stories": 0.9}


@pytest.mark.parametrize("order", [1, -1])
def test_ties_of_the_best_go_to_the_lower_temperature(order):
    best = choose(
        {0.0: [0.0, 0.0], 0.3: [0.3, 0.6], 0.9: [0.6, 0.3]},
        {0.0: [0.5, 0.5], 0.3: [0.5, 0.5], 0.9: [0.5, 0.5]},
        order,
    )
    assert best.by_task == {"sums": 0.3, "stories": 0.0}
    assert best.overall == 0.3


def test_the_best_for_all_tasks_wins_most_often_on_average():
    # Plain means would choose 0.9, whose stories differ by hundreds.
    best = choose(
        {0.0: [0.8, 0.8], 0.3: [0.9, 0.9], 0.9: [0.0, 0.0]},
        {0.0: [0.0, 0.0], 0.3: [600.0, 600.0], 0.9: [700.0, 700.0]},
    )
    assert best.overall == 0.3


def test_nothing_is_best_without_training_prompts():
    assert choose_best_fixed(make_experiment(), {}, []) is None


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(0.53, 0.51, 0.55), BEATS),
        (Interval(0.47, 0.45, 0.49), LOSES),
        (Interval(0.53, 0.49, 0.57), UNDECIDED),
        (Interval(0.5, 0.5, 0.5), UNDECIDED),
        (Interval(0.53, 0.5, 0.55), UNDECIDED),
        (Interval(1.0, None, None), TOO_FEW),
    ],
)
def test_a_verdict_goes_by_the_interval(interval, verdict):
    assert judge_win_rate(interval) == verdict


def judged(kind: str, verdict: str, votes: int = 1) -> dict:
    rate = {"mean": 0.534, "low": 0.511, "high": 0.55}
    return {"kind": kind, "verdict": verdict, "votes": votes, "win_rate": rate}


def test_the_verdict_on_one_task_in_words():
    rows = [judged("meanshift", BEATS), judged("best_fixed", LOSES)]
    rows += [judged("shuffled", BEATS), judged("entropy", UNDECIDED), judged("self", UNDECIDED)]
    assert write_verdict("h", {"sums": [{"kind": "head", "votes": 1}, *rows]}, None) == (
        "On sums, head h beats MeanShift, its own mean temperature (53.4 % [51.1, 55.0]) and its "
        "own temperatures in random order (53.4 % [51.1, 55.0]); it loses to the best fixed "
        "temperature of the task (53.4 % [51.1, 55.0]); it cannot be told apart from EDT "
        "(53.4 % [51.1, 55.0]). Against itself with other seeds it wins 53.4 % [51.1, 55.0]."
    )


def test_the_verdict_on_several_tasks_is_that_of_the_average_and_names_each():
    average = [judged("meanshift", UNDECIDED), judged("self", UNDECIDED)]
    rows = {"a": [judged("meanshift", BEATS)], "b": [judged("meanshift", LOSES)]}
    rows["b"] += [judged("meanshift", UNDECIDED, votes=8), judged("shuffled", BEATS)]
    sentences = write_verdict("h", rows, average).split(". ")
    assert sentences[0].startswith("On average over 2 tasks, head h cannot be told apart from Me")
    assert sentences[2].startswith("On a it beats MeanShift")
    assert sentences[3].startswith("On b it loses to MeanShift")
    assert sentences[4].startswith("On b by majority vote of 8 it cannot be told apart from Mean")
    assert len(sentences) == 5


def test_the_verdict_says_when_the_noise_floor_is_off():
    rows = {"sums": [judged("meanshift", BEATS), judged("self", BEATS)]}
    assert "by chance alone: wins of this size mean nothing." in write_verdict("h", rows, None)


def test_too_few_groups_say_nothing():
    rows = {"sums": [judged("meanshift", TOO_FEW), judged("self", TOO_FEW)]}
    verdict = write_verdict("h", rows, None)
    assert "too few groups" in verdict
    assert "beats" not in verdict


def test_a_summary_votes_by_answer():
    experiment = make_experiment(num_responses=3, majority=True)
    texts = {"sums/test/0": ["3", "4", "4.0"], "sums/test/1": ["1", "2", "none"]}
    right = {"sums/test/0": "4", "sums/test/1": "2"}
    answers = [
        make_response(key, i, text=text, scores={"correct": float(text.startswith(right[key]))})
        for key, of_prompt in texts.items()
        for i, text in enumerate(of_prompt)
    ]
    arm = Arm("fixed-0", "fixed", {"sums": Setting(0.0)}, 3, temperature=0.0)
    summary = summarise_arm(arm, "token", answers, experiment, build_rewards(experiment))
    assert summary.votes == {"sums/test/0": (1.0,), "sums/test/1": (0.5,)}
    assert summary.temperatures == {"sums": pytest.approx(0.1)}
    assert summary.num_tokens == 12
    assert summary.finish_reasons == {"stop": 6}


def describe(tmp_path, head: str, answers: list[Response]) -> dict:
    experiment = make_experiment()
    metadata = read_heads(experiment, save_heads(tmp_path))[head].metadata
    prompts = make_prompts("test", 5)
    rewards = build_rewards(experiment)
    return describe_choices(experiment, metadata, answers, prompts, rewards, decode)


def write(prompt_id: str, text: str, temperatures: list[float], token_ids=None) -> Response:
    token_ids = token_ids or tuple(map(ord, text))
    return make_response(
        prompt_id, 0, text=text, temperatures=tuple(temperatures), token_ids=token_ids
    )


def test_temperatures_at_span_starts_and_elsewhere(tmp_path):
    answers = [
        # Spans begin at characters 1 and 4; the first character is before any.
        write("stories/test/0", " A. B. ", [0.9, 0.0, 0.3, 0.3, 0.3, 0.9, 0.9]),
        write("stories/test/1", "A.", [0.0, 0.9]),
    ]
    spans = describe(tmp_path, "tok", answers)["stories"]["spans"]["starts"]
    assert spans["num_starts"] == 3
    assert spans["num_elsewhere"] == 6
    assert spans["at_start"] == pytest.approx(0.1)
    assert spans["elsewhere"] == pytest.approx((0.9 + 0.3 + 0.3 + 0.9 + 0.9 + 0.9) / 6)
    means = spans["by_distance"]["means"]
    assert means == pytest.approx([0.1, (0.3 + 0.9 + 0.9) / 3, (0.3 + 0.9) / 2])
    assert spans["by_distance"]["counts"] == [3, 3, 2]
    # The mean over prompts, each of which weighs the same.
    first = (0.0 + 0.3) / 2 - (0.9 + 0.3 + 0.3 + 0.9 + 0.9) / 5
    assert spans["difference"]["mean"] == pytest.approx((first - 0.9) / 2)


def test_responses_whose_text_is_not_their_tokens_are_left_out_of_spans(tmp_path):
    answers = [
        write("stories/test/0", "A.", [0.0, 0.9]),
        write("stories/test/1", "B.", [0.3, 0.3], token_ids=(88, 88)),
    ]
    described = describe(tmp_path, "tok", answers)["stories"]
    assert described["spans"]["starts"]["num_responses_left_out"] == 1
    assert described["spans"]["starts"]["at_start"] == 0.0
    assert described["mean"] == pytest.approx(1.5 / 4)


def test_answers_without_spans_have_no_mean_there(tmp_path):
    answers = [write("stories/test/0", "...", [0.0, 0.9, 0.9])]
    spans = describe(tmp_path, "tok", answers)["stories"]["spans"]["starts"]
    assert spans["at_start"] is spans["difference"] is None
    assert spans["elsewhere"] == pytest.approx(0.6)
    assert spans["by_distance"]["means"] == []


def test_temperatures_by_position_end_where_few_responses_are_left(tmp_path):
    answers = [write(f"sums/test/{i % 5}", "ab", [0.0, 0.3]) for i in range(19)]
    answers.append(write("sums/test/0", "abc", [0.9, 0.3, 0.9]))
    curve = describe(tmp_path, "tok", answers)["sums"]["by_position"]
    assert curve["means"] == pytest.approx([0.9 / 20, 0.3])
    assert curve["counts"] == [20, 20]
    assert curve["errors"][0] > 0
    assert curve["errors"][1] == pytest.approx(0)


def test_a_sequence_level_head_counts_a_response_once(tmp_path):
    answers = [
        write("sums/test/0", "abcdefgh", [0.6] * 8),
        write("sums/test/1", "a", [0.0]),
        write("sums/test/2", "b", [0.0]),
    ]
    described = describe(tmp_path, "seq", answers)["sums"]
    assert described["mean"] == pytest.approx(0.2)
    assert described["std"] == pytest.approx(np.std([0.6, 0, 0]))
    assert described["counts"] == {"0": 2, "0.6": 1}
    assert described["by_position"] is None
    assert described["spans"] == {}


def test_results_hold_what_is_needed_to_judge_them(results):
    assert results["experiment"] == "test"
    assert results["model"] == {"name": "small", "fingerprint": "0" * 16}
    assert results["seed"] == 5
    assert results["tasks"]["sums"]["num_prompts"] == {"train": 4, "test": 25}
    assert results["num_responses"] == 4
    assert results["machine"]["num_cores"] >= 1
    assert results["machine"]["packages"]["torch"]
    assert results["tasks"]["sums"]["num_groups"] == {"train": 4, "test": 25}
    assert len(results["arms"]) == 5 + 6 * 5 + 4 + 4 + 5 + 4
    assert results["heads"]["tok"]["trained"] == [True]
    for head, tasks in (("tok", ["sums", "stories"]), ("seq", ["sums"])):
        assert list(results["heads"][head]["tasks"]) == tasks
    assert results["heads"]["seq"]["average"] is None
    kinds = [row["kind"] for row in results["heads"]["tok"]["average"]]
    expected = ["head", *["fixed"] * 5, "best_fixed", "best_fixed_overall", "meanshift"]
    expected += ["equal_surprisal", "shuffled", "dealt", "entropy", "min_p", "top_p", "card"]
    assert kinds == [*expected, "head_min_p", "self"]


def test_secondary_rewards_are_reported_for_every_arm_of_the_task(folder, results):
    rewards = results["tasks"]["stories"]["rewards"]
    assert "head-seq" not in rewards
    assert not [name for name in rewards if name.startswith("train-")]
    lines = (folder / "answers" / "fixed-0.3.jsonl").read_text().splitlines()
    answers = [answer for line in lines if (answer := json.loads(line))["task"] == "stories"]
    mean = sum(answer["scores"]["varied"] for answer in answers) / len(answers)
    assert rewards["fixed-0.3"]["varied"] == pytest.approx(mean)


def test_results_tell_neither_host_nor_user_nor_folder(folder):
    for name in ("results.json", "results.md"):
        content = (folder / name).read_text()
        assert str(folder) not in content
        assert "/tmp" not in content
        assert str(Path.home()) not in content
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", content)
        assert f'"{getpass.getuser()}"' not in content


def test_tables_show_what_the_json_holds(folder, results):
    content = (folder / "results.md").read_text()
    assert results["heads"]["tok"]["verdict"] in content
    row = next(
        row
        for row in results["heads"]["tok"]["tasks"]["sums"]["rows"]
        if row["kind"] == "meanshift" and row["votes"] == 4
    )
    metric, rate = row["metric"], row["win_rate"]
    (line,) = (
        line
        for line in content.splitlines()
        if re.match(r"\| MeanShift \(.*maj@4", line) and f"| {row['temperature']:.3f} |" in line
    )
    assert f"{metric['mean']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]" in line
    assert f"{100 * rate['mean']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]" in line
    widths = {}
    for line in content.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.split("|")[1], line.count("|"))
    assert set(widths.values()) <= {3, 4, 5, 6}
    assert "### sums: correct, 25 prompts in 25 groups (exploratory)" in content
    num = sum("win_rate" in row for row in results["heads"]["tok"]["tasks"]["sums"]["rows"])
    assert f"{num} comparisons; each interval has {100 - 5 / num:.2f} %." in content
    primary = render_tables(results | {"primary": True}, [])
    assert "exploratory" not in primary
    assert "Nothing was learnt" not in content
    heads = {"tok": results["heads"]["tok"] | {"trained": [True, False, False]}}
    failed = render_tables(results | {"heads": heads}, [])
    assert "Nothing was learnt in training 2, 3 of 3" in failed


def test_bold_is_what_excludes_no_difference(results):
    def render(low: float | None, high: float | None) -> str:
        changed = json.loads(json.dumps(results))
        rows = changed["heads"]["seq"]["tasks"]["sums"]["rows"]
        row = next(row for row in rows if row["kind"] == "entropy")
        row["label"] = "THIS"
        mean = 0.55 if low is None else (low + high) / 2
        row["win_rate"] = {"mean": mean, "low": low, "high": high}
        row["difference"] = {"mean": 0.0, "low": -0.1, "high": 0.1}
        content = render_tables(changed, [])
        return next(line for line in content.splitlines() if line.startswith("| THIS |"))

    assert render(0.52, 0.58).endswith("| +0.000 [-0.100, +0.100] | **55.0 [52.0, 58.0]** |")
    assert render(0.42, 0.48).endswith("| **45.0 [42.0, 48.0]** |")
    assert render(0.48, 0.58).endswith("| 53.0 [48.0, 58.0] |")
    assert render(None, None).endswith("| 55.0 |")


def test_spans_are_told_in_the_tables(folder, results):
    spans = results["heads"]["tok"]["tasks"]["stories"]["chosen"]["spans"]["starts"]
    # What the engine of the tests does: capitals begin sentences.
    assert spans["at_start"] == 0.0
    assert spans["elsewhere"] == pytest.approx(0.9)
    assert (
        "is 0.000 at the first token of a span of starts and 0.900 elsewhere"
        in (folder / "results.md").read_text()
    )


def test_plots_are_drawn_and_shown(folder):
    content = (folder / "results.md").read_text()
    for name in PLOTS:
        assert f"]({name})" in content
        pixels = imread(folder / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.01


def test_without_token_level_heads_there_are_no_curves(results, tmp_path):
    heads = {"seq": results["heads"]["seq"]}
    (tmp_path / "spans.png").write_bytes(b"of an earlier evaluation")
    drawn = draw_plots(results | {"heads": heads}, tmp_path)
    assert drawn == ["temperatures.png", "win_rates.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(drawn)
    write_report(results | {"heads": heads}, tmp_path, drawn)
    assert "spans.png" not in (tmp_path / "results.md").read_text()


def test_numbers_that_are_none_are_refused(results, tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_report(results | {"num_seconds": float("nan")}, tmp_path, [])
    assert list(tmp_path.iterdir()) == []
