"""The command line that both tiers share."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.gpu.checks import (
    OK,
    SKIPPED,
    Check,
    Setting,
    describe_run,
    has_passed,
    make_table,
    run_checks,
)

MACHINE = Check("machine", "tests.gpu.machine:describe", 90)
BUDGET_S = 360.0


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of both tiers."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: what a CPU can, through Triton's interpreter, to try the script itself",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this check only; may repeat"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all checks together"
    )
    return parser


def run_tier(
    tier: int,
    groups: Sequence[Sequence[Check]],
    setting: Setting,
    json_file: Path | None = None,
    only: Sequence[str] = (),
) -> int:
    """Run a tier, print its table, write its JSON.

    Args:
        only: names of the checks to run; all if empty.

    Returns:
        The exit code: 0 if every check was ok or skipped, 2 if nothing can run, else 1.
    """
    names = [check.name for group in groups for check in group]
    if unknown := sorted(set(only) - set(names)):
        print(f"--only: {unknown[0]!r} is none of {', '.join(names)}")
        return 2
    chosen = [[check for check in group if not only or check.name in only] for group in groups]
    (machine,) = run_checks([[MACHINE]], setting)
    if machine.outcome == SKIPPED:
        print(f"{machine.reason}; --device cpu runs what a CPU can, through Triton's interpreter")
        return 2
    outcomes = [machine]
    if machine.outcome == OK:
        left_s = setting.budget_s - machine.seconds
        outcomes += run_checks(filter(None, chosen), replace(setting, budget_s=left_s))
    document = describe_run(tier, machine.figures, outcomes)
    print(f"tier {tier}: {_name(document)}\n\n{make_table(outcomes)}")
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if has_passed(outcomes) else 1


def _name(document: dict[str, Any]) -> str:
    versions = document.get("versions", {}).items()
    parts = [document.get("gpu", "no GPU"), *(f"{name} {value}" for name, value in versions)]
    return ", ".join([*parts, f"commit {(document['git_commit'] or 'unknown')[:12]}"])
