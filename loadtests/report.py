"""A comparison as HTML, Markdown and plots, from nothing but its measurements."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from adaptive_head.lpo.report import describe_machine
from loadtests import plots
from loadtests.measurements import ARMS, Measurements
from loadtests.ratios import (
    MIN_PAIRS,
    NUM_BOOTSTRAP,
    Ratio,
    compare_blocks,
    measure_cpu,
    measure_itl,
    measure_requests,
    measure_speed,
    measure_ttft,
)

MEASUREMENTS_FILE = "measurements.json"
HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"
# Name with unit, measure of a block, its factor to that unit, whether more of it is better.
MEASURES = (
    ("time to first token, ms", measure_ttft, 1000, False),
    ("time between tokens, ms", measure_itl, 1000, False),
    ("tokens per second", measure_speed, 1, True),
    ("front end's CPU time a request, ms", measure_cpu, 1000, False),
)


@dataclass(frozen=True)
class Row:
    """A measure: medians over the blocks of each arm, and the ratio."""

    name: str
    adaptive: float
    fixed: float
    ratio: Ratio
    is_more_better: bool

    @property
    def verdict(self) -> str:
        """The ratio in words."""
        if not self.ratio.is_clear:
            return "no difference seen"
        is_better = (self.ratio.mean > 1) == self.is_more_better
        return f"adaptive {'better' if is_better else 'worse'} by {abs(self.ratio.mean - 1):.1%}"


def write_report(measurements: Measurements, folder: Path) -> list[Row]:
    """Write all files into a folder that exists.

    Raises:
        ValueError: there is no whole pair of blocks without a failure.
    """
    (folder / MEASUREMENTS_FILE).write_text(measurements.model_dump_json(indent=1) + "\n")
    rows = make_rows(measurements)
    if not rows:
        raise ValueError("no pair of blocks came to its end without a failure: there is no report")
    svgs = {}
    with plots.style():
        for name, figure in draw_figures(measurements, rows).items():
            plots.save_png(figure, folder / f"{name}.png")
            svgs[name] = plots.write_svg(figure)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name == f"{HTML_FILE}.jinja",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    for file in (HTML_FILE, MARKDOWN_FILE):
        text = environment.get_template(f"{file}.jinja").render(
            about=measurements.plan.scenario.about,
            rows=rows,
            num_pairs=len(measurements.list_pairs()),
            min_pairs=MIN_PAIRS,
            warnings=list_warnings(measurements),
            facts=list_facts(measurements),
            svgs=svgs,
        )
        (folder / file).write_text(text, encoding="utf-8")
    return rows


def make_rows(measurements: Measurements) -> list[Row]:
    """A row for each measure that the blocks have."""
    pairs = measurements.list_pairs()
    rows = []
    for name, measure, factor, is_more_better in MEASURES:
        ratio = compare_blocks(pairs, measure, measurements.plan.scenario.seed)
        if ratio is not None:
            adaptive, fixed = (
                factor * float(np.median([measure(pair[arm]) for pair in pairs])) for arm in (0, 1)
            )
            rows.append(Row(name, adaptive, fixed, ratio, is_more_better))
    return rows


def draw_figures(measurements: Measurements, rows: list[Row]) -> dict[str, Figure]:
    """The plots by name."""
    figures = {
        "ratios": plots.draw_ratios([(row.name.partition(",")[0], row.ratio) for row in rows]),
    }
    pairs = measurements.list_pairs()
    if any(block.ttfts for pair in pairs for block in pair):
        figures["latencies"] = plots.draw_latencies(pairs)
    if temperatures := sum_temperatures(measurements):
        figures["temperatures"] = plots.draw_temperatures(temperatures)
    return figures


def sum_temperatures(measurements: Measurements) -> dict[str, dict[float, int]]:
    """Tokens of the adaptive blocks by head (or policy) and temperature, in order."""
    sums: dict[str, Counter[float]] = {}
    for adaptive, _ in measurements.list_pairs():
        for name, counts in adaptive.temperatures.items():
            never_chosen = dict.fromkeys(measurements.heads.get(name, ()), 0)
            known = sums.setdefault(name, Counter(never_chosen))
            known.update({float(key): count for key, count in counts.items()})
    return {name: dict(sorted(counts.items())) for name, counts in sorted(sums.items())}


def list_warnings(measurements: Measurements) -> list[str]:
    """What the reader must know before believing the numbers."""
    warnings = [f"Tokens do not add up: {sentence}." for sentence in measurements.wrong_tokens]
    failures = Counter(failure for block in measurements.blocks for failure in block.failures)
    for failure, count in failures.most_common(3):
        warnings.append(f"{count} requests failed or were answered wrongly: {failure}")
    num_pairs = len(measurements.list_pairs())
    if failures:
        warnings.append("Pairs with a failure are left out.")
    if num_pairs < MIN_PAIRS:
        warnings.append(
            f"{num_pairs} pairs are few: with fewer than {MIN_PAIRS} the intervals are too narrow."
        )
    return warnings


def list_facts(measurements: Measurements) -> list[tuple[str, str]]:
    """With what, where and how it was measured."""
    plan, machine = measurements.plan, describe_machine()
    pairs = measurements.list_pairs()
    rates = [np.median([measure_requests(pair[arm]) for pair in pairs]) for arm in (0, 1)]
    adaptive, fixed = (
        ", ".join(
            f"{json.dumps(style.fields)} × {style.weight}"
            for style in plan.scenario.styles
            if style.arm == arm
        )
        for arm in ARMS
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    processor = f"{machine['num_cores']} × {machine['cpu']}, {machine['system']}"
    return [
        ("model", measurements.model),
        ("adaptive requests, × weight", adaptive),
        ("fixed requests, × weight", fixed),
        ("users", str(max(stage.users for stage in plan.scenario.stages))),
        ("requests of a user in a block", str(plan.num_requests)),
        ("requests per second", f"adaptive {rates[0]:.4g}, fixed {rates[1]:.4g} (medians)"),
        ("tokens of a block", str(pairs[0][0].num_tokens)),
        ("seed", str(plan.scenario.seed)),
        ("intervals", f"{NUM_BOOTSTRAP} bootstrap samples of the pairs"),
        ("vLLM of the server", " and ".join(sorted(set(measurements.versions.values())))),
        ("the clients' machine", processor),
        ("its GPU", machine["gpu"] or "none"),
        ("its packages", f"Python {machine['python']}, {packages}"),
    ]
