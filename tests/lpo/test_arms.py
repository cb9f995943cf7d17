import json

import pytest
import torch

from adaptive_head.checkpoint import BaseModelIdentity, HeadMetadata, load_head
from adaptive_head.head import gumbel_noise, select_sample
from adaptive_head.lpo.arms import (
    count_choices,
    fix_temperature,
    format_temperature,
    make_arm_key,
    plan_arms,
    plan_controls,
    read_heads,
    save_shuffled_heads,
)
from adaptive_head.lpo.experiment import EngineConfig, Experiment
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.options import AdaptiveRequest
from tests.lpo.evaluation_setup import make_experiment, make_prompts, save_heads
from tests.lpo.samples import make_response
from tests.processors import run_on


@pytest.fixture
def heads(tmp_path):
    return read_heads(make_experiment(), save_heads(tmp_path))


def respond(prompt_id: str, sample: int, temperatures: list[float]) -> Response:
    return make_response(
        prompt_id,
        sample,
        temperatures=tuple(temperatures),
        token_ids=tuple(range(len(temperatures))),
    )


def get_arm(arms, name):
    (arm,) = (arm for arm in arms if arm.name == name)
    return arm


def test_every_temperature_of_any_head_is_an_arm_on_both_splits(heads):
    names = [arm.name for arm in plan_arms(make_experiment(), heads)]
    fixed = ["0", "0.3", "0.6", "0.7", "0.9"]
    assert [n for n in names if n.startswith("fixed-")] == [f"fixed-{t}" for t in fixed]
    assert [n for n in names if n.startswith("train-")] == [f"train-{t}" for t in fixed]
    others = [n for n in names if not n.startswith(("fixed-", "train-"))]
    assert others == ["head-tok", "self-tok", "head-seq", "self-seq", "entropy"]
    assert len(names) == len(set(names))


def test_without_training_prompts_there_is_no_arm_for_them(heads):
    arms = plan_arms(make_experiment(num_train_prompts=0), heads)
    assert {arm.split for arm in arms} == {"test"}


def test_a_head_answers_the_tasks_that_it_was_trained_for(heads):
    arms = plan_arms(make_experiment(), heads)
    assert list(get_arm(arms, "head-tok").settings) == ["sums", "stories"]
    assert list(get_arm(arms, "head-seq").settings) == ["sums"]
    assert list(get_arm(arms, "entropy").settings) == ["sums", "stories"]


def test_a_head_that_the_experiment_does_not_know_answers_all_tasks(tmp_path):
    folders = save_heads(tmp_path)
    (found,) = read_heads(make_experiment(), {"other": folders["seq"]}).values()
    assert found.tasks == ("sums", "stories")


def test_a_head_for_none_of_the_tasks_is_refused(tmp_path):
    experiment = make_experiment()
    shrunk = experiment.model_copy(update={"tasks": {"stories": experiment.tasks["stories"]}})
    with pytest.raises(DataError, match="head seq belongs to no task"):
        read_heads(shrunk, save_heads(tmp_path))


def test_the_entropy_rule_has_the_settings_of_the_experiment(heads):
    experiment = make_experiment(entropy={"t0": 0.8, "theta": 0.4})
    setting = get_arm(plan_arms(experiment, heads), "entropy").settings["sums"]
    assert isinstance(setting, AdaptiveRequest)
    assert setting.policy == "entropy"
    assert setting.entropy == experiment.evaluation.entropy
    assert setting.entropy.t0 == 0.8


def test_seeds_are_the_same_in_all_arms_but_self(heads):
    experiment = make_experiment()
    prompts = make_prompts("test", 3)
    arms = plan_arms(experiment, heads)
    seeds = {
        arm.name: [arm.make_seed(experiment, p, sample) for p in prompts for sample in range(4)]
        for arm in arms
        if arm.split == "test"
    }
    common = seeds["fixed-0"]
    assert len(set(common)) == len(common)
    assert all(0 <= seed < 2**31 for seed in common)
    assert not set(common) & set(seeds["self-tok"])
    assert seeds["self-tok"] == seeds["self-seq"]
    assert all(s == common for name, s in seeds.items() if not name.startswith("self-"))
    other = experiment.model_copy(update={"seed": 6})
    assert get_arm(arms, "fixed-0").make_seed(other, prompts[0], 0) not in common


@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.2, 1.0, 2.0])
def test_a_temperature_of_vllm_is_left_to_vllm(temperature):
    assert fix_temperature(temperature) == temperature


@pytest.mark.parametrize("temperature", [0.004, 2.5])
def test_a_temperature_that_vllm_would_change_or_refuse_is_left_to_the_policy(temperature):
    setting = fix_temperature(temperature)
    assert isinstance(setting, AdaptiveRequest)
    assert setting.policy == "constant"
    assert setting.constant.temperature == temperature


@pytest.mark.parametrize(
    ("temperature", "name"), [(0.0, "0"), (0.2, "0.2"), (10.0, "10"), (1 / 3, "0.333333")]
)
def test_temperatures_are_named_as_short_as_they_are_exact(temperature, name):
    assert format_temperature(temperature) == name


