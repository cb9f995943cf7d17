"""Runs checks, each in a process of its own with a time limit, and reports them as table and JSON.

Imports neither torch nor vLLM: what a check does to its process stays there.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OK, FAILED, SKIPPED, NOT_RUN = "ok", "FAILED", "skipped", "not run"
# Less than this is not enough to start Python and import torch.
MIN_SECONDS = 10.0
NUM_LOG_LINES = 25


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: as the table shows it.
        function: "module:function". Its return value are the figures, a JSON object; whatever it
            raises is a failure, except for `tests.gpu.worker.Skipped`.
        limit_s: after so many seconds it is killed, with everything that it started.
        arguments: keyword arguments of the function, besides `device`.
        needs_gpu: it is skipped on a CPU.
        takes_limit: its function has an argument `limit_s`: when it has to end by itself, so that
            what it has found until then counts.
    """

    name: str
    function: str
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    needs_gpu: bool = False
    takes_limit: bool = False


@dataclass(frozen=True)
class Outcome:
    """What has become of a check. `log` is the end of its output where it failed."""

    name: str
    outcome: str
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What all checks of a run have in common.

    Attributes:
        device: "cuda" or "cpu".
        blocked: packages that a check must not import.
        environment: added to that of this process.
        budget_s: for all checks together.
        patience: multiplies the time limits of the checks.
    """

    device: str
    blocked: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    budget_s: float = 360.0
    patience: float = 1.0


def run_checks(groups: Iterable[Sequence[Check]], setting: Setting) -> Iterator[Outcome]:
    """Run groups of checks one after the other; the checks of a group run side by side.

    Yields:
        An outcome for each check, in order.
    """
    deadline = time.monotonic() + setting.budget_s
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            yield from pool.map(lambda check: run_check(check, setting, deadline), group)


def run_check(check: Check, setting: Setting, deadline: float) -> Outcome:
    """Run one check in a process of its own.

    Args:
        deadline: by `time.monotonic`, when the budget of all checks is spent.
    """
    if check.needs_gpu and setting.device == "cpu":
        return Outcome(check.name, SKIPPED, "needs a GPU")
    begin = time.monotonic()
    limit_s = min(check.limit_s * setting.patience, deadline - begin)
    if limit_s < MIN_SECONDS:
        return Outcome(check.name, NOT_RUN, f"the {setting.budget_s:g} s of the tier are spent")
    with tempfile.TemporaryDirectory() as temporary:
        result, log = Path(temporary) / "result.json", Path(temporary) / "log"
        code = _run_worker(check, setting, limit_s, result, log)
        seconds = round(time.monotonic() - begin, 1)
        lines = log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
        found = json.loads(result.read_text()) if result.is_file() else {}
    if code is None:
        found |= {"outcome": FAILED, "reason": f"took longer than {limit_s:.0f} s and was killed"}
    elif not found:
        found = {"outcome": FAILED, "reason": f"its process ended with code {code}"}
    is_failed = found["outcome"] == FAILED
    return Outcome(check.name, **found, seconds=seconds, log=tuple(lines) if is_failed else ())


def _run_worker(
    check: Check, setting: Setting, limit_s: float, result: Path, log: Path
) -> int | None:
    """The exit code of the check's process; None where it had to be killed."""
    arguments = {"device": setting.device} | check.arguments
    if check.takes_limit:
        arguments["limit_s"] = limit_s - MIN_SECONDS
    task = {
        "function": check.function,
        "arguments": arguments,
        "blocked": setting.blocked,
        "result": str(result),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.worker", json.dumps(task)],
            cwd=ROOT,
            env=os.environ | setting.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that what it starts can be killed with it.
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Its group is gone once all of its processes have ended.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def describe_run(tier: int, machine: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The JSON document of a run."""
    return {
        "tier": tier,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": find_commit(),
        "python": platform.python_version(),
        **machine,
        "checks": [asdict(outcome) for outcome in outcomes],
    }


def find_commit() -> str | None:
    """The commit of the checkout; None where it is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_table(outcomes: Sequence[Outcome]) -> str:
    """One row per check, and below it the log of each failure."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{'check':{width}}  outcome  seconds  figures"]
    for one in outcomes:
        notes = ", ".join(f"{name} {_show(value)}" for name, value in one.figures.items())
        text = "; ".join(filter(None, (one.reason, notes)))
        lines.append(f"{one.name:{width}}  {one.outcome:7}  {one.seconds:7.1f}  {text}".rstrip())
    for one in outcomes:
        if one.outcome == FAILED:
            lines += ["", f"--- {one.name}: {one.reason}", *one.log]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name}: {_show(one)}" for name, one in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_show, value)) + "]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def has_passed(outcomes: Sequence[Outcome]) -> bool:
    """Whether every check was ok, or skipped on purpose."""
    return all(outcome.outcome in (OK, SKIPPED) for outcome in outcomes)
