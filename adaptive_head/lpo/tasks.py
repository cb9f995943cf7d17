"""Prompts for training and evaluation: generators of tasks that a program can check, and files.

Training and test prompts of a generator share no content: operands, title words, categories and
passages are dealt to one split or the other, in every experiment alike. So no experiment is tested
on what another was trained on. Prompts are drawn by the experiment's name and seed: two
experiments draw their test prompts apart. Where the pool is small, they draw many of the same
contents all the same: there are 36 products of one-digit operands and a few dozen categories, but
thousands of titles.

Each prompt names its group, the content by which it resembles others, and its kind.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from adaptive_head.lpo.experiment import PromptConfig, TaskConfig
from adaptive_head.lpo.records import DataError, Prompt

Split = Literal["train", "test"]
PREFIX_TOKENS = 50
# What titles, lists and explanations are made of.
WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("words.json").read_text())


def make_prompts(
    tasks: dict[str, TaskConfig], split: Split, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """The prompts of every task for one split.

    Args:
        seed: of the experiment's prompts: `experiment.derive_seed("prompts")`.

    Raises:
        DataError: names the file and line, or the task that has too few prompts.
    """
    prompts = []
    for task, config in tasks.items():
        source = config.prompts
        wanted = source.num_train if split == "train" else source.num_test
        rng = random.Random(f"{seed}/{task}/{split}")
        if source.file:
            found = read_prompts(source, split, rng, random.Random(f"{seed}/{task}"))
        else:
            found = generate_prompts(source, split, rng, tokenizer)
        numbered = enumerate(islice(found, wanted))
        made = [
            replace(p, id=f"{task}/{split}/{number}", task=task, kind=p.kind or task)
            for number, p in numbered
        ]
        check_kinds(task, made)
        if len(made) < wanted:
            raise DataError(f"tasks.{task}: only {len(made)} of {wanted} {split} prompts")
        prompts += made
    return prompts


def check_kinds(task: str, prompts: Sequence[Prompt]) -> None:
    """Raise DataError if prompts of one group are of several kinds: it could not be resampled."""
    kinds: dict[str, str] = {}
    for prompt in prompts:
        kind = kinds.setdefault(prompt.group, prompt.kind)
        if kind != prompt.kind:
            raise DataError(
                f"tasks.{task}: group {prompt.group!r} has the kinds {kind!r} and {prompt.kind!r}"
            )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """A prompt's token ids, as the server would make them."""
    if prompt.messages is None:
        return tuple(tokenizer(prompt.text)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def read_prompts(
    source: PromptConfig, split: Split, rng: random.Random, shared_rng: random.Random
) -> Iterator[Prompt]:
    """Prompts of a JSONL file; one file serves both splits where there is no test file.

    Args:
        rng: of this split.
        shared_rng: of both splits, which take the groups of one file in the same order, from its
            different ends. No group is in both.
    """
    is_apart = split == "test" and source.test_file
    path = source.test_file if is_apart else source.file
    assert path is not None
    prompts = [make_prompt(path, number, content, source) for number, content in read_lines(path)]
    if source.test_file:
        rng.shuffle(prompts)
    else:
        shared_rng.shuffle(prompts)
        by_group: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            by_group.setdefault(prompt.group, []).append(prompt)
        prompts = [prompt for members in by_group.values() for prompt in members]
        if split == "test":
            trained = {prompt.group for prompt in prompts[: source.num_train]}
            prompts = [p for p in reversed(prompts) if p.group not in trained]
    yield from prompts


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with their line numbers; empty lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(content, dict):
            raise DataError(f"{path}, line {number}: must be an object")
        yield number, content


def make_prompt(path: Path, number: int, content: dict[str, Any], source: PromptConfig) -> Prompt:
    """One line of a prompt file as a prompt.

    What is neither text nor messages nor group nor kind is its reference.

    Raises:
        DataError: names the file, the line and what is wrong.
    """
    where = f"{path}, line {number}"
    own = ("messages", "text", "group", "kind")
    reference = {key: value for key, value in content.items() if key not in own}
    try:
        group = source.group.format_map(content) if source.group else content.get("group")
        if not isinstance(group, str) or not group:
            raise ValueError(
                "group: give a string that names the content which prompts share, such as their "
                "operands or their title; or set prompts.group to a template of a line's keys"
            )
        kind = content.get("kind", "")
        if not isinstance(kind, str):
            raise ValueError("kind: must be a string")
        if source.template is not None:
            prompt = ask(source.template.format_map(content), group, **reference)
        else:
            prompt = Prompt("", "", **read_content(content), reference=reference, group=group)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{where}: {reason}") from None
    return replace(prompt, kind=kind)


def read_content(line: dict[str, Any]) -> dict[str, Any]:
    """The `messages` and `text` of a line, of which a prompt has one; ValueError without either."""
    messages, text = line.get("messages"), line.get("text")
    if messages is not None:
        is_chat = isinstance(messages, list) and all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in messages
        )
        if not is_chat:
            raise ValueError("messages must be a list of objects with role and content")
        messages = tuple(messages)
    elif not isinstance(text, str):
        raise ValueError("give messages or text (a string)")
    return {"messages": messages, "text": text}


def ask(content: str, group: str, kind: str = "", /, **reference: Any) -> Prompt:
    """A prompt of one user message."""
    messages = ({"role": "user", "content": content},)
    return Prompt("", "", messages=messages, reference=reference, group=group, kind=kind)