def test_meanshift_is_the_mean_over_tokens_of_a_token_level_head(heads):
    answers = [
        respond("sums/test/0", 0, [0.0, 0.3, 0.9, 0.9]),
        respond("sums/test/1", 0, [0.3]),
        respond("stories/test/0", 0, [0.9, 0.0, 0.0]),
    ]
    meanshift, _ = plan_controls(make_experiment(), heads["tok"], answers)
    assert meanshift.settings == {"sums": 0.48, "stories": 0.3}


def test_meanshift_is_the_mean_over_responses_of_a_sequence_level_head(heads):
    answers = [
        respond("sums/test/0", 0, [0.6] * 9),
        respond("sums/test/0", 1, [0.0]),
        respond("sums/test/1", 0, [0.0]),
        respond("sums/test/1", 1, []),
    ]
    meanshift, _ = plan_controls(make_experiment(), heads["seq"], answers)
    assert meanshift.settings == {"sums": 0.2}


def test_meanshift_is_rounded_to_a_millionth(heads):
    answers = [respond("sums/test/0", 0, [0.0, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9])]
    answers.append(respond("stories/test/0", 0, [0.3]))
    meanshift, _ = plan_controls(make_experiment(), heads["tok"], answers)
    assert meanshift.settings["sums"] == 0.685714


def make_token_answers() -> list[Response]:
    sums = [respond(f"sums/test/{i}", 0, [0.0] * 6 + [0.9] * 2) for i in range(5)]
    return [*sums, respond("stories/test/0", 0, [0.9, 0.3, 0.3, 0.3])]


def test_a_shuffled_head_has_the_same_marginal_at_every_state(heads, tmp_path):
    _, shuffled = plan_controls(make_experiment(), heads["tok"], make_token_answers())
    folders = save_shuffled_heads(shuffled, heads["tok"].metadata, tmp_path / "controls")
    assert folders == {
        f"tok+{task}": tmp_path / "controls" / f"tok+{task}" for task in ("sums", "stories")
    }
    expected = {"sums": [0.75, 0.0, 0.25], "stories": [0.0, 0.75, 0.25]}
    for task, shares in expected.items():
        setting = shuffled.settings[task]
        assert setting == AdaptiveRequest(head=f"tok+{task}", select="sample")
        head = load_head(folders[setting.head], hidden_size=8, fingerprint="0" * 16)
        assert head.level == "token"
        assert not head.metadata.trained
        assert head.metadata.temperatures == heads["tok"].metadata.temperatures
        # Hidden states as large as they come, and nothing of them is seen.
        hidden = 1e4 * torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
        logits = head.network(hidden)
        assert torch.equal(logits, logits[:1].expand_as(logits))
        noise = gumbel_noise(torch.arange(20_000), torch.arange(20_000) % 50, 3)
        drawn = torch.bincount(select_sample(logits, noise), minlength=3) / 20_000
        assert drawn.tolist() == pytest.approx(shares, abs=0.012)
        # What the head never chose never comes.
        assert [share == 0 for share in drawn.tolist()] == [share == 0 for share in shares]


def test_shuffled_heads_are_replaced(heads, tmp_path):
    experiment = make_experiment()
    _, first = plan_controls(experiment, heads["tok"], make_token_answers())
    save_shuffled_heads(first, heads["tok"].metadata, tmp_path / "c")
    answers = [*make_token_answers(), respond("sums/test/9", 0, [0.3] * 40)]
    _, second = plan_controls(experiment, heads["tok"], answers)
    folders = save_shuffled_heads(second, heads["tok"].metadata, tmp_path / "c")
    logits = load_head(folders["tok+sums"]).network(torch.zeros(1, 8))
    assert logits.softmax(-1).tolist()[0] == pytest.approx([3 / 8, 1 / 2, 1 / 8])


def test_a_shuffled_sequence_level_head_deals_its_choices_anew(heads):
    answers = [respond(f"sums/test/{i}", s, [0.6 * (i < 5)] * 3) for i in range(20) for s in (0, 1)]
    _, shuffled = plan_controls(make_experiment(), heads["seq"], answers)
    dealt = shuffled.settings["sums"]
    assert dealt.keys() == {answer.key for answer in answers}
    assert sorted(dealt.values()) == sorted(answer.temperatures[0] for answer in answers)
    assert [dealt[answer.key] for answer in answers] != [a.temperatures[0] for a in answers]
    assert save_shuffled_heads(shuffled, heads["seq"].metadata, None) == {}
    # Whatever order the answers came in.
    _, again = plan_controls(make_experiment(), heads["seq"], answers[::-1])
    assert again.settings == shuffled.settings


def test_a_response_without_tokens_gets_a_temperature_all_the_same(heads):
    answers = [respond("sums/test/0", 0, []), respond("sums/test/0", 1, [0.6])]
    _, shuffled = plan_controls(make_experiment(), heads["seq"], answers)
    assert shuffled.settings["sums"] == {("sums/test/0", 0): 0.6, ("sums/test/0", 1): 0.6}


