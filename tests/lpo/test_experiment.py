"""Experiment files: what ships loads, and a mistake is named before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from adaptive_head.lpo.experiment import Experiment, derive_seed, digest, read_experiment
from adaptive_head.lpo.records import DataError

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))


def make_content(**changes: Any) -> dict[str, Any]:
    """A small valid experiment."""
    task = {
        "prompts": {"generate": "sums", "num_train": 4, "num_test": 2},
        "max_tokens": 8,
        "rewards": {"correct": {"kind": "number"}},
        "prefer": {"first": "correct"},
    }
    content = {"name": "mine", "tasks": {"sums": task}, "heads": {"token": {"level": "token"}}}
    return content | changes


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_ships_loads_and_shrinks(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.name == path.stem
    small = experiment.shrink()
    assert small.heads.keys() == experiment.heads.keys()
    assert sum(task.prompts.num_train for task in small.tasks.values()) <= 40
    # The shrunk form is as valid as one that was read.
    assert Experiment.model_validate(small.model_dump()) == small


def test_the_experiments_of_the_paper_are_there() -> None:
    names = {path.stem for path in FILES}
    assert names >= {"repeats", "mix", "constrained", "voting", "losses", "gsm8k"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nmae": 1}, "nmae: Extra inputs"),
        ({"name": "../up"}, "name: String should match"),
        ({"seed": -1}, "seed: "),
        ({"heads": {}}, "heads: "),
        ({"heads": {"a": {"level": "word"}}}, "heads.a.level: "),
        ({"heads": {"a": {"level": "token", "beta": 0}}}, "heads.a.beta: "),
        ({"heads": {"a": {"level": "token", "temperatures": [0.5, 0.2]}}}, "increasing"),
        ({"heads": {"a": {"level": "token", "tasks": ["poems"]}}}, "poems is not a task"),
        ({"heads": {"a": {"level": "sequence", "credit": "span"}}}, "credit: "),
        ({"heads": {"a": {"level": "sequence", "loss": "cross_entropy"}}}, "cross_entropy"),
        ({"engine": {"num_replicas": 2}}, "num_replicas needs the backend"),
        ({"evaluation": {"num_responses": 0}}, "evaluation.num_responses: "),
        ({"evaluation": {"fixed": [11]}}, "evaluation.fixed.0: "),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(make_content(**changes)))
    with pytest.raises(DataError) as caught:
        read_experiment(path)
    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompts": {"num_train": 1, "num_test": 1}}, "either generate or file"),
        ({"prompts": {"generate": "sums", "file": "a", "num_train": 1, "num_test": 1}}, "either"),
        ({"prefer": {"first": "nice"}}, "'nice' is not one of the rewards (correct)"),
        ({"compare": ["nice"]}, "'nice' is not one of the rewards"),
        ({"rewards": {}}, "rewards: "),
        ({"rewards": {"correct": {"kind": "magic"}}}, "kind"),
    ],
)
def test_mistakes_in_a_task_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    content = make_content()
    content["tasks"]["sums"] |= changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(DataError) as caught:
        read_experiment(path)
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "\tname: x"])
def test_what_is_no_experiment_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"mine\.yaml"):
        read_experiment(path)
    with pytest.raises(DataError, match=r"nowhere\.yaml"):
        read_experiment(tmp_path / "nowhere.yaml")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    content = make_content()
    content["tasks"]["sums"]["prompts"] = {"file": "a.jsonl", "num_train": 1, "num_test": 1}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_experiment(path).tasks["sums"].prompts.file == tmp_path / "a.jsonl"


def test_a_primary_experiment_has_three_trainings_and_streams(tmp_path: Path) -> None:
    enough = {"num_training_seeds": 3, "evaluation": {"num_streams": 3}}
    assert Experiment.model_validate(make_content(primary=True, **enough)).primary
    for missing in enough:
        few = {key: value for key, value in enough.items() if key != missing}
        with pytest.raises(ValueError, match=r"primary: .* must be at least 3"):
            Experiment.model_validate(make_content(primary=True, **few))
    primary = [path.stem for path in FILES if read_experiment(path).primary]
    assert primary == ["mix"]


def test_experiments_of_different_names_share_no_seed() -> None:
    first, second = (Experiment.model_validate(make_content(name=n)) for n in ("a", "b"))
    parts = [("rollout", 0), ("rollout", 1), ("evaluation", 0), ("bootstrap",), ("prompts",)]
    seeds = {experiment.derive_seed(*part) for experiment in (first, second) for part in parts}
    assert len(seeds) == 2 * len(parts)
    recipe = first.heads["token"]
    trainings = {e.seed_recipe(recipe, n).seed for e in (first, second) for n in range(3)}
    assert len(trainings) == 6


def test_seeds_depend_on_everything_and_fit() -> None:
    seeds = {derive_seed(0, "rollout", prompt, n) for prompt in ("p", "q") for n in range(500)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(1, "a") == derive_seed(1, "a") != derive_seed(2, "a")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_outside_tasks_are_an_experiment_of_their_own() -> None:
    shipped = read_experiment(FOLDER / "shipped.yaml")
    outside = shipped.look_outside()
    assert outside is not None
    assert outside.tasks == shipped.outside and not outside.outside
    assert outside.derive_seed("a") != shipped.derive_seed("a")
    assert read_experiment(FOLDER / "gsm8k.yaml").look_outside() is None


def test_a_file_of_outside_tasks_is_read_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    tasks = make_content()["tasks"]
    tasks["sums"]["prompts"] = {"file": "sums.jsonl", "num_train": 1, "num_test": 1}
    (tmp_path / "far" / "tasks.yaml").write_text(yaml.safe_dump({"chat": tasks["sums"]}))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(make_content(outside="far/tasks.yaml")))
    assert read_experiment(path).outside["chat"].prompts.file == tmp_path / "far" / "sums.jsonl"
    (tmp_path / "far" / "tasks.yaml").write_text("chat: 3")
    with pytest.raises(DataError, match=r"tasks\.yaml: chat: Input should be a valid dict"):
        read_experiment(path)
    path.write_text(yaml.safe_dump(make_content(outside="nowhere.yaml")))
    with pytest.raises(DataError, match=r"nowhere\.yaml: .*No such file"):
        read_experiment(path)


def test_an_experiment_on_disk_names_no_folder_of_this_machine() -> None:
    shipped = read_experiment(FOLDER / "shipped.yaml")
    written = shipped.model_dump_json()
    assert str(FOLDER) not in written
    read = Experiment.model_validate_json(written)
    assert read.ready_heads.keys() == shipped.ready_heads.keys()
    assert read.tasks == shipped.tasks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {}}, "heads: give at least one, here or in ready_heads"),
        ({"ready_heads": {"token": "x"}}, r"ready_heads\.token: heads has one of this name"),
        ({"outside": make_content()["tasks"]}, r"outside\.sums: tasks has one of this name"),
    ],
)
def test_heads_and_outside_tasks_have_names_of_their_own(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate(make_content(**changes))
