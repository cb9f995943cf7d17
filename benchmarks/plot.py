"""The ratios of `benchmarks.engine` as an image."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

MEASURES = {"tpot_s": "time a token", "ttft_s": "time to first token", "tokens_per_s": "tokens/s"}
# What costs nothing, to the one who asked for it.
MARGIN = 0.002


def draw_ratios(result: dict[str, Any], path: Path) -> None:
    """Draw each comparison's ratio against the batch size, a panel for each measure.

    Args:
        result: what `benchmarks.engine` prints.
        path: of a PNG, SVG or PDF.
    """
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(13, 4), sharey=True)
    for panel, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        panel.axhspan(1 - MARGIN, 1 + MARGIN, color="0.85", label=f"1 ± {MARGIN}")
        for number, (name, by_size) in enumerate(result["ratios"].items()):
            sizes = list(by_size)
            shares = [by_size[size][measure] for size in sizes]
            # Side by side, so that intervals do not hide each other.
            places = [place + 0.08 * number for place in range(len(sizes))]
            medians = [share["median"] for share in shares]
            spread = [
                [max(m - s["interval_95"][0], 0) for m, s in zip(medians, shares, strict=True)],
                [max(s["interval_95"][1] - m, 0) for m, s in zip(medians, shares, strict=True)],
            ]
            panel.errorbar(places, medians, yerr=spread, marker="o", capsize=3, label=name)
        panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        panel.set_xlabel("batch size")
        panel.set_title(title)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("ratio: median, 95 % interval")
    panels[-1].legend(fontsize="small")
    what = f"{result['config']}, {result['device']}, {result['model_runner']} model runner"
    figure.suptitle(f"{what}, {result['num_pairs']} pairs")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
