"""Rewards: how good a response is. Each kind's settings, and how it scores; higher is better."""

import hashlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from numbers import Real
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, assert_never

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adaptive_head.lpo.fluency import find_ngrams, is_bad
from adaptive_head.lpo.records import DataError, Prompt, Response, Span

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
NgramSize = Annotated[int, Field(ge=1, le=64)]
TIE = 1e-9
NUMBER = re.compile(
    r"(?:(?<![\w.)\]])(?P<sign>[-\u2212]))?\$?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\w)\.\d+)"
)
WORD = re.compile(r"\S+")
SENTENCE_PART = re.compile(r"\S+|\n")
SENTENCE_WORD = re.compile(r"\w+")
AND = re.compile(r"(?:^|\s)and(?:\s|$)", re.IGNORECASE)
CLOSERS = "\"'”’»›)]}*_"


class Reward(Protocol):
    """Scores responses."""

    @property
    def has_spans(self) -> bool:
        """Whether it scores parts of a response, too."""

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError if the prompt lacks what responses to it are compared with."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """One score for each response; `prompts` holds each one's prompt, in the same order."""

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        """Parts of the response in order, without overlap; [] for a reward without spans."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    has_spans: ClassVar[bool] = False

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError if the prompt lacks what responses to it are compared with."""

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        """Parts of the response with scores of their own."""
        return []


class _Judge(_Config):
    """A reward that judges each response by itself, with no model to load."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """One score for each response."""
        return score_each(self.judge, prompts, responses)

    def judge(self, prompt: Prompt, response: Response) -> float:
        """The score of one response."""
        raise NotImplementedError


class NumberReward(_Judge):
    """1.0 if the response gives the right number, else 0.0.

    Numbers have thousands commas, a decimal point and a minus sign (also U+2212) if any; $ and %
    are ignored. They are compared as exact decimals.

    Args:
        field: of the prompt's reference that holds the right number: a number, or a text that is
            one or, as in GSM8K, has one after `####`.
        extract: which number of the response counts: its `last`, its `first`, or the first
            `after` the last `marker`.
        marker: such as `####` or `\\boxed{`.
    """

    kind: Literal["number"]
    field: str = "answer"
    extract: Literal["last", "first", "after"] = "last"
    marker: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_marker(self) -> Self:
        if (self.extract == "after") != (self.marker is not None):
            raise ValueError("marker goes with extract: after, and after needs a marker")
        return self

    def check_prompt(self, prompt: Prompt) -> None:
        self._read_reference(prompt)

    def judge(self, prompt: Prompt, response: Response) -> float:
        return float(self.find_answer(response.text) == self._read_reference(prompt))

    def find_answer(self, text: str) -> Decimal | None:
        """The number that counts as a text's answer, if it has one."""
        if self.marker is not None:
            _, found, text = text.rpartition(self.marker)
            if not found:
                return None
        numbers = list(find_numbers(text))
        return numbers[-1 if self.extract == "last" else 0] if numbers else None

    def _read_reference(self, prompt: Prompt) -> Decimal:
        value = _get_reference(prompt, self.field)
        if isinstance(value, str):
            text = value.rpartition("####")[2].strip()
            if match := NUMBER.fullmatch(text.rstrip("%.")):
                return _to_decimal(match)
        elif not isinstance(value, bool) and isinstance(value, int | float):
            number = Decimal(str(value))
            if number.is_finite():
                return number
        problem = f"reference.{self.field} is {value!r:.80}, not a number"
        raise DataError(f"prompt {prompt.id}: {problem}")


class PatternReward(_Judge):
    """1.0 if a regular expression is found in the response, else 0.0.

    Args:
        pattern: as Python's `re` takes it. One that backtracks without end hangs the scoring.
        flags: letters among a, i, m, s and x, as in `(?im)`.
        full: the whole response must match.
        negate: 1.0 if it is not found.
    """

    kind: Literal["pattern"]
    pattern: str
    flags: Annotated[str, Field(pattern="^[aimsx]*$")] = ""
    full: bool = False
    negate: bool = False

    @model_validator(mode="after")
    def _check_pattern(self) -> Self:
        try:
            self._compile()
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        return self

    def judge(self, prompt: Prompt, response: Response) -> float:
        pattern = self._compile()
        match = (pattern.fullmatch if self.full else pattern.search)(response.text)
        return float((match is not None) != self.negate)

    def _compile(self) -> re.Pattern[str]:
        flags = re.RegexFlag(0)
        for letter in self.flags:
            flags |= re.RegexFlag[letter.upper()]
        return re.compile(self.pattern, flags)