def belongs(split: Split, *parts: object) -> bool:
    """Deals contents to the splits, half to each, whatever the experiment's seed."""
    is_test = hashlib.sha256(repr(parts).encode()).digest()[0] & 1
    return bool(is_test) == (split == "test")


def generate_prompts(
    source: PromptConfig, split: Split, rng: random.Random, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Prompt]:
    """Distinct prompts of a generator, until it has no new ones."""
    if source.generate not in GENERATORS:
        raise DataError(f"generate: {source.generate!r} is not one of {', '.join(GENERATORS)}")
    generator = GENERATORS[source.generate]
    seen = set()
    for prompt in generator(split, rng, tokenizer):
        content = (prompt.messages[0]["content"] if prompt.messages else prompt.text) or ""
        if content not in seen:
            seen.add(content)
            yield prompt


Generator = Callable[[Split, random.Random, PreTrainedTokenizerBase], Iterator[Prompt]]
MAX_ATTEMPTS = 20_000


def generate_products(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """One digit times one digit, in several wordings."""
    wordings = (
        "What is {} times {}?",
        "What is {} x {}?",
        "Calculate {} times {}.",
        "What is the product of {} and {}?",
    )
    for _attempt in range(MAX_ATTEMPTS):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        if belongs(split, "product", *sorted((a, b))):
            question = rng.choice(wordings).format(a, b)
            yield ask(question, f"{min(a, b)} x {max(a, b)}", "products", answer=a * b)


def generate_sums(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """The sum of two numbers up to twenty."""
    for _attempt in range(MAX_ATTEMPTS):
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        if belongs(split, "sum", *sorted((a, b))):
            yield ask(f"What is {a} + {b}?", f"{min(a, b)} + {max(a, b)}", "sums", answer=a + b)


def generate_arithmetic(split: Split, rng: random.Random, tokenizer: Any) -> Iterator[Prompt]:
    """Products and sums in turn."""
    products = generate_products(split, rng, tokenizer)
    sums = generate_sums(split, rng, tokenizer)
    for two in zip(products, sums, strict=False):
        yield from two


def list_words(split: Split, kind: str) -> list[str]:
    """The words of a kind that belong to a split."""
    return [word for word in WORDS[kind] if belongs(split, word)]


def make_title(split: Split, rng: random.Random) -> str:
    """A story's title; no noun, adjective or place stands in both splits."""
    adjective, noun, place = (
        rng.choice(list_words(split, kind)) for kind in ("adjectives", "nouns", "places")
    )
    return f"The {adjective} {noun} of {place}"


def generate_stories(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """A short story from a title, as in §3.2 of arXiv 2411.09661."""
    for _attempt in range(MAX_ATTEMPTS):
        title = make_title(split, rng)
        question = f"Write a short story with the following title.\n\nTitle: {title}"
        yield ask(question, title, "stories")


def generate_constrained_stories(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """A story whose sentences all begin with one word, after §3.3 of arXiv 2411.09661."""
    for _attempt in range(MAX_ATTEMPTS):
        title = make_title(split, rng)
        yield ask(
            f'Write a short story with the title "{title}". '
            'Every sentence must begin with the word "She".',
            title,
            "constrained_stories",
        )


NUMBERS = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}


def generate_lists(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """Exactly so many items on one line: an instruction that a program can check."""
    wordings = (
        "List exactly {} {}, separated by commas, on one line.",
        "Name exactly {} {}, separated by commas, on one line.",
        "Write the names of exactly {} {} on one line, separated by commas.",
    )
    categories = list_words(split, "categories")
    for _attempt in range(MAX_ATTEMPTS):
        word = rng.choice(list(NUMBERS))
        category = rng.choice(categories)
        question = rng.choice(wordings).format(word, category)
        yield ask(question, category, "lists", count=NUMBERS[word])


LIMITS = (20, 25, 30, 35, 40)


def generate_explanations(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """A short explanation with a limit on its words: general instructions."""
    topics = list_words(split, "topics")
    for _attempt in range(MAX_ATTEMPTS):
        limit, topic = rng.choice(LIMITS), rng.choice(topics)
        question = f"Explain {topic} in at most {limit} words."
        yield ask(question, topic, "explanations", max_words=limit)


def generate_prose(split: Split, rng: random.Random, tokenizer: Any) -> Iterator[Prompt]:
    """The first 50 tokens of a paragraph of the Python manual, which comes with every Python."""
    from pydoc_data.topics import topics

    paragraphs = [
        (topic, " ".join(paragraph.split()))
        for topic, text in sorted(topics.items())
        if belongs(split, topic)
        for paragraph in re.split(r"\n\s*\n", text)
        if is_prose(paragraph)
    ]
    rng.shuffle(paragraphs)
    for topic, paragraph in paragraphs:
        token_ids = tokenizer(paragraph)["input_ids"]
        if len(token_ids) > PREFIX_TOKENS:
            text = tokenizer.decode(token_ids[:PREFIX_TOKENS])
            yield Prompt("", "", text=text, group=topic, kind="prose")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences, not code, grammar or a table."""
    letters = sum(character.isalpha() or character in " ,.-()'\"" for character in paragraph)
    return letters > 0.95 * len(paragraph) and paragraph[0].isupper()


GENERATORS: dict[str, Generator] = {
    "products": generate_products,
    "sums": generate_sums,
    "arithmetic": generate_arithmetic,
    "stories": generate_stories,
    "constrained_stories": generate_constrained_stories,
    "lists": generate_lists,
    "explanations": generate_explanations,
    "prose": generate_prose,
}
