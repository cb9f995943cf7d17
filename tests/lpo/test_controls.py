"""Controls: what of a head's temperatures each keeps, and how each is tuned."""

import json
from collections import Counter

import pytest

from adaptive_head.lpo.arms import ResponseKey, make_arm_key, read_heads
from adaptive_head.lpo.controls import (
    count_tuning_samples,
    find_equal,
    plan_arms,
    plan_controls,
    plan_tuned,
)
from adaptive_head.lpo.engine import Filters
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.lpo.settings import MIN_P, TOP_P, fill, list_rules, list_settings, read_card
from adaptive_head.lpo.tuning import rate_settings, tune
from adaptive_head.options import AdaptiveRequest
from tests.lpo.evaluation_setup import (
    list_policy,
    make_experiment,
    make_prompts,
    save_heads,
)
from tests.lpo.samples import make_response

TASKS = ("sums", "stories")


@pytest.fixture(autouse=True)
def with_list_policy():
    with list_policy():
        yield


@pytest.fixture
def heads(tmp_path):
    return read_heads(make_experiment(), save_heads(tmp_path))


def respond(
    prompt_id: str, sample: int, temperatures: list[float], logprob: float = -1.0
) -> Response:
    return make_response(
        prompt_id,
        sample,
        temperatures=tuple(temperatures),
        token_ids=tuple(range(len(temperatures))),
        logprobs=(logprob,) * len(temperatures),
    )


FIXED = {
    temperature: [respond(f"{task}/test/0", 0, [temperature], -1 - temperature) for task in TASKS]
    for temperature in (0.0, 0.5, 1.0)
}


def plan(head, answers, experiment=None) -> dict:
    """The control arms by kind."""
    arms = plan_controls(experiment or make_experiment(), head, answers, FIXED)
    return {arm.kind: arm for arm in arms}


def read_temperatures(arm, task: str) -> dict:
    return {task: setting.temperature for task, setting in arm.settings.items()}[task]


def read_lists(arm, task: str) -> dict[ResponseKey, list[float]]:
    return {
        key: list(setting.temperature.list.temperatures)
        for key, setting in arm.settings[task].items()
    }


def test_meanshift_is_the_mean_over_tokens_of_a_token_level_head(heads):
    answers = [
        respond("sums/test/0", 0, [0.0, 0.3, 0.9, 0.9]),
        respond("sums/test/1", 0, [0.3]),
        respond("stories/test/0", 0, [0.9, 0.0, 0.0]),
    ]
    meanshift = plan(heads["tok"], answers)["meanshift"]
    assert read_temperatures(meanshift, "sums") == 0.48
    assert read_temperatures(meanshift, "stories") == 0.3


def test_meanshift_is_the_mean_over_responses_of_a_sequence_level_head(heads):
    answers = [
        respond("sums/test/0", 0, [0.6] * 9),
        respond("sums/test/0", 1, [0.0]),
        respond("sums/test/1", 0, [0.0]),
        respond("sums/test/1", 1, []),
    ]
    assert read_temperatures(plan(heads["seq"], answers)["meanshift"], "sums") == 0.2


def test_meanshift_is_rounded_to_a_millionth(heads):
    answers = [respond("sums/test/0", 0, [0.0, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9])]
    answers.append(respond("stories/test/0", 0, [0.3]))
    assert read_temperatures(plan(heads["tok"], answers)["meanshift"], "sums") == 0.685714


def make_token_answers() -> list[Response]:
    sums = [respond(f"sums/test/{i}", 0, [0.0] * 6 + [0.9] * 2) for i in range(5)]
    return [*sums, respond("stories/test/0", 0, [0.9, 0.3, 0.3, 0.3])]


def test_the_equal_constant_is_as_surprising_as_the_head(heads):
    # At temperature t a token of the fixed arms is worth 1 + t nats.
    answers = [respond("sums/test/0", 0, [0.9], -1.7), respond("stories/test/0", 0, [0.9], -9.0)]
    equal = plan(heads["tok"], answers)["equal_surprisal"]
    assert read_temperatures(equal, "sums") == pytest.approx(0.7)
    # Beyond all fixed ones it is the hottest.
    assert read_temperatures(equal, "stories") == 1.0


def test_answers_without_log_probabilities_have_no_equal_constant():
    old = make_response("sums/test/0", 0, logprobs=None)
    with pytest.raises(DataError, match="sums/test/0, sample 0: logprobs: missing"):
        find_equal([old], FIXED, "sums")


