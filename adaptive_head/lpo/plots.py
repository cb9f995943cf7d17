"""The plots of an evaluation, from nothing but `results.json`'s content."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

Json = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE = "#0072B2"
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
# More lines than colours are told apart by these.
DASHES = ("-", "--", ":", "-.")
GREY = "0.55"
_DPI = 130
_MAX_TITLE = 34


def draw_plots(results: Json, folder: Path) -> list[str]:
    """Write the plots that there is something to draw for.

    Returns:
        Their file names.
    """
    drawn = {
        "temperatures.png": draw_temperatures(results),
        "win_rates.png": draw_win_rates(results),
        "positions.png": draw_positions(results),
        "spans.png": draw_spans(results),
    }
    for name, figure in drawn.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            figure.savefig(folder / name, dpi=_DPI)
    return [name for name, figure in drawn.items() if figure is not None]


def draw_temperatures(results: Json) -> Figure | None:
    """How often each temperature was chosen: a row of panels a head, a panel a task."""
    heads = results["heads"]
    if not heads:
        return None
    columns = max(len(head["tasks"]) for head in heads.values())
    figure, panels = _make_panels(len(heads), columns, 2.9, 2.3)
    for row, (name, head) in zip(panels, heads.items(), strict=True):
        highest = 0.0
        for panel, (task, of_task) in zip(row, head["tasks"].items(), strict=False):
            chosen = of_task["chosen"]
            counts = chosen["counts"]
            shares = 100 * np.array(list(counts.values())) / sum(counts.values())
            highest = max(highest, float(shares.max()))
            panel.set_visible(True)
            panel.bar(range(len(shares)), shares, color=BLUE, width=0.8)
            panel.set_xticks(range(len(shares)), list(counts), fontsize=_shrink(len(counts)))
            _name_panel(panel, name, f"{task}, mean {chosen['mean']:.2f}")
            panel.set_xlabel("temperature")
        for panel in row:
            panel.set_ylim(0, 1.05 * highest)
        unit = "tokens" if head["level"] == "token" else "responses"
        row[0].set_ylabel(f"% of {unit}")
    return figure


def draw_win_rates(results: Json) -> Figure | None:
    """Win rates with intervals: a row of panels a head, a panel a task, one for the average."""
    heads = results["heads"]
    if not heads:
        return None
    tables = [
        [(task, of_task["rows"]) for task, of_task in head["tasks"].items()]
        + ([("average over tasks", head["average"])] if head["average"] else [])
        for head in heads.values()
    ]
    num_arms = max(len(_list_opponents(rows)) for of_head in tables for _, rows in of_head)
    figure, panels = _make_panels(len(tables), max(map(len, tables)), 3.3, 0.9 + 0.23 * num_arms)
    for row, name, of_head in zip(panels, heads, tables, strict=True):
        rates = [_fill_bounds(r["win_rate"]) for _, rows in of_head for r in _list_opponents(rows)]
        ends = [100 * rate[end] - 50 for rate in rates for end in ("low", "high")]
        reach = max(5.0, 1.08 * max(map(abs, ends)))
        for panel, (title, rows) in zip(row, of_head, strict=False):
            panel.set_visible(True)
            _draw_forest(panel, _list_opponents(rows), panel is row[0])
            panel.set_xlim(50 - reach, 50 + reach)
            _name_panel(panel, name, title)
            panel.set_xlabel("the head wins, %")
    return figure


def _list_opponents(rows: Sequence[Json]) -> list[Json]:
    return [row for row in rows if "win_rate" in row and row["votes"] == 1]


def _fill_bounds(interval: Json) -> Json:
    """Without an interval there is a point."""
    return {key: interval["mean"] if value is None else value for key, value in interval.items()}


def _draw_forest(panel: Axes, rows: Sequence[Json], has_labels: bool) -> None:
    rates = [_fill_bounds(row["win_rate"]) for row in rows]
    low, mean, high = (100 * np.array([r[key] for r in rates]) for key in ("low", "mean", "high"))
    places = np.arange(len(rows))[::-1]
    panel.axvline(50, color=GREY, linewidth=1)
    for is_control, colour, marker in ((False, GREY, "o"), (True, BLUE, "D")):
        drawn = np.array([(row["kind"] != "fixed") == is_control for row in rows], dtype=bool)
        panel.hlines(places[drawn], low[drawn], high[drawn], color=colour, linewidth=1.8)
        panel.plot(mean[drawn], places[drawn], marker, color=colour, markersize=4.5)
    panel.set_ylim(-0.7, len(rows) - 0.3)
    panel.set_yticks(places, [row["label"] for row in rows] if has_labels else [], fontsize=8.5)


def draw_positions(results: Json) -> Figure | None:
    """Mean temperature by the token's position: a panel a token-level head, a line a task."""
    curves = {
        name: {
            task: of_task["chosen"]["by_position"]
            for task, of_task in head["tasks"].items()
            if of_task["chosen"]["by_position"]
        }
        for name, head in results["heads"].items()
    }
    curves = {name: of_head for name, of_head in curves.items() if of_head}
    if not curves:
        return None
    figure, panels = _make_panels(len(curves), 1, 7.0, 2.9)
    for (panel,), (name, of_head) in zip(panels, curves.items(), strict=True):
        panel.set_visible(True)
        for number, (task, curve) in enumerate(of_head.items()):
            _draw_curve(panel, curve, number, task)
        _finish_curves(panel, name, "position in the response, tokens")
    return figure


