"""Prompts: checkable, distinct, the same for the same seed, and nothing shared by the splits."""

import json
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest

from adaptive_head.lpo.experiment import PromptConfig, TaskConfig, read_experiment
from adaptive_head.lpo.records import DataError, Prompt
from adaptive_head.lpo.tasks import (
    GENERATORS,
    PREFIX_TOKENS,
    WORDS,
    Split,
    encode_prompt,
    generate_prompts,
    make_prompts,
)


class WordTokenizer:
    """Enough of a tokenizer: a token for four letters of a word."""

    def __call__(self, text: str) -> dict[str, Any]:
        self.words = re.findall(r"\s*\S{1,4}", text)
        return {"input_ids": list(range(len(self.words)))}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.words[i] for i in token_ids)

    def apply_chat_template(self, messages: list[dict], **_: Any) -> dict[str, Any]:
        return self(" ".join(m["content"] for m in messages))


def generate(name: str, split: Split, num: int, seed: int = 0) -> list[Prompt]:
    config = PromptConfig(generate=name, num_train=num, num_test=num)
    return list(islice(generate_prompts(config, split, random.Random(seed), WordTokenizer()), num))


def get_content(prompt: Prompt) -> str:
    return prompt.messages[0]["content"] if prompt.messages else prompt.text or ""


@pytest.mark.parametrize("name", GENERATORS)
def test_prompts_are_distinct_and_repeatable_and_of_one_split(name: str) -> None:
    by_split = {split: generate(name, split, 40) for split in get_args(Split)}
    for split, prompts in by_split.items():
        assert len({get_content(prompt) for prompt in prompts}) == 40
        assert prompts == generate(name, split, 40)
        assert prompts != generate(name, split, 40, seed=1)
    train, test = ({get_content(p) for p in prompts} for prompts in by_split.values())
    assert not train & test


def test_the_splits_share_no_operands() -> None:
    def read(name: str, split: Split) -> set[tuple[int, ...]]:
        return {
            tuple(sorted(map(int, re.findall(r"\d+", get_content(prompt)))))
            for prompt in generate(name, split, 100)
        }

    for name in ("products", "sums"):
        assert not read(name, "train") & read(name, "test")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("stories", "adjectives"),
        ("stories", "nouns"),
        ("stories", "places"),
        ("lists", "categories"),
        ("explanations", "topics"),
    ],
)
def test_the_splits_share_no_content_words(name: str, kind: str) -> None:
    used = {
        split: {
            word
            for word in WORDS[kind]
            for prompt in generate(name, split, 60)
            if re.search(rf"\b{word}\b", get_content(prompt))
        }
        for split in get_args(Split)
    }
    assert used["train"]
    assert used["test"]
    assert not used["train"] & used["test"]


@pytest.mark.parametrize("name", GENERATORS)
def test_prompts_of_one_content_are_one_group_of_one_kind(name: str) -> None:
    by_split = {split: generate(name, split, 60) for split in get_args(Split)}
    groups = {split: {p.group for p in prompts} for split, prompts in by_split.items()}
    assert not groups["train"] & groups["test"]
    kinds: dict[str, str] = {}
    for prompt in by_split["train"] + by_split["test"]:
        assert prompt.group
        assert kinds.setdefault(prompt.group, prompt.kind) == prompt.kind != ""
    if name in ("products", "sums"):
        for prompt in by_split["test"]:
            operands = sorted(map(int, re.findall(r"\d+", get_content(prompt))))
            assert operands == list(map(int, re.findall(r"\d+", prompt.group)))
    elif name in ("stories", "constrained_stories", "lists", "explanations"):
        assert all(prompt.group in get_content(prompt) for prompt in by_split["test"])


def test_voting_is_tested_on_forty_operand_pairs_and_every_experiment_on_twenty_groups() -> None:
    for path in (Path(__file__).parents[2] / "experiments").glob("*.yaml"):
        experiment = read_experiment(path)
        if any(task.prompts.file for task in experiment.tasks.values()):
            continue
        seed = experiment.derive_seed("prompts")
        prompts = make_prompts(experiment.tasks, "test", seed, WordTokenizer())
        for task in experiment.tasks:
            groups = {prompt.group for prompt in prompts if prompt.task == task}
            assert len(groups) >= (40 if experiment.name == "voting" else 20), (path, task)


def test_two_experiments_draw_their_test_prompts_apart() -> None:
    experiment = read_experiment(Path(__file__).parents[2] / "experiments" / "constrained.yaml")
    titles = []
    for name in ("one", "two"):
        seed = experiment.model_copy(update={"name": name}).derive_seed("prompts")
        prompts = make_prompts(experiment.tasks, "test", seed, WordTokenizer())
        titles.append({prompt.group for prompt in prompts})
    assert len(titles[0] & titles[1]) < 0.1 * len(titles[0])


