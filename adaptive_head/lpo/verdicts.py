"""The verdicts of the gate as a table and as sentences."""

from collections.abc import Sequence

from rich.table import Table

from adaptive_head.lpo.gate import MAX_DIFFERENCE, MAX_UPPER_END, MIN_ANSWERS, Verdict
from adaptive_head.lpo.statistics import Interval


def make_verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A column for each head."""
    table = Table(
        caption=f"A head passes with at least {MIN_ANSWERS} answers, a difference of at most "
        f"{MAX_DIFFERENCE:g} whose interval ends at {MAX_UPPER_END:g} or below, and a win rate "
        "whose interval does not end below 50 %.",
    )
    table.add_column("")
    columns = []
    for verdict in verdicts:
        table.add_column(verdict.head, justify="right")
        columns.append(_list_values(verdict))
    for name in columns[0] if columns else ():
        table.add_row(name, *(values[name] for values in columns))
    return table


def _list_values(verdict: Verdict) -> dict[str, str]:
    return {
        "answers to unseen kinds": str(verdict.num_answers),
        "bad": f"{verdict.bad:.3f}",
        "garbled": f"{verdict.garbled:.3f}",
        "looping": f"{verdict.looping:.3f}",
        "best constant there": f"{verdict.constant:g}",
        "its bad": f"{verdict.constant_bad:.3f}",
        "difference": _format(verdict.difference, "+.3f"),
        "best constant on its own tasks": f"{verdict.own_constant:g}",
        "wins against it": _format(verdict.win_rate, ".1%"),
        "gate": "passed" if verdict.passes else "failed",
    }


def write_sentence(verdict: Verdict) -> str:
    """The verdict on one head, and why."""
    if verdict.passes:
        return f"{verdict.head} passes the gate."
    return f"{verdict.head} fails the gate: {'; '.join(verdict.reasons)}."


def _format(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{form}} (no interval)"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