def draw_spans(results: Json) -> Figure | None:
    """Mean temperature by the distance from a span's beginning, as in Fig. 6 of the paper."""
    curves = {
        name: {
            f"{task}: {reward}": spans["by_distance"]
            for task, of_task in head["tasks"].items()
            for reward, spans in of_task["chosen"]["spans"].items()
            if spans["by_distance"]["means"]
        }
        for name, head in results["heads"].items()
    }
    curves = {name: of_head for name, of_head in curves.items() if of_head}
    if not curves:
        return None
    figure, panels = _make_panels(len(curves), 1, 7.0, 2.9)
    for (panel,), (name, of_head) in zip(panels, curves.items(), strict=True):
        panel.set_visible(True)
        for number, (label, curve) in enumerate(of_head.items()):
            _draw_curve(panel, curve, number, label)
            panel.plot(0, curve["means"][0], "o", color=COLOURS[number % len(COLOURS)])
        _finish_curves(panel, name, "tokens since the beginning of a span (0 is its first token)")
    return figure


def _draw_curve(panel: Axes, curve: Json, number: int, label: str) -> None:
    means = np.array(curve["means"])
    errors = np.array([0.0 if error is None else error for error in curve["errors"]])
    colour = COLOURS[number % len(COLOURS)]
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    positions = np.arange(len(means))
    panel.fill_between(
        positions, means - errors, means + errors, color=colour, alpha=0.18, linewidth=0
    )
    panel.plot(positions, means, dash, color=colour, linewidth=1.5, label=label)


def _finish_curves(panel: Axes, head: str, unit: str) -> None:
    panel.set_title(f"{head}: mean temperature, with 95 % bands", fontsize=10)
    panel.set_xlabel(unit)
    panel.set_ylabel("temperature")
    _, top = panel.get_ylim()
    panel.set_ylim(-0.02 * top, 1.04 * top)
    # Beside the panel, where it can hide no line.
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def _make_panels(
    num_rows: int, num_columns: int, width: float, height: float
) -> tuple[Figure, np.ndarray]:
    """Invisible panels [rows, columns], each about so many inches wide and high."""
    figure = Figure(
        figsize=(width * num_columns + 1.2, height * num_rows + 0.3),
        layout=ConstrainedLayoutEngine(),
    )
    panels: np.ndarray = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8.5)
    return figure, panels


def _name_panel(panel: Axes, *lines: str) -> None:
    """A title whose lines are no wider than the panel."""
    shown = [line if len(line) <= _MAX_TITLE else f"{line[: _MAX_TITLE - 1]}…" for line in lines]
    panel.set_title("\n".join(shown), fontsize=9.5)


def _shrink(num_labels: int) -> float:
    """A font size at which so many labels stand beside each other."""
    return max(5.0, 8.5 - 0.35 * max(0, num_labels - 6))
