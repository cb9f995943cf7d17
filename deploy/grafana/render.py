"""Draw the dashboard without Grafana, from the same queries.

python -m deploy.grafana.render --prometheus URL --out FILE [--minutes 5]
"""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.grafana.queries import NUM_COLUMNS, PrometheusAPI, read_panels

COLUMN_WIDTH, ROW_HEIGHT, GAP = 80, 38, 8  # pixels
DPI = 100
PAGE, PANEL, GRID, TEXT, FAINT = "#111217", "#1b1c22", "#30323a", "#d5d6de", "#8e9099"
GOOD, BAD = "#73bf69", "#f2495c"
PALETTE = (
    *("#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#b877d9"),
    *("#e0629b", "#37d5cf", "#a16f4a", "#c8d26b", "#8ab8ff"),
)


def format_value(value: float, unit: str | None) -> str:
    """As Grafana writes a number, roughly. A unit such as `tokens/s` is left to the caller."""
    if unit == "percentunit":
        return f"{value:.0%}" if value == 0 or value >= 0.1 else f"{value:.1%}"
    if unit == "s":
        return f"{value:.3g} s" if value == 0 or value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


class Page:
    """A picture of the panels."""

    def __init__(self, prometheus: PrometheusAPI, panels: list[dict[str, Any]], title: str) -> None:
        self._prometheus = prometheus
        self._colors: dict[str, str] = {}
        num_rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
        self._top = 40
        self._width = NUM_COLUMNS * COLUMN_WIDTH
        self._height = num_rows * ROW_HEIGHT + self._top + GAP
        size = self._width / DPI, self._height / DPI
        self.figure = Figure(figsize=size, dpi=DPI, facecolor=PAGE)
        self._write(2 * GAP, 26, title, size=13, weight="bold")
        start, end = (
            datetime.fromtimestamp(when, UTC) for when in (prometheus.start, prometheus.end)
        )
        span = f"{start:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC"
        self._write(self._width - 2 * GAP, 26, span, color=FAINT, ha="right")
        for panel in panels:
            self._draw(panel)

    def _draw(self, panel: dict[str, Any]) -> None:
        place = panel["gridPos"]
        left, top = place["x"] * COLUMN_WIDTH + GAP / 2, place["y"] * ROW_HEIGHT + self._top
        width, height = place["w"] * COLUMN_WIDTH - GAP, place["h"] * ROW_HEIGHT - GAP
        if panel["type"] == "row":
            self._write(left + GAP, top + 20, panel["title"], size=11, weight="bold")
            return
        x, y, *size = self._box(left, top, width, height)
        self.figure.add_artist(Rectangle((x, y), *size, fc=PANEL, ec=GRID, zorder=-1))
        self._write(left + 10, top + 18, panel["title"], size=9, weight="bold")
        defaults = panel.get("fieldConfig", {}).get("defaults", {})
        if (unit := defaults.get("unit", "")).endswith("/s"):
            self._write(left + width - 12, top + 18, unit, FAINT, 8, ha="right")
        margins = {"timeseries": (44, 32, 24, 56), "heatmap": (40, 32, 40, 28)}
        a, b, c, d = margins.get(panel["type"], (10, 26, 10, 6))
        axes = self.figure.add_axes(
            self._box(left + a, top + b, width - a - c, height - b - d), facecolor="none"
        )
        draw = {"timeseries": self._lines, "heatmap": self._heat, "stat": self._number}
        draw.get(panel["type"], self._table)(axes, panel, defaults)

    def _box(
        self, left: float, top: float, width: float, height: float
    ) -> tuple[float, float, float, float]:
        """From pixels below the page's top left corner to matplotlib's shares of the page."""
        bottom = self._height - top - height
        x, y = self._width, self._height
        return left / x, bottom / y, width / x, height / y

    def _write(
        self, x: float, y: float, words: str, color: str = TEXT, size: int = 9, **style: Any
    ) -> None:
        self.figure.text(
            x / self._width, 1 - y / self._height, words, color=color, fontsize=size, **style
        )

    def _color(self, name: str) -> str:
        return self._colors.setdefault(name, PALETTE[len(self._colors) % len(PALETTE)])

    def _lines(self, axes: Axes, panel: dict[str, Any], defaults: dict[str, Any]) -> None:
        curves = self._prometheus.find_curves(panel)
        if not curves:
            return say_no_data(axes, defaults.get("noValue", "No data"))
        custom = defaults["custom"]
        opacity = custom["fillOpacity"] / 100
        style = "steps-post" if custom.get("lineInterpolation") == "stepAfter" else "default"
        below: dict[float, float] = {}
        for name, series in curves:
            times, values, color = as_dates(series.times), series.values, self._color(name)
            floor = np.zeros_like(values)
            if "stacking" in custom:
                floor = np.array([below.get(when, 0.0) for when in series.times])
                values = floor + np.nan_to_num(values)
                below |= dict(zip(series.times, values, strict=True))
            axes.plot(times, values, color=color, lw=1.4, ds=style, label=name)
            axes.fill_between(times, floor, values, color=color, alpha=opacity, lw=0)
        highest = max(np.nanmax(line.get_ydata(), initial=0) for line in axes.lines)
        top = defaults.get("max") or highest or 1
        if "thresholdsStyle" in custom:
            axes.axhline(defaults["thresholds"]["steps"][1]["value"], color=BAD, lw=1, ls="--")
        axes.set_ylim(0, 1.04 * top)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: format_value(value, defaults.get("unit")))
        )
        axes.grid(axis="y", color=GRID, lw=0.6)
        self._show_time(axes)
        handles, names = axes.get_legend_handles_labels()
        corner = axes.get_position().p0 - (34 / self._width, 50 / self._height)
        self.figure.legend(
            handles[:8],
            names[:8],
            loc="lower left",
            bbox_to_anchor=corner,
            ncols=4,
            fontsize=7,
            frameon=False,
            labelcolor=TEXT,
            borderaxespad=0,
            handlelength=1,
        )

    def _heat(self, axes: Axes, panel: dict[str, Any], defaults: dict[str, Any]) -> None:
        found = sorted(self._prometheus.find_curves(panel), key=lambda curve: float(curve[0]))
        if not found:
            return say_no_data(axes)
        names = [name for name, _ in found]
        times = sorted({when for _, series in found for when in series.times})
        column = {when: number for number, when in enumerate(times)}
        cumulative = np.zeros((len(found), len(times)))
        for row, (_, series) in enumerate(found):
            cumulative[row, [column[when] for when in series.times]] = np.nan_to_num(series.values)
        counts = np.diff(cumulative, axis=0, prepend=0).clip(0)
        image = axes.pcolormesh(
            as_dates(np.array(times)),
            range(len(names)),
            np.ma.masked_less(counts, 1e-9),
            cmap="inferno",
            norm=PowerNorm(0.5, 0, max(counts.max(), 1e-9)),
            shading="nearest",
        )
        axes.set_yticks(range(len(names)), names)
        if not counts[-1].any():
            axes.set_ylim(-0.5, len(names) - 1.5)  # nothing above the highest bound
        self._show_time(axes)
        bar = self.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
        bar.ax.tick_params(colors=FAINT, labelsize=7, length=0)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}/s"))
        bar.outline.set_visible(False)

    def _show_time(self, axes: Axes) -> None:
        axes.set_xlim(*as_dates(np.array([self._prometheus.start, self._prometheus.end])))
        axes.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=6))
        axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
        axes.tick_params(colors=FAINT, labelsize=7, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    def _number(self, axes: Axes, panel: dict[str, Any], defaults: dict[str, Any]) -> None:
        axes.axis("off")
        curves = self._prometheus.find_curves(panel)
        if not curves:
            return say_no_data(axes)
        series = curves[0][1]
        value = series.values[np.isfinite(series.values)][-1:]
        if not value.size:
            return say_no_data(axes)
        steps = defaults["thresholds"]["steps"]
        color = [
            step["color"] for step in steps if step["value"] is None or value[0] >= step["value"]
        ][-1]
        color = {"green": GOOD, "red": BAD}.get(color, TEXT)
        axes.set_ylim(0, 3 * max(np.nanmax(series.values), 1e-9))
        axes.fill_between(as_dates(series.times), 0, series.values, color=color, alpha=0.18, lw=0)
        axes.text(
            0.5,
            0.56,
            format_value(value[0], defaults.get("unit")),
            transform=axes.transAxes,
            color=color,
            fontsize=20,
            ha="center",
            va="center",
        )

    def _table(self, axes: Axes, panel: dict[str, Any], defaults: dict[str, Any]) -> None:
        axes.axis("off")
        rows = self._prometheus.query(panel["targets"][0]["expr"])
        if not rows:
            return say_no_data(axes, defaults["noValue"])
        columns: dict[str, str] = panel["transformations"][0]["options"]["renameByName"]
        cells = [
            [
                row.labels.get(name)
                or ("" if name != "Value" else format_value(row.values[0], defaults.get("unit")))
                for name in columns
            ]
            for row in rows
        ]
        cells = [list(columns.values()), *cells]
        widths = [max(len(line[column]) for line in cells) + 3 for column in range(len(columns))]
        for number, line in enumerate(cells):
            for column, words in enumerate(line):
                axes.text(
                    sum(widths[:column]) / max(sum(widths), 60),
                    0.95 - number * 0.11,
                    words,
                    va="top",
                    transform=axes.transAxes,
                    color=TEXT if number else FAINT,
                    fontsize=8,
                )


def as_dates(times: np.ndarray) -> np.ndarray:
    return (times * 1000).astype("datetime64[ms]")


def say_no_data(axes: Axes, words: str = "No data") -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, words, transform=axes.transAxes, color=FAINT, fontsize=10, ha="center")


def main(
    prometheus: Annotated[
        str, typer.Option(help="where Prometheus listens")
    ] = "http://127.0.0.1:9090",
    out: Annotated[Path, typer.Option(help="a .png, .svg or .pdf file")] = Path("dashboard.png"),
    minutes: Annotated[float, typer.Option(min=0.1, help="how far back")] = 5,
    rate: Annotated[str, typer.Option(help="range of rates: four scrape intervals or more")] = "1m",
) -> None:
    """Draw the dashboard without Grafana, from the same queries."""
    api = PrometheusAPI(prometheus, time.time(), 60 * minutes)
    try:
        heads = sorted({series.labels["head"] for series in api.query("adaptive_requests_total")})
        page = Page(api, read_panels(heads, rate), "Adaptive temperatures")
    except httpx.HTTPError as error:
        message = f"no answer from {prometheus}: {error}"
        raise typer.BadParameter(message, param_hint="--prometheus") from None
    page.figure.savefig(out)


if __name__ == "__main__":
    typer.run(main)
