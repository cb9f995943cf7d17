"""Prompts for training and evaluation: generators of tasks that a program can check, and files.

Training and test prompts of a generator share no content: operands, title words, categories and
passages are dealt to one split or the other.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
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

    Raises:
        DataError: names the file and line, or the task that has too few prompts.
    """
    prompts = []
    for task, config in tasks.items():
        source = config.prompts
        wanted = source.num_train if split == "train" else source.num_test
        rng = random.Random(f"{seed}/{task}/{split}")
        if source.file:
            found = read_prompts(source, split, rng)
        else:
            found = generate_prompts(source, split, rng, tokenizer)
        numbered = enumerate(islice(found, wanted))
        made = [replace(p, id=f"{task}/{split}/{number}", task=task) for number, p in numbered]
        if len(made) < wanted:
            raise DataError(f"tasks.{task}: only {len(made)} of {wanted} {split} prompts")
        prompts += made
    return prompts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """A prompt's token ids, as the server would make them."""
    if prompt.messages is None:
        return tuple(tokenizer(prompt.text)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def read_prompts(source: PromptConfig, split: Split, rng: random.Random) -> Iterator[Prompt]:
    """Prompts of a JSONL file; one file serves both splits where there is no test file."""
    is_apart = split == "test" and source.test_file
    path = source.test_file if is_apart else source.file
    assert path is not None
    lines = list(read_lines(path))
    # Both splits shuffle alike and take from different ends.
    order = rng if source.test_file else random.Random("both splits")
    order.shuffle(lines)
    if split == "test" and not is_apart:
        lines.reverse()
        lines = lines[: max(0, len(lines) - source.num_train)]
    for number, content in lines:
        try:
            yield make_prompt(content, source.template)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}, line {number}: {reason}") from None


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


def make_prompt(content: dict[str, Any], template: str | None) -> Prompt:
    """One line of a prompt file as a prompt; what is not text or messages is its reference."""
    reference = {key: value for key, value in content.items() if key not in ("messages", "text")}
    if template is not None:
        return ask(template.format_map(content), **reference)
    messages, text = content.get("messages"), content.get("text")
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
    return Prompt("", "", messages=messages, text=text, reference=reference)


def ask(content: str, **reference: Any) -> Prompt:
    """A prompt of one user message."""
    return Prompt("", "", messages=({"role": "user", "content": content},), reference=reference)


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
            yield ask(rng.choice(wordings).format(a, b), answer=a * b)


def generate_sums(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """The sum of two numbers up to twenty."""
    for _attempt in range(MAX_ATTEMPTS):
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        if belongs(split, "sum", *sorted((a, b))):
            yield ask(f"What is {a} + {b}?", answer=a + b)


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
        yield ask(f"Write a short story with the following title.\n\nTitle: {title}")


def generate_constrained_stories(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """A story whose sentences all begin with one word, after §3.3 of arXiv 2411.09661."""
    for _attempt in range(MAX_ATTEMPTS):
        yield ask(
            f'Write a short story with the title "{make_title(split, rng)}". '
            'Every sentence must begin with the word "She".'
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
        question = rng.choice(wordings).format(word, rng.choice(categories))
        yield ask(question, count=NUMBERS[word])


LIMITS = (20, 25, 30, 35, 40)


def generate_explanations(split: Split, rng: random.Random, _: Any) -> Iterator[Prompt]:
    """A short explanation with a limit on its words: general instructions."""
    topics = list_words(split, "topics")
    for _attempt in range(MAX_ATTEMPTS):
        limit = rng.choice(LIMITS)
        yield ask(f"Explain {rng.choice(topics)} in at most {limit} words.", max_words=limit)


def generate_prose(split: Split, rng: random.Random, tokenizer: Any) -> Iterator[Prompt]:
    """The first 50 tokens of a paragraph of the Python manual, which comes with every Python."""
    from pydoc_data.topics import topics

    paragraphs = [
        " ".join(paragraph.split())
        for topic, text in sorted(topics.items())
        if belongs(split, topic)
        for paragraph in re.split(r"\n\s*\n", text)
        if is_prose(paragraph)
    ]
    rng.shuffle(paragraphs)
    for paragraph in paragraphs:
        token_ids = tokenizer(paragraph)["input_ids"]
        if len(token_ids) > PREFIX_TOKENS:
            yield Prompt("", "", text=tokenizer.decode(token_ids[:PREFIX_TOKENS]))


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