def test_a_shuffled_answer_keeps_its_own_temperatures(heads):
    first = [0.0] * 10 + [0.9] * 2
    answers = [respond("sums/test/0", 0, first), respond("sums/test/1", 0, [0.3] * 40)]
    answers.append(respond("stories/test/0", 0, [0.9, 0.3]))
    lists = read_lists(plan(heads["tok"], answers)["shuffled"], "sums")
    # As long as an answer may become, and the multiset again after its end.
    shuffled = lists["sums/test/0", 0]
    assert len(shuffled) == 32
    assert Counter(shuffled[:12]) == Counter(shuffled[12:24]) == Counter(first)
    assert shuffled[:12] != first
    assert set(lists["sums/test/1", 0]) == {0.3}


def test_a_dealt_answer_has_the_temperatures_of_another_in_their_order(heads):
    answers = [respond(f"sums/test/{i}", 0, [0.3] * i + [0.9]) for i in range(8)]
    answers.append(respond("stories/test/0", 0, [0.9]))
    lists = read_lists(plan(heads["tok"], answers)["dealt"], "sums")
    starts = sorted(temperatures.index(0.9) for temperatures in lists.values())
    assert starts == list(range(8))
    own = {answer.key: list(answer.temperatures).index(0.9) for answer in answers[:8]}
    assert own != {key: temperatures.index(0.9) for key, temperatures in lists.items()}


def test_a_sequence_level_head_deals_its_choices_and_has_none_to_shuffle(heads):
    answers = [respond(f"sums/test/{i}", s, [0.6 * (i < 5)] * 3) for i in range(20) for s in (0, 1)]
    controls = plan(heads["seq"], answers)
    assert "shuffled" not in controls
    dealt = {
        key: setting.temperature for key, setting in controls["dealt"].settings["sums"].items()
    }
    assert dealt.keys() == {answer.key for answer in answers}
    assert sorted(dealt.values()) == sorted(answer.temperatures[0] for answer in answers)
    assert [dealt[answer.key] for answer in answers] != [a.temperatures[0] for a in answers]
    # Whatever order the answers came in.
    assert plan(heads["seq"], answers[::-1])["dealt"].settings == controls["dealt"].settings


def test_a_response_without_tokens_gets_a_temperature_all_the_same(heads):
    answers = [respond("sums/test/0", 0, []), respond("sums/test/0", 1, [0.6])]
    dealt = plan(heads["seq"], answers)["dealt"].settings["sums"]
    assert [setting.temperature for setting in dealt.values()] == [0.6, 0.6]


def test_a_head_that_wrote_nothing_has_no_controls(heads):
    with pytest.raises(DataError, match="head seq: not one token in its answers to sums"):
        plan(heads["seq"], [respond("sums/test/0", 0, [])])


def test_experiments_shuffle_apart(heads):
    answers = make_token_answers()
    other = make_experiment().model_copy(update={"name": "other"})
    lists = [
        read_lists(plan(heads["tok"], answers, experiment)["shuffled"], "sums")
        for experiment in (make_experiment(), other)
    ]
    assert lists[0] != lists[1]


def test_the_key_of_a_control_depends_on_the_choices_that_it_is_made_of(heads):
    experiment = make_experiment()
    prompts = make_prompts("test", 3)

    def make_keys(answers):
        arms = plan(heads["tok"], answers)
        return {kind: make_arm_key(experiment, heads, arm, prompts) for kind, arm in arms.items()}

    answers = make_token_answers()
    keys = make_keys(answers)
    assert make_keys(answers[::-1]) == keys
    # The same mean of other temperatures.
    moved = [*answers[:-1], respond("stories/test/0", 0, [0.9, 0.0, 0.0, 0.9])]
    assert {kind for kind, key in make_keys(moved).items() if key != keys[kind]} == {
        "shuffled",
        "dealt",
    }


@pytest.mark.parametrize("num", [2, 5, 8, 31])
def test_every_control_has_as_many_settings_as_there_are_fixed_temperatures(num):
    temperatures = [number / 10 for number in range(num)]
    for family in ("fixed", "entropy", "min_p", "top_p", "head_min_p"):
        settings = list_settings(family, temperatures, "tok")
        assert len({label for _, label in settings}) == len(settings) == num
    assert fill(MIN_P, num)[:2] == [0.1, 0.05]
    assert fill(TOP_P, num)[0] == 0.95
    assert all(0 < t0 <= 1 for t0, _ in list_rules(num))


