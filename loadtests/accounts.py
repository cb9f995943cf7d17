"""Tokens as the clients count them, against tokens as the server counts them.

A client that left, or whose request failed, cannot know how many tokens were made for it: no fewer
than it has received, and no more than it asked for. So the clients' count is a range, and a point
where every answer came whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loadtests.target import ADAPTIVE_TOKENS, ALL_TOKENS


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


def _format(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
