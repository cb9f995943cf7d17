"""The kernels of vLLM's V2 runner through the table of policies, without drafts and with them."""

import numpy as np
import pytest
import torch

from adaptive_head.decision import MILLION
from tests.kernels.test_selector_v2 import OneRowSelector, make_draft_batch
from tests.policy_table import (
    CASES,
    PREEMPTED_AFTER,
    PROMPT_LEN,
    TEXT,
    Answer,
    check,
    enter,
    make_answers,
    run_token_by_token,
)
from tests.selection import CPU, HEADS, MARKER


@pytest.mark.parametrize("name", CASES)
def test_v2_agrees_with_the_reference(name):
    selector = OneRowSelector(HEADS, 4, CPU)
    check(selector, CASES[name], run_token_by_token(selector, CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_rejected_drafts_leave_no_trace(name):
    selector = OneRowSelector(HEADS, 4, CPU)
    check(selector, CASES[name], run_with_drafts(selector, make_answers(CASES[name])))


def run_with_drafts(selector, answers: list[Answer]) -> list[list[tuple[float, bool]]]:
    """Decode with drafts, some of them wrong; both answers share the steps."""
    rng = np.random.default_rng(0)
    enter(selector, answers)
    positions = [PROMPT_LEN - 1 for _ in answers]
    while unfinished := [i for i, position in enumerate(positions) if position < len(TEXT)]:
        requests, num_sampled, hidden, logits = [], [], [], []
        for index in unfinished:
            answer, position = answers[index], positions[index]
            if position >= PREEMPTED_AFTER and answer.slot == index:
                answer.move(selector, 3 - index, position)
            is_first = position < PROMPT_LEN
            num_left = len(TEXT) - 1 - position
            num_right = 0 if is_first else min(int(rng.integers(0, 4)), num_left)
            num_wrong = 0 if is_first else int(rng.integers(0, 3))
            end = position + num_right + 1
            requests.append((answer.slot, TEXT[position:end] + [MARKER] * num_wrong, position))
            for rows, shown in ((hidden, answer.hidden), (logits, answer.logits)):
                # At a wrong draft the model shows something, too.
                rows += [*shown[position:end], *shown[:num_wrong]]
            num_sampled.append(num_right + 1)
            positions[index] = end
        batch = make_draft_batch(selector, requests, PROMPT_LEN)
        step = selector.begin(torch.from_numpy(np.stack(hidden)), batch)
        step.join()
        step.choose_by_logits(torch.from_numpy(np.stack(logits)), 0)
        is_abstained = step.find_abstained()
        step.end(torch.tensor(num_sampled, dtype=torch.int32))
        flags = (step.micros < 0 if is_abstained is None else is_abstained).tolist()
        rows = list(zip((step.micros / MILLION).tolist(), flags, strict=True))
        for index, first, count in zip(unfinished, batch.starts_np[:-1], num_sampled, strict=True):
            answers[index].decisions += rows[first : first + count]
    return [answer.decisions for answer in answers]
