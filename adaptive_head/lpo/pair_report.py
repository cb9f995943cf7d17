"""What a head's pairs are made of: counts as JSON and Markdown, and a plot after Fig. 7.

The figure is that of Dhuliawala et al. 2024, arXiv 2411.09661: a head learns the temperature that
is chosen more often than it is rejected, not the one that is chosen most often.
"""

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from adaptive_head.files import replace_file
from adaptive_head.lpo.experiment import HeadRecipe
from adaptive_head.lpo.features import find_choices
from adaptive_head.lpo.pairs import PairCounts, PairSet
from adaptive_head.lpo.records import DataError, Response, Side

JSON_FILE = "pair_report.json"
MARKDOWN_FILE = "pair_report.md"
PLOT_FILE = "pair_report.png"

# Okabe and Ito's, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#555555"
_MAX_COLUMNS = 3
_BAR_WIDTH = 0.4


@dataclass(frozen=True)
class TemperatureCounts:
    """How often a reward chose and rejected each temperature.

    Args:
        counts: what came of the task's prompts by that reward.
        chosen: for each of the K temperatures, tokens of chosen sides, a token once for every
            pair that it is in; at the sequence level, chosen responses.
        rejected: likewise.
    """

    counts: PairCounts
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def shares(self) -> tuple[list[float], list[float]]:
        """Of all that was chosen, and of all that was rejected, the share of each temperature."""
        return _normalise(self.chosen), _normalise(self.rejected)

    @property
    def ratios(self) -> list[float | None]:
        """Share of the chosen / share of the rejected; None where nothing was rejected.

        Above 1, the temperature was preferred. With as many chosen as rejected, as there always
        are at the sequence level, it is the ratio of the counts.
        """
        chosen, rejected = self.shares
        return [c / r if r else None for c, r in zip(chosen, rejected, strict=True)]


