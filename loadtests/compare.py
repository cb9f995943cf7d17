"""Adaptive against fixed: plans the blocks, has them measured, and writes the report."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loadtests.measurements import KINDS, Measurements, Plan
from loadtests.scenario import Scenario, ScenarioError

if TYPE_CHECKING:
    from loadtests.report import Row


class CompareError(Exception):
    """A comparison that could not be made; the reason has been said."""


def make_plan(
    scenario: Scenario, url: str, fixed_url: str, num_pairs: int, num_requests: int
) -> Plan:
    """What is measured.

    Raises:
        ScenarioError: the scenario has nothing to compare.
    """
    arms = {style.arm for style in scenario.styles}
    if len(arms) < 2:
        raise ScenarioError(f"styles: a comparison needs adaptive and fixed ones, not only {arms}")
    if not any(getattr(scenario.mix, kind) for kind in KINDS):
        raise ScenarioError(f"mix: a comparison needs one of {', '.join(KINDS)}")
    # Answers of the same length in both arms.
    work = scenario.work.model_copy(update={"ignore_eos": True})
    return Plan(
        urls={"adaptive": url, "fixed": fixed_url},
        scenario=scenario.model_copy(update={"work": work}),
        num_pairs=num_pairs,
        num_requests=num_requests,
    )


def compare(plan: Plan, folder: Path) -> tuple[Measurements, list["Row"]]:
    """Measure, and write the report into a folder.

    Raises:
        CompareError: the server cannot be load-tested.
        ValueError: nothing was measured of which there could be a report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measuring = subprocess.Popen(
        [sys.executable, "-m", "loadtests.blocks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    output = _communicate(measuring, plan.model_dump_json())
    if measuring.returncode:
        raise CompareError
    measurements = Measurements.model_validate_json(output)
    # Only now, since it takes seconds to import and mistakes should be told at once.
    from loadtests.report import write_report

    return measurements, write_report(measurements, folder)


def _communicate(measuring: subprocess.Popen[str], plan: str) -> str:
    """What the other process writes; after Ctrl-C, which it hears too, what it has so far."""
    try:
        return measuring.communicate(plan)[0]
    except KeyboardInterrupt:
        return measuring.communicate()[0]
