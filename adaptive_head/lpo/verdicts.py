"""The verdicts of the gate as a table and as sentences."""

from collections.abc import Sequence

from rich.table import Table

from adaptive_head.lpo.gate import MAX_DIFFERENCE, MAX_UPPER_END, MIN_ANSWERS, Verdict
from adaptive_head.lpo.statistics import Interval


def make_verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A row for each head."""
    table = Table(
        title="Outside the mix: bad answers. On the mix: wins against the best constant.",
        caption=f"A head passes with at least {MIN_ANSWERS} answers, a difference of at most "
        f"{MAX_DIFFERENCE:g} whose interval ends at {MAX_UPPER_END:g} or below, and a win rate "
        "whose interval does not end below 50 %.",
    )
    table.add_column("head")
    names = ("answers", "bad", "garbled", "looping", "constant", "its bad", "difference")
    for name in (*names, "own constant", "win rate"):
        table.add_column(name, justify="right")
    table.add_column("gate")
    for verdict in verdicts:
        table.add_row(
            verdict.head,
            str(verdict.num_answers),
            f"{verdict.bad:.3f}",
            f"{verdict.garbled:.3f}",
            f"{verdict.looping:.3f}",
            f"{verdict.constant:g}",
            f"{verdict.constant_bad:.3f}",
            _format(verdict.difference, "+.3f"),
            f"{verdict.own_constant:g}",
            _format(verdict.win_rate, ".1%"),
            "passed" if verdict.passes else "failed",
        )
    return table


def write_sentence(verdict: Verdict) -> str:
    """The verdict on one head, and why."""
    if verdict.passes:
        return f"{verdict.head} passes the gate."
    return f"{verdict.head} fails the gate: {'; '.join(verdict.reasons)}."


def _format(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{form}} (no interval)"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
