"""The plots of a comparison."""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.measurements import ARMS, Block
from loadtests.ratios import Ratio

# Okabe and Ito's, which colour-blind readers can tell apart; both are seen on white and on black.
COLOURS = {"adaptive": "#2b8fd1", "fixed": "#e08a1e"}
# Replaced by the colour of the text around the picture, which knows light from dark.
_INK = "#010203"
# Else the picture names matplotlib's address, and the time.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_DPI = 130
Named = Sequence[tuple[str, Ratio]]


def draw_ratios(ratios: Named) -> Figure:
    """A row a measure: a dot a pair, and the mean with its interval."""
    figure = Figure(figsize=(7.2, 0.9 + 0.55 * len(ratios)), layout="constrained")
    panel = figure.subplots()
    panel.axvline(1, color=_INK, linewidth=0.8, alpha=0.6)
    rng = np.random.default_rng(0)
    for row, (_, ratio) in enumerate(reversed(ratios)):
        spread = row + rng.uniform(-0.2, 0.2, len(ratio.pairs))
        panel.plot(ratio.pairs, spread, "o", color=COLOURS["adaptive"], alpha=0.35, markersize=4)
        panel.hlines(row, ratio.low, ratio.high, color=COLOURS["adaptive"], linewidth=3)
        panel.plot(ratio.mean, row, "D", color=COLOURS["adaptive"], markersize=6)
    panel.set_yticks(range(len(ratios)), [name for name, _ in reversed(ratios)])
    panel.set_ylim(-0.5, len(ratios) - 0.5)
    panel.set_xlabel("adaptive ÷ fixed (a dot is a pair of blocks)")
    return figure


def draw_latencies(pairs: Sequence[tuple[Block, Block]]) -> Figure:
    """How many streams began, and went on, within so many milliseconds."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for number, arm in enumerate(ARMS):
        blocks = [pair[number] for pair in pairs]
        ttfts = [ttft for block in blocks for ttft in block.ttfts]
        itls = [itl for block in blocks for itl in block.itls]
        for panel, values in zip(panels, (ttfts, itls), strict=True):
            if values:
                panel.ecdf(1000 * np.array(values), color=COLOURS[arm], label=arm, linewidth=1.6)
    panels[0].set_xlabel("time to first token, ms")
    panels[1].set_xlabel("mean time between two tokens of an answer, ms")
    panels[0].set_ylabel("share of streams")
    handles, labels = panels[0].get_legend_handles_labels()
    # Above the panels, where it hides no line.
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_temperatures(temperatures: Mapping[str, Mapping[float, int]]) -> Figure:
    """Share of tokens at each temperature: a panel a head or policy."""
    num = len(temperatures)
    figure = Figure(figsize=(7.2, 2.4 * num), layout="constrained")
    panels = figure.subplots(num, 1, squeeze=False)[:, 0]
    for panel, (name, counts) in zip(panels, temperatures.items(), strict=True):
        places = range(len(counts))
        shares = 100 * np.array(list(counts.values())) / sum(counts.values())
        panel.bar(places, shares, color=COLOURS["adaptive"])
        panel.set_xticks(places, [f"{value:g}" for value in counts])
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("temperature")
        panel.set_ylabel("% of tokens")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """For Markdown, on white."""
    figure.savefig(path, dpi=_DPI, facecolor="white")


def write_svg(figure: Figure) -> str:
    """For HTML, in the colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def style() -> AbstractContextManager[None]:
    """The context in which the plots are drawn and saved."""
    return rc_context(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