class ListReward(_Judge):
    """1.0 if the response is so many distinct items on one line, separated by commas; else 0.0.

    A final period is allowed, and an "and" before the last item, beside its comma or in its
    place; other sentence punctuation is not.

    Args:
        count: of the items; null takes the prompt's reference `count`.
        max_words: an item has.
    """

    kind: Literal["list"]
    count: Count | None = None
    max_words: Count = 3

    def check_prompt(self, prompt: Prompt) -> None:
        self._find_count(prompt)

    def judge(self, prompt: Prompt, response: Response) -> float:
        text = response.text.strip().removesuffix(".")
        if len(text.splitlines()) > 1 or re.search(r"[.!?;:。！？；：…]", text):
            return 0.0
        *items, last = text.split(",")
        before, *after = AND.split(last.strip(), maxsplit=1)
        items += [before, *after] if before or not after else after
        names = [" ".join(item.casefold().split()) for item in items]
        is_right = (
            len(names) == len(set(names)) == self._find_count(prompt)
            and all(any(map(str.isalnum, name)) for name in names)
            and all(len(name.split()) <= self.max_words for name in names)
        )
        return float(is_right)

    def _find_count(self, prompt: Prompt) -> int:
        return self.count or _get_count(prompt, "count")


class SentenceStartReward(_Judge):
    """The share of the response's sentences that begin as they should; 0.0 without a sentence.

    A sentence ends at a newline, or at a word that ends with one of .!? and perhaps closing
    quotes or brackets; "Mr." ends one, too. What has no letter or digit is no sentence. Quotes
    and other signs before the first word are skipped. The spans are the sentences' openings, up
    to the end of the first word, 1.0 or 0.0 each.

    Args:
        word: sentences begin with, as a whole: "She's" begins with She, "Sheila" does not.
        prefix: sentences begin with, if not a word: "S" is the beginning of "She".
    """

    kind: Literal["sentence_start"]
    word: Annotated[str, Field(min_length=1)] | None = None
    prefix: Annotated[str, Field(min_length=1)] | None = None
    has_spans: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_beginning(self) -> Self:
        if (self.word is None) == (self.prefix is None):
            raise ValueError("give either word or prefix")
        return self

    def judge(self, prompt: Prompt, response: Response) -> float:
        return _average([span.score for span in self.find_spans(prompt, response)], 0.0)

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        text = response.text
        beginning = re.escape(self.prefix or self.word or "") + (r"(?!\w)" if self.word else "")
        right = re.compile(beginning)
        spans = []
        for start, stop in find_sentences(text):
            if word := SENTENCE_WORD.search(text, start, stop):
                is_right = any(right.match(text, at, stop) for at in (start, word.start()))
                spans.append(Span(start, word.end(), float(is_right)))
        return spans


class RepetitionReward(_Judge):
    """1 minus the share of the response's n-grams that occurred before in it.

    Words are what whitespace separates, in lower case. A response of fewer than `n` words scores
    1.0. The spans are its windows of so many words, each scored by the n-grams that end in it.

    Args:
        prompt: n-grams of the prompt count as having occurred.
    """

    kind: Literal["repetition"]
    n: NgramSize = 3
    window: Count = 16
    prompt: bool = False
    has_spans: ClassVar[bool] = True

    def judge(self, prompt: Prompt, response: Response) -> float:
        return _average([float(fresh) for fresh in self._find_fresh(prompt, response)], 1.0)

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        words = list(WORD.finditer(response.text))
        # One entry a word: the first words end no n-gram.
        fresh = [None] * min(self.n - 1, len(words)) + self._find_fresh(prompt, response)
        spans = []
        for at in range(0, len(words), self.window):
            part = words[at : at + self.window]
            scores = [float(score) for score in fresh[at : at + self.window] if score is not None]
            spans.append(Span(part[0].start(), part[-1].end(), _average(scores, 1.0)))
        return spans

    def _find_fresh(self, prompt: Prompt, response: Response) -> list[bool]:
        """For each n-gram of the response whether it is its first occurrence."""
        seen: set[tuple[str, ...]] = set()
        if self.prompt:
            texts = [prompt.text or "", *(m["content"] for m in prompt.messages or ())]
            seen.update(ngram for text in texts for ngram in find_ngrams(text, self.n))
        fresh = []
        for ngram in find_ngrams(response.text, self.n):
            fresh.append(ngram not in seen)
            seen.add(ngram)
        return fresh


