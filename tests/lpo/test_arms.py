import json

import pytest

from adaptive_head.checkpoint import BaseModelIdentity, HeadMetadata
from adaptive_head.lpo.arms import (
    Setting,
    count_choices,
    fix_temperature,
    format_temperature,
    make_arm_key,
    read_heads,
)
from adaptive_head.lpo.controls import plan_arms
from adaptive_head.lpo.experiment import EngineConfig, Experiment
from adaptive_head.lpo.records import DataError
from adaptive_head.options import AdaptiveRequest
from tests.lpo.evaluation_setup import make_experiment, make_prompts, save_heads
from tests.processors import run_on


@pytest.fixture
def heads(tmp_path):
    return read_heads(make_experiment(), save_heads(tmp_path))


def get_arm(arms, name):
    (arm,) = (arm for arm in arms if arm.name == name)
    return arm


def test_every_temperature_of_any_head_is_an_arm_on_both_splits(heads):
    names = [arm.name for arm in plan_arms(make_experiment(), heads)]
    fixed = ["0", "0.3", "0.6", "0.7", "0.9"]
    assert [n for n in names if n.startswith("fixed-")] == [f"fixed-{t}" for t in fixed]
    assert [n for n in names if n.startswith("train-fixed-")] == [f"train-fixed-{t}" for t in fixed]
    others = [n for n in names if not n.startswith(("fixed-", "train-"))]
    assert others == ["head-tok", "self-tok", "head-seq", "self-seq"]
    assert len(names) == len(set(names))


def test_without_training_prompts_there_is_no_arm_for_them(heads):
    arms = plan_arms(make_experiment(num_train_prompts=0), heads)
    assert {arm.split for arm in arms} == {"test"}


def test_a_head_answers_the_tasks_that_it_was_trained_for(heads):
    arms = plan_arms(make_experiment(), heads)
    assert list(get_arm(arms, "head-tok").settings) == ["sums", "stories"]
    assert list(get_arm(arms, "head-seq").settings) == ["sums"]
    assert list(get_arm(arms, "fixed-0").settings) == ["sums", "stories"]


def test_a_head_that_the_experiment_does_not_know_answers_all_tasks(tmp_path):
    folders = save_heads(tmp_path)
    (found,) = read_heads(make_experiment(), {"other": folders["seq"]}).values()
    assert found.tasks == ("sums", "stories")


def test_a_head_for_none_of_the_tasks_is_refused(tmp_path):
    experiment = make_experiment()
    shrunk = experiment.model_copy(update={"tasks": {"stories": experiment.tasks["stories"]}})
    with pytest.raises(DataError, match="head seq belongs to no task"):
        read_heads(shrunk, save_heads(tmp_path))


def test_heads_of_further_training_seeds_answer_what_the_first_does(tmp_path):
    experiment = make_experiment(num_training_seeds=2)
    heads = read_heads(experiment, save_heads(tmp_path, num_seeds=2))
    assert list(heads) == ["tok", "tok+2", "seq", "seq+2"]
    assert [head.base for head in heads.values()] == ["tok", "tok", "seq", "seq"]
    assert heads["seq+2"].tasks == ("sums",)
    names = {arm.name for arm in plan_arms(experiment, heads)}
    assert names >= {"head-tok", "head-tok+2", "self-tok+2", "head-seq+2"}


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
    for change in ({"seed": 6}, {"name": "other"}):
        other = experiment.model_copy(update=change)
        assert get_arm(arms, "fixed-0").make_seed(other, prompts[0], 0) not in common


@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.2, 1.0, 2.0])
def test_a_temperature_of_vllm_is_left_to_vllm(temperature):
    assert fix_temperature(temperature) == Setting(temperature)


@pytest.mark.parametrize("temperature", [0.004, 2.5])
def test_a_temperature_that_vllm_would_change_or_refuse_is_left_to_the_policy(temperature):
    request = fix_temperature(temperature).temperature
    assert isinstance(request, AdaptiveRequest)
    assert request.policy == "constant"
    assert request.constant.temperature == temperature


@pytest.mark.parametrize(
    ("temperature", "name"), [(0.0, "0"), (0.2, "0.2"), (10.0, "10"), (1 / 3, "0.333333")]
)
def test_temperatures_are_named_as_short_as_they_are_exact(temperature, name):
    assert format_temperature(temperature) == name


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
    everything = set(arms)
    with_stories = {name for name, arm in arms.items() if "stories" in arm.settings}
    assert find_changed() == set()
    assert find_changed(make_experiment(num_responses=9, num_bootstrap=7)) == set()
    assert find_changed(change(experiment, seed=6)) == everything
    assert find_changed(change(experiment, name="other")) == everything
    assert find_changed(change(experiment, sums={"max_tokens": 9})) == everything
    rewards = {"correct": {"kind": "number", "extract": "first"}}
    assert find_changed(change(experiment, sums={"rewards": rewards})) == everything
    assert find_changed(prompts=prompts[:-1]) == with_stories
    other = read_heads(experiment, save_heads(tmp_path / "other", seed=1))
    changed = find_changed(heads=heads | {"tok": other["tok"]})
    assert changed == {name for name in arms if "tok" in name}


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
