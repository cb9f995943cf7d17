"""The ratios of `benchmarks.engine` as an image."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

MEASURES = {"tpot_s": "time per token", "ttft_s": "time to first token", "tokens_per_s": "tokens/s"}
# What costs nothing, to the one who asked for it.
MARGIN = 0.002
# Share of the room of a batch size that its comparisons take, side by side.
WIDTH = 0.7


def draw_ratios(result: dict[str, Any], path: Path) -> None:
    """Draw each comparison's ratio against the batch size, a panel for each measure.

    Args:
        result: what `benchmarks.engine` prints.
        path: of a PNG, SVG or PDF.
    """
    figure, panels = plt.subplots(len(MEASURES), 1, figsize=(10, 11), sharex=True)
    for panel, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        panel.axhspan(1 - MARGIN, 1 + MARGIN, color="0.8", label=f"1 ± {MARGIN}")
        panel.axhline(1, color="0.5", linewidth=0.8)
        for number, (name, by_size) in enumerate(result["ratios"].items()):
            shift = WIDTH * ((number + 0.5) / len(result["ratios"]) - 0.5)
            _draw_comparison(panel, [by[measure] for by in by_size.values()], shift, number, name)
        sizes = [str(size) for size in next(iter(result["ratios"].values()))]
        panel.set_xticks(range(len(sizes)), sizes)
        for place in range(1, len(sizes)):
            panel.axvline(place - 0.5, color="0.9", linewidth=0.8)
        panel.set_xlim(-0.5, len(sizes) - 0.5)
        panel.set_ylabel(f"ratio of {title}")
        panel.grid(axis="y", alpha=0.3)
    panels[-1].set_xlabel("batch size")
    panels[0].set_title(_describe(result), fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_comparison(
    panel: Any, shares: list[dict[str, Any]], shift: float, number: int, name: str
) -> None:
    """Means with their intervals, in front of the quartiles of the pairs."""
    color = f"C{number}"
    for place, share in enumerate(shares):
        panel.vlines(place + shift, *share["quartiles"], color=color, alpha=0.3, linewidth=7)
        if share["interval_95"] is not None:
            panel.vlines(place + shift, *share["interval_95"], color=color, linewidth=1.5)
    places = [place + shift for place in range(len(shares))]
    means = [share["mean"] for share in shares]
    panel.plot(places, means, "o", color=color, markersize=5, label=name)


def _describe(result: dict[str, Any]) -> str:
    has_intervals = all(
        share["interval_95"] is not None
        for by_size in result["ratios"].values()
        for by_measure in by_size.values()
        for share in by_measure.values()
    )
    return (
        f"{result['config']}, {result['device']}, {result['model_runner']} model runner, "
        f"{result['num_pairs']} pairs\n"
        + ("mean, 95 % interval (line), " if has_intervals else "mean, ")
        + "quartiles of the pairs (bar)"
    )