class DistinctReward(_Judge):
    """Distinct-n: distinct n-grams of words per n-gram; 0.0 for fewer than `n` words."""

    kind: Literal["distinct"]
    n: NgramSize = 2

    def judge(self, prompt: Prompt, response: Response) -> float:
        ngrams = list(find_ngrams(response.text, self.n))
        return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class FluencyReward(_Judge):
    """0.0 for a bad answer, garbled or looping (`lpo.fluency`), else 1.0.

    It needs the log-probabilities that this release records of every answer.
    """

    kind: Literal["fluency"]

    def judge(self, prompt: Prompt, response: Response) -> float:
        if response.logprobs is None:
            raise DataError(f"{name_response(response)} has no log-probabilities")
        return float(not is_bad(response.logprobs, response.text))


class LengthReward(_Judge):
    """1.0 within the limits, both included; outside it falls in a line.

    A length below the least scores length / least; above the most, 2 - length / most, which is 0
    from twice the most on. A limit that is null is taken from the prompt's reference, where there
    is one of the same name. With limits on words and on characters the lower score counts.
    """

    kind: Literal["length"]
    min_words: Size | None = None
    max_words: Count | None = None
    min_characters: Size | None = None
    max_characters: Count | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if conflict := self._find_conflict(self.model_dump()):
            raise ValueError(conflict)
        return self

    def check_prompt(self, prompt: Prompt) -> None:
        limits = self._find_limits(prompt)
        if not any(limits.values()):
            names = ", ".join(limits)
            raise DataError(f"prompt {prompt.id}: no limit in the reward or in reference ({names})")
        if conflict := self._find_conflict(limits):
            raise DataError(f"prompt {prompt.id}: {conflict}")

    def judge(self, prompt: Prompt, response: Response) -> float:
        limits = self._find_limits(prompt)
        lengths = {"words": len(response.text.split()), "characters": len(response.text)}
        score = 1.0
        for unit, length in lengths.items():
            low, high = limits[f"min_{unit}"], limits[f"max_{unit}"]
            if low and length < low:
                score = min(score, length / low)
            if high and length > high:
                score = min(score, max(0.0, 2 - length / high))
        return score

    def _find_limits(self, prompt: Prompt) -> dict[str, int | None]:
        names = ("min_words", "max_words", "min_characters", "max_characters")
        limits = {}
        for name in names:
            limits[name] = getattr(self, name)
            if limits[name] is None and name in prompt.reference:
                limits[name] = _get_count(prompt, name)
        return limits

    @staticmethod
    def _find_conflict(limits: Mapping[str, Any]) -> str | None:
        for unit in ("words", "characters"):
            low, high = limits[f"min_{unit}"], limits[f"max_{unit}"]
            if low and high and low > high:
                return f"min_{unit} {low} is above max_{unit} {high}"
        return None


class EndedReward(_Judge):
    """1.0 if the model ended the response itself, 0.0 if it was cut off."""

    kind: Literal["ended"]

    def judge(self, prompt: Prompt, response: Response) -> float:
        return float(response.finish_reason == "stop")


class ModelRewardConfig(_Config):
    """A Hugging Face sequence-classification reward model; see `lpo.reward_model`.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        device: such as `cuda:1`; null is the GPU if there is one.
        dtype: `auto` is bfloat16 on a GPU and float32 elsewhere.
        trust_remote_code: lets the model's repository run its own code, as ArmoRM needs.
        without_constraint: key of the prompt's reference that holds the request without its
            constraint. The model then judges the response as one to that (§3.3 of arXiv
            2411.09661), instead of the last message.
    """

    kind: Literal["reward_model"]
    model: Annotated[str, Field(min_length=1)]
    batch_size: Count = 8
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    without_constraint: str | None = None

    def check_prompt(self, prompt: Prompt) -> None:
        self.remove_constraint(prompt)

    def remove_constraint(self, prompt: Prompt) -> Prompt:
        """The prompt as the model is to see it; DataError if its reference does not hold it."""
        if self.without_constraint is None:
            return prompt
        content = _get_reference(prompt, self.without_constraint)
        if not isinstance(content, str) or not content:
            key = self.without_constraint
            raise DataError(f"prompt {prompt.id}: reference.{key} must be a text")
        if prompt.messages is None:
            return replace(prompt, text=content)
        *before, last = prompt.messages
        return replace(prompt, messages=(*before, last | {"content": content}))


