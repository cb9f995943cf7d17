"""Every policy at every level, however a head selects, and whether it may abstain.

One table for every way in which a selector is driven. Each case is two answers: one as it is, and
one with other hidden states, scaled and bounded. Both are preempted once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from adaptive_head.abstention import Abstention
from adaptive_head.options import Options
from tests.selection import (
    HEADS,
    LEVELLED,
    MARKER,
    START,
    VOCABULARY,
    WIDTH,
    Decision,
    Request,
    Row,
    add,
    make_options,
    make_step,
    slow_decision,
)

PROMPT_LEN, SEED = 3, 5
TEXT = [1, MARKER, 1, MARKER, 3, START, 2, 1, MARKER, 4, 1, 1, MARKER, MARKER, START, 1, 2, 3, 1, 2]
# The first position after which both answers change their slots.
PREEMPTED_AFTER = 8
HEAD = "first"
ABSTENTIONS = {
    "always": None,
    "probability": Abstention(threshold=0.5, fallback=1.3, statistic="probability"),
    "margin": Abstention(threshold=0.25, fallback=0.7, statistic="margin"),
}


def list_cases() -> Iterator[tuple[str, Options]]:
    """Names and options."""
    levels = ("token", "sequence")
    for level, select, abstain in product(levels, ("argmax", "sample", "mean"), ABSTENTIONS):
        found = ABSTENTIONS[abstain]
        parameters = () if found is None else found.parameters
        options = make_options("head", HEAD, level=level, select=select, parameters=parameters)
        yield f"head-{level}-{select}-{abstain}", options
    others = {
        "entropy": make_options("entropy"),
        "constant": make_options("constant"),
        "schedule": make_options("schedule", parameters=(1.0, 0.2, 9.0)),
        "two_phase": make_options("two_phase", marker_token_ids=(1, MARKER)),
        "list": make_options("list", temperatures=(0.3, 0.0, 1.7, 0.2, 0.4, 2.0, 0.6)),
    }
    for policy, options in others.items():
        for level in levels if policy in LEVELLED else levels[:1]:
            yield f"{policy}-{level}", replace(options, level=level)
    # Of a prompt that ends one thinking, and may begin to end another.
    for num_written in range(PROMPT_LEN):
        yield f"two_phase-{num_written}", replace(others["two_phase"], num_written=num_written)


CASES = dict(list_cases())


@dataclass
class Answer:
    """An answer, and what a model shows at each of its tokens.

    Attributes:
        hidden: float32 [tokens, width].
        logits: float32 [tokens, vocabulary].
        decisions: of the selector under test, for the generated tokens so far.
    """

    options: Options
    hidden: np.ndarray
    logits: np.ndarray
    slot: int
    decisions: list[tuple[float, bool]]

    def make_row(self, position: int) -> Row:
        request = Request(self.options, SEED, TEXT, PROMPT_LEN)
        return Row(request, self.slot, position, True, self.hidden[position], self.logits[position])

    def move(self, selector, slot: int, position: int) -> None:
        """Preempt the answer before a position, and let it resume in another slot."""
        parked = selector.park(self.slot)
        selector.add(self.slot, None, None)
        self.slot = slot
        selector.add(slot, self.options, SEED)
        selector.flush()
        selector.start_phase(slot, TEXT[: position + 1], PROMPT_LEN)
        selector.restore(slot, parked)


def make_answers(options: Options) -> list[Answer]:
    answers = []
    for index, one in enumerate((options, replace(options, scale=1.5, min=0.1, max=0.8))):
        numbers = np.random.default_rng(2 + index)
        hidden = numbers.normal(size=(len(TEXT), WIDTH)).astype(np.float32) * 3
        logits = numbers.normal(size=(len(TEXT), VOCABULARY)).astype(np.float32) * 4
        answers.append(Answer(one, hidden, logits, index, []))
    return answers


def expect(options: Options) -> tuple[list[list[Decision]], Counter[float]]:
    """The decisions of both answers, and how often the head picked each temperature."""
    found = []
    for answer in make_answers(options):
        request = Request(answer.options, SEED, TEXT, PROMPT_LEN)
        rows = [answer.make_row(position) for position in range(PROMPT_LEN - 1, len(TEXT))]
        # One request, which remembers its choice.
        found.append([slow_decision(replace(row, request=request)) for row in rows])
    picked = Counter(decision.picked for answer in found for decision in answer)
    del picked[None]
    return found, picked


def enter(selector, answers: list[Answer]) -> None:
    for answer in answers:
        add(selector, answer.slot, answer.options, tokens=TEXT[:PROMPT_LEN], seed=SEED)


def run_token_by_token(selector, options: Options) -> list[list[tuple[float, bool]]]:
    """Lead a selector with room for 4 requests through both answers, a row per step."""
    answers = make_answers(options)
    enter(selector, answers)
    for position in range(PROMPT_LEN - 1, len(TEXT)):
        if position == PREEMPTED_AFTER:
            for index, answer in enumerate(answers):
                answer.move(selector, 3 - index, position)
        step = make_step([answer.make_row(position) for answer in answers])
        temperatures, is_abstained = selector.select(step), selector.find_abstained(step)
        flags = [False] * len(answers) if is_abstained is None else is_abstained.tolist()
        for answer, temperature, flag in zip(answers, temperatures.tolist(), flags, strict=True):
            answer.decisions.append((temperature, flag))
    return [answer.decisions for answer in answers]


def check(selector, options: Options, found: list[list[tuple[float, bool]]]) -> None:
    """Compare a selector's decisions and counts with the reference."""
    expected, picked = expect(options)
    for decisions, right in zip(found, expected, strict=True):
        assert len(decisions) == len(right)
        for (temperature, has_abstained), decision in zip(decisions, right, strict=True):
            # A float32 product may be rounded in another place.
            tolerance = 2e-6 + 1e-4 * decision.temperature
            assert abs(temperature - decision.temperature) <= tolerance
            assert has_abstained == decision.has_abstained
    (counts,) = (head.counts for head in selector.count_choices() if head.name == HEAD)
    assert {value: count for value, count in counts.items() if count} == picked
    assert counts.keys() == set(HEADS[HEAD].config.temperatures)
