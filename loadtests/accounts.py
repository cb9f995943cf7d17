"""Tokens as the clients count them, against tokens as the server counts them.

A client that left, or whose request failed, cannot know how many tokens were made for it: no fewer
than it has received, and no more than it asked for. So the clients' count is a range, and a point
where every answer came whole.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from loadtests.target import ADAPTIVE_TOKENS, ALL_TOKENS, RUNNING, WAITING, read_counters

_POLL_S = 0.1
# The server may count an answer's last tokens shortly after it has sent them.
_SETTLE_S = 5.0


@dataclass
class Entry:
    """One request: between `low` and `high` tokens were made for it."""

    is_adaptive: bool
    low: int
    high: int

    def settle(self, num_tokens: int) -> None:
        """The answer came whole, or was refused (0)."""
        self.low = self.high = num_tokens


@dataclass
class Accounts:
    """All requests of a run."""

    entries: list[Entry] = field(default_factory=list)

    def begin(self, is_adaptive: bool, max_tokens: int) -> Entry:
        """A request is about to be sent that may have so many tokens in all."""
        entry = Entry(is_adaptive, 0, max_tokens)
        self.entries.append(entry)
        return entry

    def count(self, metric: str) -> tuple[int, int]:
        """The least and the most by which a metric should have risen."""
        counted = [entry for entry in self.entries if entry.is_adaptive or metric == ALL_TOKENS]
        return sum(entry.low for entry in counted), sum(entry.high for entry in counted)

    def compare(self, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
        """A sentence for each metric that has risen by another number; [] where all agree."""
        wrong = []
        for metric in (ADAPTIVE_TOKENS, ALL_TOKENS):
            rise = round(after[metric] - before[metric])
            low, high = self.count(metric)
            if not low <= rise <= high:
                wrong.append(
                    f"the clients counted {_format(low, high)} tokens, but the server's {metric} "
                    f"rose by {rise} (does it have other clients?)"
                )
        return wrong

    def describe(self, before: Mapping[str, float], after: Mapping[str, float]) -> str:
        """One sentence with both counts."""
        parts = [
            f"{metric} rose by {after[metric] - before[metric]:g}, "
            f"the clients counted {_format(*self.count(metric))}"
            for metric in (ADAPTIVE_TOKENS, ALL_TOKENS)
        ]
        num_open = sum(entry.low != entry.high for entry in self.entries)
        return f"{'; '.join(parts)} ({num_open} of {len(self.entries)} requests did not end whole)"


def close_accounts(
    accounts: Accounts, url: str, before: Mapping[str, float], max_wait: float
) -> tuple[list[str], str]:
    """Wait until the server is idle, and compare.

    Args:
        before: what the server had counted before the first request.
        max_wait: seconds that it may still be busy.

    Returns:
        A sentence for each thing that is wrong, and one with both counts.

    Raises:
        TargetError: the server does not answer.
    """
    deadline = time.monotonic() + max_wait
    while num_busy := _count_busy(read_counters(url)):
        if time.monotonic() > deadline:
            sentence = (
                f"{num_busy:g} requests still ran or waited {max_wait:g} s after the last user "
                "had left (limits.max_idle_wait)"
            )
            return [sentence], "not compared"
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _SETTLE_S
    while True:
        after = read_counters(url)
        wrong = accounts.compare(before, after)
        if not wrong or time.monotonic() > deadline:
            return wrong, accounts.describe(before, after)
        time.sleep(_POLL_S)


def _count_busy(counters: Mapping[str, float]) -> float:
    return counters[RUNNING] + counters[WAITING]


def _format(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