class PythonRewardConfig(_Config):
    """One's own function, called as `function(prompt, response, **parameters)`.

    Args:
        entry: `package.module:function`; the module must be importable, for example because
            PYTHONPATH names its folder.
    """

    kind: Literal["python"]
    entry: str
    parameters: dict[str, Any] = {}

    @field_validator("entry")
    @classmethod
    def _check_entry(cls, entry: str) -> str:
        module, _, name = entry.partition(":")
        if not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
            raise ValueError(f"{entry!r} must be of the form package.module:function")
        return entry


RewardConfig = Annotated[
    NumberReward
    | PatternReward
    | ListReward
    | SentenceStartReward
    | RepetitionReward
    | DistinctReward
    | FluencyReward
    | LengthReward
    | EndedReward
    | ModelRewardConfig
    | PythonRewardConfig,
    Field(discriminator="kind"),
]


class PythonReward:
    """A reward that calls one's own function."""

    has_spans = False

    def __init__(self, config: PythonRewardConfig) -> None:
        module, _, path = config.entry.partition(":")
        try:
            function: Any = importlib.import_module(module)
            for name in path.split("."):
                function = getattr(function, name)
        except Exception as error:
            problem = f"entry: {config.entry} cannot be imported: {describe_error(error)}"
            raise ValueError(problem) from error
        if not callable(function):
            raise ValueError(f"entry: {config.entry} is not a function")
        try:
            inspect.signature(function).bind(None, None, **config.parameters)
        except (TypeError, ValueError) as error:
            names = ", ".join(("prompt", "response", *config.parameters))
            raise ValueError(f"entry: {config.entry} cannot take ({names}): {error}") from None
        self._function = function
        self._parameters = config.parameters

    def check_prompt(self, prompt: Prompt) -> None:
        """Accept it: what the function needs is not known."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """What the function returns for each response."""
        return score_each(self._judge, prompts, responses)

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        """None: a function scores whole responses."""
        return []

    def _judge(self, prompt: Prompt, response: Response) -> float:
        value: float = self._function(prompt, response, **self._parameters)
        return value


def build_reward(name: str, config: RewardConfig) -> Reward:
    """Make a reward ready: models and functions are loaded now.

    Raises:
        ValueError: begins with `rewards.{name}`; a model or a function cannot be loaded.
    """
    try:
        match config:
            case ModelRewardConfig():
                # Imported here: it takes seconds, and most experiments do without.
                from adaptive_head.lpo.reward_model import RewardModel

                return RewardModel(config)
            case PythonRewardConfig():
                return PythonReward(config)
            case _Judge():
                return config
            case _:
                assert_never(config)
    except ValueError as error:
        raise ValueError(f"rewards.{name}.{error}") from error


def score_each(
    judge: Callable[[Prompt, Response], float],
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
) -> list[float]:
    """Score responses one by one; DataError names the one that could not be scored."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            scores.append(judge(prompt, response))
        except Exception as error:
            raise DataError(f"{name_response(response)}: {describe_error(error)}") from error
    return scores


