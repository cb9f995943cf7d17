"""Preference pairs: of a prompt's responses, or of the spans that its rewards score apart."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adaptive_head.lpo.experiment import HeadRecipe, TaskConfig, derive_seed
from adaptive_head.lpo.records import DataError, Pair, Prompt, Response, Side
from adaptive_head.lpo.rewards import TIE, Reward, choose_pair
from adaptive_head.lpo.token_ranges import Decode, cover_span, cut_out, locate_tokens

# Why a prompt made no pair, by a reward.
ALL_RIGHT = "all right"
ALL_WRONG = "all wrong"
EQUAL = "tie"
FEW_RESPONSES = "fewer than two responses"
FEW_SPANS = "fewer than two spans"
# Why a response was left out.
EMPTY = "empty"
UNALIGNED = "text is not what its tokens decode to"

# Pairs of a prompt where the recipe does not say: of responses as in the paper.
RESPONSE_PAIRS = 1
SPAN_PAIRS = 32


@dataclass(frozen=True)
class PairCounts:
    """What came of a task's prompts by one reward.

    Args:
        reward: its name; `first+then` where two rewards choose together.
        num_prompts: those with responses; the ones that are not in `dropped` made pairs.
        dropped: prompts without a pair, by the reason.
    """

    task: str
    reward: str
    num_prompts: int
    num_pairs: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class PairingReport:
    """What came of the prompts, by task and reward.

    Args:
        dropped_responses: left out before pairing, by task and reason.
    """

    counts: tuple[PairCounts, ...]
    dropped_responses: dict[str, dict[str, int]]


@dataclass(frozen=True)
class PairSet:
    """The pairs that a head is trained on, in the order of task and prompt."""

    pairs: tuple[Pair, ...]
    report: PairingReport


def make_pairs(
    prompts: Mapping[str, Prompt],
    responses: Sequence[Response],
    tasks: Mapping[str, TaskConfig],
    recipe: HeadRecipe,
    rewards: Mapping[str, Mapping[str, Reward]],
    decode: Decode,
    seed: int,
) -> PairSet:
    """Choose what a head is to prefer to what.

    With credit `response`, a prompt's best and worst response by the task's `prefer` are a pair of
    all their tokens, and so are, up to `max_pairs_per_prompt`, the best and worst of the others.
    With credit `span`, each reward that finds spans pairs those of all
    responses to a prompt (`match_spans`); a task without such a reward pairs whole responses.

    Rewards of one task share no token: what belongs to a span of one is cut out of the spans of
    those after it, in the order of the task's `rewards`. A span with holes is then its longest
    run of remaining tokens, the first of several as long.

    The result depends neither on the order of the responses, nor, for a prompt, on other prompts.

    Args:
        prompts: by id.
        responses: scored, to prompts of any of the tasks.
        recipe: its `tasks` limit the tasks; () is all.
        rewards: by task and name.
        decode: token ids -> text, as the responses' own text was made: without special tokens.
        seed: of the choice among spans of equal score.

    Raises:
        DataError: a response is to an unknown prompt or task, is there twice, or lacks a score.
    """
    grouped = _group(prompts, responses, tasks)
    pairs: list[Pair] = []
    counts: list[PairCounts] = []
    dropped: dict[str, dict[str, int]] = {}
    for task, config in tasks.items():
        if recipe.tasks and task not in recipe.tasks:
            continue
        pairing: _Pairing
        if recipe.credit == "span" and any(rewards[task][n].has_spans for n in config.rewards):
            limit = recipe.max_pairs_per_prompt or SPAN_PAIRS
            pairing = _SpanPairing(task, config, rewards[task], decode, limit, seed)
        else:
            pairing = _ResponsePairing(task, config, recipe.max_pairs_per_prompt or RESPONSE_PAIRS)
        for prompt in prompts.values():
            if found := grouped.get((task, prompt.id)):
                pairing.add(prompt, sorted(found, key=lambda response: response.sample))
        pairs += pairing.pairs
        counts += pairing.count()
        dropped[task] = dict(pairing.dropped_responses)
    return PairSet(tuple(pairs), PairingReport(tuple(counts), dropped))


def _group(
    prompts: Mapping[str, Prompt], responses: Iterable[Response], tasks: Mapping[str, TaskConfig]
) -> dict[tuple[str, str], list[Response]]:
    grouped: dict[tuple[str, str], list[Response]] = defaultdict(list)
    keys = set()
    for response in responses:
        where = f"prompt {response.prompt_id}, sample {response.sample}"
        if response.prompt_id not in prompts:
            raise DataError(f"{where}: there is no such prompt")
        if response.task not in tasks:
            raise DataError(f"{where}: task {response.task!r} is not one of {', '.join(tasks)}")
        if response.key in keys:
            raise DataError(f"{where}: the response is there twice")
        keys.add(response.key)
        grouped[response.task, response.prompt_id].append(response)
    return grouped


@dataclass
class _Pairing:
    """Makes the pairs of one task and counts what it drops."""

    task: str
    config: TaskConfig
    pairs: list[Pair] = field(default_factory=list, init=False)
    dropped_responses: Counter[str] = field(default_factory=Counter, init=False)
    num_prompts: int = field(default=0, init=False)
    dropped: dict[str, Counter[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.dropped = {name: Counter() for name in self.names}

    @property
    def names(self) -> list[str]:
        """What tells the sides apart: the rewards that make pairs."""
        raise NotImplementedError

    def add(self, prompt: Prompt, responses: Sequence[Response]) -> None:
        """Pair what there is of one prompt."""
        self.num_prompts += 1
        usable = [response for response in responses if response.token_ids]
        if len(usable) < len(responses):
            self.dropped_responses[EMPTY] += len(responses) - len(usable)
        if len(usable) < 2:
            for name in self.names:
                self.dropped[name][FEW_RESPONSES] += 1
        else:
            self._pair(prompt, usable)

    def count(self) -> Iterator[PairCounts]:
        num_pairs = Counter(pair.reward for pair in self.pairs)
        for name in self.names:
            dropped = dict(self.dropped[name])
            yield PairCounts(self.task, name, self.num_prompts, num_pairs[name], dropped)

    def _pair(self, prompt: Prompt, responses: Sequence[Response]) -> None:
        raise NotImplementedError


@dataclass
class _ResponsePairing(_Pairing):
    max_pairs: int

    @property
    def names(self) -> list[str]:
        return ["+".join(self._rewards)]

    @property
    def _rewards(self) -> list[str]:
        prefer = self.config.prefer
        return [prefer.first] if prefer.then is None else [prefer.first, prefer.then]

    def _pair(self, prompt: Prompt, responses: Sequence[Response]) -> None:
        for response in responses:
            if missing := [name for name in self._rewards if name not in response.scores]:
                where = f"prompt {prompt.id}, sample {response.sample}"
                raise DataError(f"{where}: scores.{missing[0]} is missing")
        prefer = self.config.prefer
        (name,) = self.names
        remaining = list(responses)
        for number in range(self.max_pairs):
            found = choose_pair(remaining, prefer.first, prefer.then, prefer.top)
            if found is None:
                if number == 0:
                    reason = explain_tie(r.scores[self._rewards[-1]] for r in responses)
                    self.dropped[name][reason] += 1
                return
            chosen, rejected = (
                Side(response.prompt_id, response.sample, 0, len(response.token_ids))
                for response in found
            )
            self.pairs.append(Pair(self.task, name, chosen, rejected))
            remaining = [response for response in remaining if response not in found]


@dataclass
class _SpanPairing(_Pairing):
    rewards: Mapping[str, Reward]
    decode: Decode
    max_pairs: int
    seed: int

    @property
    def names(self) -> list[str]:
        return [name for name in self.config.rewards if self.rewards[name].has_spans]

    def _pair(self, prompt: Prompt, responses: Sequence[Response]) -> None:
        located = []
        for response in responses:
            locations = locate_tokens(response.token_ids, response.text, self.decode)
            if locations is None:
                self.dropped_responses[UNALIGNED] += 1
            else:
                located.append((response, locations))
        taken: dict[int, set[int]] = defaultdict(set)
        for name in self.names:
            sides = []
            for response, locations in located:
                for span in self.rewards[name].find_spans(prompt, response):
                    tokens = cut_out(cover_span(locations, span), taken[response.sample])
                    if tokens is not None:
                        side = Side(response.prompt_id, response.sample, *tokens)
                        sides.append((span.score, side))
            for _, side in sides:
                taken[side.sample].update(range(side.start, side.stop))
            self._match(prompt, name, sides)

    def _match(self, prompt: Prompt, name: str, sides: Sequence[tuple[float, Side]]) -> None:
        rng = random.Random(derive_seed(self.seed, "pairs", prompt.id, name))
        matched = match_spans(sides, self.max_pairs, rng)
        self.pairs += [Pair(self.task, name, *pair) for pair in matched]
        if len(sides) < 2:
            self.dropped[name][FEW_SPANS] += 1
        elif not matched:
            self.dropped[name][explain_tie(score for score, _ in sides)] += 1


def explain_tie(scores: Iterable[float]) -> str:
    """Why nothing was better: `ALL_RIGHT` (every score is 1), `ALL_WRONG` (0), else `EQUAL`."""
    found = set(scores)
    if found == {1.0}:
        return ALL_RIGHT
    return ALL_WRONG if found == {0.0} else EQUAL


def match_spans(
    spans: Sequence[tuple[float, Side]], max_pairs: int, rng: random.Random
) -> list[tuple[Side, Side]]:
    """Pair the best span with the worst, the second best with the second worst, and so on.

    Each span is used at most once, and only with one that scores lower by more than 1e-9. Spans
    of equal score are in random order.

    Args:
        spans: with their scores.

    Returns:
        At most `max_pairs` of (chosen, rejected).
    """
    ordered = list(spans)
    rng.shuffle(ordered)
    ordered.sort(key=lambda scored: -scored[0])
    pairs: list[tuple[Side, Side]] = []
    for (high, chosen), (low, rejected) in zip(ordered, reversed(ordered), strict=True):
        if len(pairs) == max_pairs or high <= low + TIE:
            break
        pairs.append((chosen, rejected))
    return pairs