def test_tuning_has_as_many_answers_as_a_head_was_trained_on(heads):
    experiment = make_experiment()
    arms = [arm for arm in plan_arms(experiment, heads) if arm.kind == "train"]
    families = Counter((arm.family, arm.head) for arm in arms)
    expected = [("fixed", None), ("entropy", None), ("min_p", None), ("top_p", None)]
    assert families == dict.fromkeys([*expected, ("head_min_p", "tok"), ("head_min_p", "seq")], 5)
    # 10 responses were rolled out to each prompt, and 5 settings share them.
    assert {arm.num_samples for arm in arms} == {2}
    assert count_tuning_samples(experiment, 3) == 4


def test_the_model_card_is_read(tmp_path):
    path = tmp_path / "generation_config.json"
    assert read_card(tmp_path).temperature == 1.0
    card = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": None, "eos_token_id": 2}
    path.write_text(json.dumps(card))
    setting = read_card(tmp_path)
    assert setting.temperature == 0.6
    assert setting.filters == Filters(top_p=0.9, top_k=20)
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert read_card(tmp_path).temperature == 0.0
    path.write_text(json.dumps({"top_p": "high"}))
    with pytest.raises(DataError, match=r"generation_config\.json: top_p must be a number"):
        read_card(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        read_card(tmp_path)


def rate(prompt: str, sample: int, **scores: float) -> Response:
    return make_response(prompt, sample, scores=scores)


def test_settings_are_rated_by_wins_and_not_by_means():
    # One large win against three small ones.
    first = [rate(f"stories/train/{i}", 0, starts=v, varied=0) for i, v in enumerate([9, 0, 0, 0])]
    second = [rate(f"stories/train/{i}", 0, starts=v, varied=0) for i, v in enumerate([0, 1, 1, 1])]
    rates = rate_settings(make_experiment(), [first, second], "stories")
    assert rates.tolist() == pytest.approx([(0.25 + 0.5) / 2, (0.75 + 0.5) / 2])


def test_further_rewards_break_ties_of_settings():
    first = [rate("stories/train/0", 0, starts=1, varied=0.1)]
    second = [rate("stories/train/0", 0, starts=1, varied=0.2)]
    rates = rate_settings(make_experiment(), [first, second], "stories")
    assert rates[1] > rates[0]


def test_what_training_prompts_chose_is_what_is_tested(heads, tmp_path):
    experiment = make_experiment()
    arms = [arm for arm in plan_arms(experiment, heads) if arm.kind == "train"]
    best = {"sums": {"0.05", "0.9", "0.667-1", "0.3"}, "stories": {"0.1", "0.95", "1-1", "0"}}
    answers = {
        arm.name: [
            rate(f"{task}/train/0", 0, **dict.fromkeys(names, float(arm.label in best[task])))
            for task, names in (("sums", ["correct"]), ("stories", ["starts", "varied"]))
            if task in arm.settings
        ]
        for arm in arms
    }
    tuned = plan_tuned(experiment, tmp_path, heads, tune(experiment, answers, arms))
    by_name = {arm.name: arm for arm in tuned}
    assert list(by_name) == [
        "card",
        "entropy",
        "min_p",
        "top_p",
        "head_min_p-tok",
        "head_min_p-seq",
    ]
    min_p = by_name["min_p"]
    assert {task: s.filters.min_p for task, s in min_p.settings.items()} == {
        "sums": 0.05,
        "stories": 0.1,
    }
    assert {setting.temperature for setting in min_p.settings.values()} == {1.0}
    assert min_p.label == "0.05, 0.1"
    assert by_name["top_p"].settings["sums"].filters == Filters(top_p=0.9)
    own = by_name["head_min_p-tok"].settings["sums"]
    assert (own.temperature, own.filters.min_p) == (AdaptiveRequest(head="tok"), 0.05)


def test_untuned_controls_have_their_first_settings(heads, tmp_path):
    tuned = plan_tuned(make_experiment(), tmp_path, heads, {})
    labels = {arm.kind: arm.label for arm in tuned}
    assert labels == {
        "card": None,
        "entropy": "1-1",
        "min_p": "0.1",
        "top_p": "0.95",
        "head_min_p": "0.1",
    }
