"""Both selectors' tests: requests as they show them to a selector, and what must come of it.

The reference is written in Python numbers, a row at a time.
"""

import math
import random
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import numpy as np
import pytest
import torch

from adaptive_head.abstention import StatisticIndex
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.options import Options
from adaptive_head.selector import Step, TemperatureSelector
from adaptive_head.slots import ParkedChoice
from tests import reference
from tests.gpu.texts import PARAMETERS

CPU = torch.device("cpu")
WIDTH, VOCABULARY = 12, 20
MARKER, START = 7, 6
# More than any prompt here has.
WHOLE_PROMPT = 1000
LEVELLED = ("head", "entropy", "constant")
FIXED = {"deadline": None, "derandomize": True, "database": None}


def make_head(temperatures: tuple[float, ...], seed: int) -> AdaptiveHead:
    """A head that chooses all of its temperatures, unlike an untrained one."""
    head = AdaptiveHead(HeadConfig(WIDTH, temperatures, (16,)), seed)
    with torch.no_grad():
        head.layers[-1].weight.mul_(300)
    return head


def make_constant_head(temperature: float) -> AdaptiveHead:
    """A head that always chooses the higher of its temperatures."""
    head = AdaptiveHead(HeadConfig(WIDTH, (0.0, temperature), (4,)))
    with torch.no_grad():
        head.layers[-1].bias.copy_(torch.tensor([0.0, 1e6]))
    return head


HEADS = {
    "first": make_head((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), seed=1),
    "second": make_head((0.0, 0.35, 1.2), seed=2),
}


def make_options(policy="constant", name=None, **changes) -> Options:
    is_two_phase = policy == "two_phase"
    values = {
        "level": "token",
        "select": "argmax",
        "scale": 1.0,
        "min": 0.0,
        "max": 10.0,
        "parameters": PARAMETERS[policy],
        "marker_token_ids": (MARKER,) if is_two_phase else (),
        "start_token_ids": (START,) if is_two_phase else (),
        "num_written": WHOLE_PROMPT if is_two_phase else 0,
        "temperatures": (0.9, 0.1, 0.5) if policy == "list" else (),
    }
    return Options(policy=policy, name=name or policy, **values | changes)


class Decision(NamedTuple):
    """What the reference says of a token.

    Attributes:
        temperature: NaN for an ordinary request.
        has_abstained: whether it is the head's fallback.
        picked: the temperature that the head picked for it, before scale and bounds; None for a
            mean, a fallback, a choice made earlier, and without a head.
    """

    temperature: float
    has_abstained: bool = False
    picked: float | None = None


@dataclass
class Request:
    """A request as the reference sees it: no slots, no tensors, nothing kept but one choice."""

    options: Options | None
    seed: int
    tokens: list[int]
    prompt_len: int
    num_computed: int = 0
    chosen: Decision | None = None


@dataclass
class Row:
    """What a request shows in one step."""

    request: Request
    slot: int
    position: int
    is_ready: bool = True
    hidden: np.ndarray = field(default_factory=lambda: np.zeros(WIDTH, dtype=np.float32))
    logits: np.ndarray = field(default_factory=lambda: np.zeros(VOCABULARY, dtype=np.float32))


def slow_temperature(row: Row) -> float:
    """One row's temperature, NaN for an ordinary request."""
    return slow_decision(row).temperature


def slow_decision(row: Row) -> Decision:
    options, request = row.request.options, row.request
    if options is None:
        return Decision(math.nan)
    if request.chosen is not None:
        return request.chosen
    if options.policy == "head" and is_unsure(row, options):
        chosen, has_abstained, picked = options.parameters[1], True, None
    else:
        chosen, has_abstained = slow_policy(row, options), False
        picked = chosen if options.policy == "head" and options.select != "mean" else None
    temperature = round(min(max(chosen * options.scale, options.min), options.max) * 1e6) / 1e6
    if options.level == "sequence" and row.is_ready:
        request.chosen = Decision(temperature, has_abstained)
    return Decision(temperature, has_abstained, picked)


def is_unsure(row: Row, options: Options) -> bool:
    if not options.parameters:
        return False
    threshold, _, statistic = options.parameters
    scores = reference.mlp(HEADS[options.name].state_dict(), row.hidden).tolist()
    *_, second, largest = sorted(reference.softmax(scores))
    return (largest - second if statistic == StatisticIndex.MARGIN else largest) < threshold