def test_a_head_that_wrote_nothing_has_no_controls(heads):
    with pytest.raises(DataError, match="head seq: not one token in its answers to sums"):
        plan_controls(make_experiment(), heads["seq"], [respond("sums/test/0", 0, [])])


def describe_head(*temperatures: float, select="argmax") -> HeadMetadata:
    return HeadMetadata(
        choices=temperatures,
        level="token",
        select=select,
        hidden_size=8,
        layer_sizes=(),
        base_model=BaseModelIdentity(name="tiny"),
        trained=True,
        created="",
        packages={},
    )


def test_choices_are_counted_however_the_worker_rounded_them():
    third = 1 / 3
    choices = [0.0, 0.333333, 0.333333, 1.7, 0.0000004]
    assert count_choices(describe_head(0.0, third, 1.7), choices).tolist() == [2, 2, 1]


def test_means_are_counted_by_the_nearest_bound():
    head = describe_head(0.0, 1.0, select="mean")
    counted = count_choices(head, [0.0, 0.04, 0.07, 0.66, 0.7, 0.999999, 1.0])
    assert dict(zip(head.bounds, counted.tolist(), strict=True)) == (
        dict.fromkeys(head.bounds, 0) | {0.0: 2, 0.1: 1, 0.7: 2, 1.0: 2}
    )


@pytest.mark.parametrize("choice", [0.32, 0.4, 1.8, -0.1])
def test_a_temperature_that_is_not_the_heads_is_refused(choice):
    with pytest.raises(DataError, match=f"{choice:g} is not a temperature of the head"):
        count_choices(describe_head(0.0, 1 / 3, 1.7), [0.0, choice])


def change(experiment: Experiment, **changes) -> Experiment:
    content = json.loads(experiment.model_dump_json())
    content["tasks"]["sums"] |= changes.pop("sums", {})
    return Experiment.model_validate(content | changes)


def test_a_key_depends_on_what_the_answers_depend_on(heads, tmp_path):
    experiment = make_experiment()
    prompts = make_prompts("test", 3)
    arms = {arm.name: arm for arm in plan_arms(experiment, heads)}

    def find_changed(experiment=experiment, heads=heads, prompts=prompts) -> set[str]:
        changed = {arm.name: arm for arm in plan_arms(experiment, heads)}
        return {
            name
            for name, arm in arms.items()
            if make_arm_key(make_experiment(), heads_before, arm, make_prompts("test", 3))
            != make_arm_key(experiment, heads, changed[name], prompts)
        }

    heads_before = heads
    everything, with_stories = set(arms), set(arms) - {"head-seq", "self-seq"}
    assert find_changed() == set()
    assert find_changed(make_experiment(num_responses=9, num_bootstrap=7)) == set()
    assert find_changed(change(experiment, seed=6)) == everything
    assert find_changed(change(experiment, sums={"max_tokens": 9})) == everything
    rewards = {"correct": {"kind": "number", "extract": "first"}}
    assert find_changed(change(experiment, sums={"rewards": rewards})) == everything
    assert find_changed(make_experiment(entropy={"t0": 0.5})) == {"entropy"}
    assert find_changed(prompts=prompts[:-1]) == with_stories
    other = read_heads(experiment, save_heads(tmp_path / "other", seed=1))
    assert find_changed(heads=heads | {"tok": other["tok"]}) == {"head-tok", "self-tok"}


def test_the_key_of_a_control_depends_on_the_choices_that_it_is_made_of(heads):
    experiment = make_experiment()
    prompts = make_prompts("test", 3)

    def make_keys(name, answers):
        arms = plan_controls(experiment, heads[name], answers)
        return [make_arm_key(experiment, heads, arm, prompts) for arm in arms]

    answers = make_token_answers()
    keys = make_keys("tok", answers)
    assert make_keys("tok", answers[::-1]) == keys
    # The same mean of other temperatures: another histogram, the same MeanShift.
    moved = [*answers[:-1], respond("stories/test/0", 0, [0.9, 0.0, 0.0, 0.9])]
    assert [a == b for a, b in zip(make_keys("tok", moved), keys, strict=True)] == [True, False]


def test_answers_in_float32_are_not_compared_with_those_in_the_checkpoints_dtype(
    heads, monkeypatch
):
    prompts = make_prompts("test", 3)

    def make_keys(experiment):
        keys = []
        for processor in ("Zen 4", "Skylake"):
            run_on(monkeypatch, processor)
            keys.append(make_arm_key(experiment, heads, plan_arms(experiment, heads)[0], prompts))
        return keys

    fast, emulated = make_keys(make_experiment())
    assert fast != emulated
    engine = {"engine": EngineConfig(dtype="bfloat16")}
    fast, emulated = make_keys(make_experiment().model_copy(update=engine))
    assert fast == emulated