def test_references_are_right() -> None:
    for prompt in generate("arithmetic", "train", 100):
        a, b = map(int, re.findall(r"\d+", get_content(prompt)))
        is_sum = "+" in get_content(prompt)
        assert prompt.reference["answer"] == (a + b if is_sum else a * b)
    names = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
    for prompt in generate("lists", "test", 60):
        (word,) = [word for word in names if f"exactly {word}" in get_content(prompt)]
        assert prompt.reference["count"] == names[word]


def test_prose_is_cut_after_fifty_tokens() -> None:
    for prompt in generate("prose", "train", 40):
        assert prompt.text
        assert encode_prompt(WordTokenizer(), prompt) == tuple(range(PREFIX_TOKENS))


def make_task(num: int, **source: Any) -> dict[str, TaskConfig]:
    return {
        "mine": TaskConfig.model_validate(
            {
                "prompts": {"num_train": num, "num_test": num, **source},
                "max_tokens": 8,
                "rewards": {"fresh": {"kind": "repetition"}},
                "prefer": {"first": "fresh"},
            }
        )
    }


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_one_file_serves_both_splits_without_overlap(tmp_path: Path) -> None:
    lines = [{"text": f"line {n}", "answer": n, "group": f"{n}"} for n in range(10)]
    tasks = make_task(5, file=write_lines(tmp_path / "prompts.jsonl", lines))
    train = make_prompts(tasks, "train", 0, WordTokenizer())
    test = make_prompts(tasks, "test", 0, WordTokenizer())
    assert {p.text for p in train} | {p.text for p in test} == {line["text"] for line in lines}
    assert [p.id for p in train] == [f"mine/train/{n}" for n in range(5)]
    assert all(p.text == f"line {p.reference['answer']}" for p in train + test)
    with pytest.raises(DataError, match=r"tasks\.mine: only 4 of 6 test prompts"):
        make_prompts(make_task(6, file=tmp_path / "prompts.jsonl"), "test", 0, WordTokenizer())


def test_no_group_of_a_file_is_in_both_splits(tmp_path: Path) -> None:
    lines = [{"text": f"{n}", "group": f"{n // 3}", "kind": f"{n // 15}"} for n in range(30)]
    path = write_lines(tmp_path / "prompts.jsonl", lines)
    orders = set()
    for seed in range(5):
        train, test = (
            make_prompts(make_task(10, file=path), split, seed, WordTokenizer())
            for split in get_args(Split)
        )
        assert not {p.group for p in train} & {p.group for p in test}
        assert {(p.group, p.kind) for p in train + test} <= {(w["group"], w["kind"]) for w in lines}
        assert not any("kind" in p.reference or "group" in p.reference for p in train)
        orders.add(tuple(p.text for p in test))
    assert len(orders) == 5
    with pytest.raises(DataError, match=r"tasks\.mine: only \d+ of 16 test prompts"):
        make_prompts(make_task(16, file=path), "test", 0, WordTokenizer())


def test_the_kind_is_the_task_unless_a_line_names_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", [{"text": "a", "group": "a"}])
    (prompt,) = make_prompts(make_task(1, file=path), "train", 0, WordTokenizer())
    assert (prompt.group, prompt.kind) == ("a", "mine")


def test_a_group_of_two_kinds_is_refused(tmp_path: Path) -> None:
    lines = [{"text": "a", "group": "g", "kind": "k"}, {"text": "b", "group": "g"}]
    path = write_lines(tmp_path / "prompts.jsonl", lines)
    with pytest.raises(DataError, match=r"tasks\.mine: group 'g' has the kinds"):
        make_prompts(make_task(2, file=path), "train", 0, WordTokenizer())


def test_a_template_makes_chat_prompts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 2)
    source = {"file": path, "template": "{question}\nThink.", "group": "{question}"}
    (prompt,) = make_prompts(make_task(1, **source), "train", 0, WordTokenizer())
    assert prompt.messages == ({"role": "user", "content": "1 + 1?\nThink."},)
    assert prompt.reference["answer"] == "#### 2"
    assert prompt.group == "1 + 1?"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ('{"question": "?", "group": "g"}', "messages or text"),
        ('{"text": "", "group": "g"}', "must not be empty"),
        ('{"text": "a", "group": "g", "messages": [{"role": "u", "content": "b"}]}', "either"),
        ('{"messages": [{"role": "user"}], "group": "g"}', "role and content"),
        ('{"text": "a"}', "group: give a string that names the content"),
        ('{"text": "a", "group": 3}', "group: give a string"),
        ('{"text": "a", "group": "g", "kind": 3}', "kind: must be a string"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=rf"prompts\.jsonl, line 2: .*{reason}"):
        make_prompts(make_task(1, file=path), "train", 0, WordTokenizer())


def test_a_template_field_that_a_line_lacks_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", [{"question": "?", "group": "g"}])
    with pytest.raises(DataError, match="line 1: no 'problem'"):
        make_prompts(make_task(1, file=path, template="{problem}"), "train", 0, WordTokenizer())


def test_unknown_generators_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'poems' is not one of products, "):
        make_prompts(make_task(1, generate="poems"), "train", 0, WordTokenizer())
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        make_prompts(make_task(1, file=tmp_path / "nowhere.jsonl"), "train", 0, WordTokenizer())