def slow_policy(row: Row, options: Options) -> float:
    request = row.request
    match options.policy:
        case "head":
            head = HEADS[options.name]
            scores = reference.mlp(head.state_dict(), row.hidden).tolist()
            if options.select == "mean":
                shares = reference.softmax(scores)
                return math.fsum(map(math.prod, zip(shares, head.config.temperatures, strict=True)))
            if options.select == "sample":
                scores = [
                    score + reference.gumbel(request.seed, row.position, choice)
                    for choice, score in enumerate(scores)
                ]
            return head.config.temperatures[scores.index(max(scores))]
        case "entropy":
            return reference.entropy_temperature(row.logits.tolist(), *options.parameters)
        case "schedule":
            num_generated = max(row.position + 1 - request.prompt_len, 0)
            return reference.schedule_temperature(num_generated, *options.parameters)
        case "two_phase":
            first = max(0, request.prompt_len - options.num_written)
            written = request.tokens[first : row.position + 1]
            return options.parameters[is_thinking_over(written, options)]
        case "constant":
            return options.parameters[0]
        case "list":
            num_generated = max(row.position + 1 - request.prompt_len, 0)
            known = options.temperatures[: num_generated + 1]
            return known[-1]


def is_thinking_over(tokens: list[int], options: Options) -> bool:
    """What the last marker of a text says, looking for one behind each of its tokens."""
    is_over = False
    for length in range(1, len(tokens) + 1):
        if ends_with(tokens[:length], options.marker_token_ids):
            is_over = True
        elif ends_with(tokens[:length], options.start_token_ids):
            is_over = False
    return is_over


def ends_with(tokens: list[int], marker: tuple[int, ...]) -> bool:
    return bool(marker) and tuple(tokens[-len(marker) :]) == marker


def make_step(rows: list[Row]) -> Step:
    slots_np = np.array([row.slot for row in rows])
    return Step(
        slots=torch.from_numpy(slots_np),
        slots_np=slots_np,
        hidden=torch.from_numpy(np.stack([row.hidden for row in rows])),
        logits=torch.from_numpy(np.stack([row.logits for row in rows])),
        input_ids=torch.tensor([row.request.tokens[row.position] for row in rows]),
        positions=torch.tensor([row.position for row in rows]),
        prompt_lens=torch.tensor([row.request.prompt_len for row in rows]),
        is_ready=torch.tensor([row.is_ready for row in rows]),
    )


def add(selector: TemperatureSelector, slot: int, options: Options | None, **kwargs) -> Row:
    """Put a request into a slot; returns the row of its last token."""
    tokens = kwargs.get("tokens", [1, 2, 3])
    prompt_len = kwargs.get("prompt_len", len(tokens))
    request = Request(options, kwargs.get("seed", 0), tokens, prompt_len)
    selector.add(slot, options, request.seed)
    selector.flush()
    selector.start_phase(slot, tokens, prompt_len)
    return Row(request, slot, position=len(tokens) - 1)


def generate(row: Row, token: int) -> Row:
    """The request's row in the step after it has generated a token."""
    row.request.tokens.append(token)
    return Row(row.request, row.slot, row.position + 1)


def select(selector: TemperatureSelector, *rows: Row) -> list[float]:
    temperatures = selector.select(make_step(list(rows)))
    assert temperatures is not None
    return temperatures.tolist()


def approximately(values):
    return pytest.approx(values, rel=1e-4, abs=2e-6, nan_ok=True)


def random_options(rng: random.Random) -> Options | None:
    policy = rng.choice(
        ["ordinary", "head", "entropy", "schedule", "two_phase", "constant", "list"]
    )
    if policy == "ordinary":
        return None
    changes = {"scale": rng.choice([1.0, 1.0, 0.5, 1.7, rng.uniform(0.01, 10)])}
    if rng.random() < 0.3:
        changes["min"], changes["max"] = sorted([rng.uniform(0, 2), rng.uniform(0, 2)])
    if policy in LEVELLED:
        changes["level"] = rng.choice(["token", "sequence"])
    parameters = {
        "head": (),
        "entropy": (rng.uniform(0.1, 2), rng.uniform(0, 3)),
        "schedule": (rng.uniform(0, 2), rng.uniform(0, 2), float(rng.randint(1, 12))),
        "two_phase": (rng.uniform(0, 2), rng.uniform(0, 2)),
        "constant": (rng.uniform(0, 2),),
        "list": (),
    }
    if policy == "head" and rng.random() < 0.5:
        statistic = rng.choice(list(StatisticIndex))
        parameters["head"] = rng.uniform(0.2, 1), rng.uniform(0, 2), float(statistic)
    changes["parameters"] = parameters[policy]
    if policy == "two_phase":
        changes["marker_token_ids"] = rng.choice([(MARKER,), (1, 2), (1, 1, MARKER), (2,) * 4])
        changes["start_token_ids"] = rng.choice([(START,), (2, 1), (), (MARKER, START, START)])
        # From none to more than a prompt has.
        changes["num_written"] = int(7 * parameters["two_phase"][0])
    if policy == "list":
        changes["temperatures"] = tuple(rng.uniform(0, 2) for _ in range(rng.randint(1, 12)))
    if policy == "head":
        changes["select"] = rng.choice(["argmax", "sample", "mean"])
        return make_options("head", rng.choice(list(HEADS)), **changes)
    return make_options(policy, **changes)