def score_responses(
    rewards: Mapping[str, Reward], prompts: Iterable[Prompt], responses: Sequence[Response]
) -> list[Response]:
    """The responses with their scores by these rewards, beside those that they had.

    Args:
        prompts: at least those of the responses, in any order.

    Raises:
        DataError: a prompt is missing, or a reward failed or gave what is not a finite number;
            names the reward, the prompt and the sample.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    for response in responses:
        if response.prompt_id not in by_id:
            raise DataError(f"{name_response(response)}: there is no such prompt")
    aligned = [by_id[response.prompt_id] for response in responses]
    scores: list[dict[str, float]] = [dict(response.scores) for response in responses]
    for name, reward in rewards.items():
        try:
            values: Sequence[Any] = reward.score(aligned, responses) if responses else []
        except DataError as error:
            raise DataError(f"rewards.{name}: {error}") from error
        except Exception as error:
            where = f"{name_response(responses[0])} (the first of {len(responses)})"
            raise DataError(f"rewards.{name}: {where}: {describe_error(error)}") from error
        if len(values) != len(responses):
            raise DataError(f"rewards.{name}: {len(values)} scores for {len(responses)} responses")
        for response, entry, value in zip(responses, scores, values, strict=True):
            if not _is_finite(value):
                problem = f"the score is {value!r:.80}, not a finite number"
                raise DataError(f"rewards.{name}: {name_response(response)}: {problem}")
            entry[name] = float(value)
    pairs = zip(responses, scores, strict=True)
    return [replace(response, scores=entry) for response, entry in pairs]


def compare_scores(
    scores_a: Mapping[str, float], scores_b: Mapping[str, float], names: Iterable[str]
) -> float:
    """1.0 if A wins, 0.0 if B does, 0.5 for a tie.

    The first of `names` decides, the later ones break its ties; differences up to 1e-9 are ties.
    """
    for name in names:
        difference = scores_a[name] - scores_b[name]
        if abs(difference) > TIE:
            return float(difference > 0)
    return 0.5


def choose_pair(
    responses: Sequence[Response], first: str, then: str | None = None, top: int = 4
) -> tuple[Response, Response] | None:
    """The chosen and the rejected of a prompt's responses (arXiv 2411.09661, §3.3).

    By `first` alone: its best and its worst. With `then`: among the `top` best by `first` the
    best by `then`, and among the `top` worst by `first` the worst by `then`; there `first` breaks
    ties. What ties all the same is ordered by a hash of prompt and sample: as good as random, but
    the same every time.

    Returns:
        None if the chosen is not better: it ties by `first`, or by `then` and `first`.
    """
    if not responses:
        return None
    best = worst = sorted(responses, key=lambda response: _rank(response, (first,)))
    names: tuple[str, ...] = (first,)
    if then is not None:
        names = (then, first)
        best, worst = best[-top:], worst[:top]
    chosen = max(best, key=lambda response: _rank(response, names))
    rejected = min(worst, key=lambda response: _rank(response, names))
    is_better = compare_scores(chosen.scores, rejected.scores, names) == 1.0
    return (chosen, rejected) if is_better else None


def _rank(response: Response, names: Iterable[str]) -> tuple[float | bytes, ...]:
    scores = (round(response.scores[name], 9) for name in names)
    return (*scores, hashlib.sha256(repr(response.key).encode()).digest())


def find_numbers(text: str) -> Iterator[Decimal]:
    """The numbers in a text, in order; a minus sign after a digit or letter is an operator."""
    return map(_to_decimal, NUMBER.finditer(text))


def find_sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where the sentences of a text begin and end, without the white space around them."""
    start, stop = None, 0
    for match in SENTENCE_PART.finditer(text):
        part = match.group()
        if part != "\n":
            start, stop = match.start() if start is None else start, match.end()
        if start is not None and (part == "\n" or part.rstrip(CLOSERS)[-1:] in (".", "!", "?")):
            yield start, stop
            start = None
    if start is not None:
        yield start, stop


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _to_decimal(match: re.Match[str]) -> Decimal:
    return Decimal(("-" if match["sign"] else "") + match["digits"].replace(",", ""))


def _average(values: Sequence[float], of_none: float) -> float:
    return sum(values) / len(values) if values else of_none


def _get_reference(prompt: Prompt, key: str) -> Any:
    try:
        return prompt.reference[key]
    except KeyError:
        raise DataError(f"prompt {prompt.id}: reference.{key} is missing") from None


def _get_count(prompt: Prompt, key: str) -> int:
    value = _get_reference(prompt, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        problem = f"reference.{key} is {value!r:.80}, not a whole number from 1 on"
        raise DataError(f"prompt {prompt.id}: {problem}")
    return value


def name_response(response: Response) -> str:
    """How errors name a response."""
    return f"prompt {response.prompt_id}, sample {response.sample}"


def describe_error(error: Exception) -> str:
    """An error's class and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