def write_report(
    pairs: PairSet, responses: Sequence[Response], recipe: HeadRecipe, folder: Path
) -> None:
    """Write `pair_report.json`, `pair_report.md` and `pair_report.png`.

    Args:
        responses: at least those in the pairs.
        recipe: of the head; its level decides what is counted.
        folder: made if missing.

    Raises:
        DataError: a response in the pairs is missing, or has a temperature that is not one of the
            recipe's.
    """
    table = count_temperatures(pairs, responses, recipe)
    content = _describe(table, pairs, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / JSON_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    replace_file(folder / MARKDOWN_FILE, render_markdown(table, pairs, recipe))
    image = io.BytesIO()
    draw_ratios(table, recipe).savefig(image, format="png", dpi=150)
    partial = folder / f"{PLOT_FILE}.partial"
    partial.write_bytes(image.getvalue())
    os.replace(partial, folder / PLOT_FILE)


def count_temperatures(
    pairs: PairSet, responses: Sequence[Response], recipe: HeadRecipe
) -> list[TemperatureCounts]:
    """Count temperatures on both sides of the pairs, by task and reward.

    Raises:
        DataError: see `write_report`.
    """
    by_key = {response.key: response for response in responses}
    choices: dict[tuple[str, int], list[int]] = {}

    def find(side: Side) -> list[int]:
        if side.key not in by_key:
            raise DataError(f"prompt {side.prompt_id}, sample {side.sample}: no such response")
        if side.key not in choices:
            found = find_choices(by_key[side.key], recipe.level, recipe.temperatures)
            choices[side.key] = found
        # At the sequence level a side begins at 0, where the response's only choice is.
        return choices[side.key][side.start : side.stop]

    num_temperatures = len(recipe.temperatures)
    # Two rows: chosen and rejected.
    totals = {
        (counts.task, counts.reward): np.zeros((2, num_temperatures), dtype=np.int64)
        for counts in pairs.report.counts
    }
    for pair in pairs.pairs:
        total = totals[pair.task, pair.reward]
        for row, side in enumerate((pair.chosen, pair.rejected)):
            total[row] += np.bincount(find(side), minlength=num_temperatures)
    table = []
    for counts in pairs.report.counts:
        chosen, rejected = totals[counts.task, counts.reward].tolist()
        table.append(TemperatureCounts(counts, tuple(chosen), tuple(rejected)))
    return table


def render_markdown(table: Sequence[TemperatureCounts], pairs: PairSet, recipe: HeadRecipe) -> str:
    """The report as tables."""
    unit = _name_unit(recipe)
    lines = [
        "# Preference pairs",
        "",
        f"{len(pairs.pairs)} pairs. Counted per temperature: {unit}.",
    ]
    lines += ["", "| task | reward | prompts | pairs | prompts dropped |", "|---|---|--:|--:|---|"]
    for entry in table:
        counts = entry.counts
        dropped = _join(counts.dropped)
        lines.append(
            f"| {counts.task} | {counts.reward} | {counts.num_prompts} | {counts.num_pairs} "
            f"| {dropped} |"
        )
    for task, reasons in pairs.report.dropped_responses.items():
        if reasons:
            lines += ["", f"Responses of {task} left out: {_join(reasons)}."]
    for entry in table:
        head = [f"{value:g}" for value in recipe.temperatures]
        ratios = ["–" if ratio is None else f"{ratio:.2f}" for ratio in entry.ratios]
        rows = [
            ["temperature", *head],
            ["---", *["--:"] * len(head)],
            ["chosen", *map(str, entry.chosen)],
            ["rejected", *map(str, entry.rejected)],
            ["chosen / rejected", *ratios],
        ]
        lines += ["", f"## {entry.counts.task}: {entry.counts.reward}", ""]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    note = "chosen / rejected compares shares of each side: above 1, the temperature is preferred."
    return "\n".join([*lines, "", note, ""])


def draw_ratios(table: Sequence[TemperatureCounts], recipe: HeadRecipe) -> Figure:
    """A panel a task and reward: shares of the chosen and the rejected, and their ratios."""
    num_columns = min(_MAX_COLUMNS, max(1, len(table)))
    num_rows = max(1, math.ceil(len(table) / num_columns))
    width = max(4.2, 0.62 * len(recipe.temperatures) + 1.2)
    figure = Figure(figsize=(width * num_columns, 3.3 * num_rows + 0.4), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel, entry in zip(panels, table, strict=False):
        _draw_panel(panel, entry, recipe)
    for panel in panels[len(table) :]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _draw_panel(panel: Axes, entry: TemperatureCounts, recipe: HeadRecipe) -> None:
    positions = np.arange(len(recipe.temperatures))
    chosen, rejected = map(np.array, entry.shares)
    panel.bar(positions - _BAR_WIDTH / 2, chosen, _BAR_WIDTH, color=_BLUE, label="chosen")
    panel.bar(positions + _BAR_WIDTH / 2, rejected, _BAR_WIDTH, color=_ORANGE, label="rejected")
    for position, ratio, height in zip(
        positions, entry.ratios, np.maximum(chosen, rejected), strict=True
    ):
        if ratio is not None:
            panel.annotate(
                f"{ratio:.2f}",
                (position, height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                fontweight="bold" if ratio > 1 else "normal",
                color=_BLUE if ratio > 1 else _GREY,
            )
    counts = entry.counts
    num_prompts = counts.num_prompts - sum(counts.dropped.values())
    panel.set_title(f"{counts.task}: {counts.reward}", fontsize=11)
    panel.text(
        0.5,
        0.98,
        f"{counts.num_pairs:,} pairs of {num_prompts:,} prompts",
        transform=panel.transAxes,
        ha="center",
        va="top",
        fontsize=8,
        color=_GREY,
    )
    panel.set_xticks(positions, [f"{value:g}" for value in recipe.temperatures])
    panel.set_xlabel("temperature")
    panel.set_ylabel(f"share of {_name_unit(recipe)}")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    # Room for the line of counts above the highest ratio.
    panel.set_ylim(0, 1.28 * max(0.01, *chosen, *rejected))
    panel.spines[["top", "right"]].set_visible(False)


def _describe(
    table: Sequence[TemperatureCounts], pairs: PairSet, recipe: HeadRecipe
) -> dict[str, Any]:
    rewards = [
        {
            "task": entry.counts.task,
            "reward": entry.counts.reward,
            "num_prompts": entry.counts.num_prompts,
            "num_pairs": entry.counts.num_pairs,
            "dropped": entry.counts.dropped,
            "chosen": entry.chosen,
            "rejected": entry.rejected,
            "ratios": entry.ratios,
        }
        for entry in table
    ]
    return {
        "num_pairs": len(pairs.pairs),
        "level": recipe.level,
        "unit": _name_unit(recipe),
        "temperatures": recipe.temperatures,
        "rewards": rewards,
        "dropped_responses": pairs.report.dropped_responses,
    }


def _name_unit(recipe: HeadRecipe) -> str:
    return "tokens" if recipe.level == "token" else "responses"


def _normalise(counts: Sequence[int]) -> list[float]:
    total = max(1, sum(counts))
    return [count / total for count in counts]


def _join(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in reasons.items()) or "–"