class Simulation:
    """A scheduler in small: requests come, are prefilled in chunks, preempted, and go."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.selector = TemperatureSelector(HEADS, 4, CPU)
        self.free = list(range(4))
        self.running: dict[int, Request] = {}
        self.preempted: list[tuple[Request, ParkedChoice]] = []

    def random_tokens(self, count: int) -> list[int]:
        return [self.rng.choice([1, 2, START, MARKER]) for _ in range(count)]

    def admit(self) -> None:
        if not self.free and len(self.running) < 16:
            self.free.extend(self.selector.grow())
        restored = []
        while self.free and self.rng.random() < 0.7:
            slot = self.free.pop(self.rng.randrange(len(self.free)))
            if self.preempted and self.rng.random() < 0.5:
                request, chosen = self.preempted.pop()
                request.num_computed = 0
                restored.append((slot, chosen))
            else:
                tokens = self.random_tokens(self.rng.randint(1, 12))
                seed = self.rng.randint(-(2**63), 2**63 - 1)
                request = Request(random_options(self.rng), seed, tokens, len(tokens))
            self.running[slot] = request
            if self.rng.random() < 0.2:
                # One that is gone before the selector was flushed.
                self.selector.add(slot, random_options(self.rng), 5)
            is_adaptive = self.selector.add(slot, request.options, request.seed)
            assert is_adaptive == self.selector.is_adaptive(slot) == (request.options is not None)
        self.selector.flush()
        for slot, request in self.running.items():
            if request.num_computed == 0:
                self.selector.start_phase(slot, request.tokens, request.prompt_len)
        for slot, chosen in restored:
            self.selector.restore(slot, chosen)

    def remove(self) -> None:
        for slot, request in list(self.running.items()):
            chance = self.rng.random()
            if chance < 0.1:
                self.preempted.append((request, self.selector.park(slot)))
            if chance < 0.2:
                del self.running[slot]
                self.free.append(slot)

    def make_rows(self) -> list[Row]:
        slots = [slot for slot in self.running if self.rng.random() < 0.9]
        self.rng.shuffle(slots)
        rows = []
        for slot in slots:
            request = self.running[slot]
            num_left = len(request.tokens) - request.num_computed
            request.num_computed += self.rng.randint(1, num_left)
            is_ready = request.num_computed == len(request.tokens)
            hidden = self.numbers.normal(size=WIDTH) * 3
            logits = self.numbers.normal(size=VOCABULARY) * self.rng.choice([0.1, 2, 20])
            logits[self.numbers.random(VOCABULARY) < 0.2] = -math.inf
            logits[0] = 0.0
            arrays = hidden.astype(np.float32), logits.astype(np.float32)
            rows.append(Row(request, slot, request.num_computed - 1, is_ready, *arrays))
        return rows

    def step(self) -> None:
        self.remove()
        self.admit()
        rows = self.make_rows()
        if not rows:
            return
        step = make_step(rows)
        before = step.logits.clone()
        temperatures = self.selector.select(step)
        expected = [slow_decision(row) for row in rows]
        if temperatures is None:
            assert all(math.isnan(decision.temperature) for decision in expected)
        else:
            assert temperatures.dtype == torch.float32
            # Of an unfinished prefill nothing is sampled, so its temperature is nobody's.
            wanted = list(compress(expected, step.is_ready))
            assert temperatures[step.is_ready].tolist() == approximately(
                [decision.temperature for decision in wanted]
            )
            is_abstained = self.selector.find_abstained(step)
            if is_abstained is None:
                is_abstained = torch.zeros(len(rows), dtype=torch.bool)
            assert is_abstained[step.is_ready].tolist() == [
                decision.has_abstained for decision in wanted
            ]
        assert torch.equal(step.logits, before)
        for row in rows:
            if row.is_ready:
                row.request.tokens += self.random_tokens(1)


def check_broken_states(make_selector) -> None:
    """NaN and infinity, of a broken model, still give temperatures of the head's range."""
    selector = make_selector(HEADS, 3, CPU)
    for select_by in ("argmax", "sample", "mean"):
        options = make_options("head", "first", select=select_by)
        rows = [add(selector, slot, options) for slot in range(3)]
        for row, value in zip(rows, (math.nan, math.inf, -math.inf), strict=True):
            row.hidden = np.full(WIDTH, value, dtype=np.float32)
        assert all(0.0 <= value <= 1.0 for value in select(selector, *rows)), select_by
