"""The process of one check: calls a function and writes what it found to a file."""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.gpu.checks import FAILED, OK, SKIPPED


class Skipped(Exception):
    """A check cannot run here; the message says why."""


def main(task: dict[str, Any]) -> int:
    """Run a check. The exit code is 0 unless it failed.

    Args:
        task: the function with its arguments, packages that must not be imported, and the file
            for the result.
    """
    for package in task["blocked"]:
        # An import of it now raises ImportError.
        sys.modules[package] = None  # type: ignore[assignment]
    outcome: dict[str, Any] = {"outcome": OK, "reason": "", "figures": {}}
    try:
        module, name = task["function"].split(":")
        outcome["figures"] = getattr(importlib.import_module(module), name)(**task["arguments"])
    except Skipped as reason:
        outcome |= {"outcome": SKIPPED, "reason": str(reason)}
    except BaseException as error:
        traceback.print_exc()
        message = str(error).strip().split("\n")[0]
        outcome |= {"outcome": FAILED, "reason": f"{type(error).__name__}: {message}"[:300]}
    result = Path(task["result"])
    part = result.with_suffix(".part")
    part.write_text(json.dumps(outcome))
    part.replace(result)
    return int(outcome["outcome"] == FAILED)


if __name__ == "__main__":
    # Through the module's own name: a check raises this `Skipped`, and not that of `__main__`.
    from tests.gpu import worker

    code = worker.main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads and pools of vLLM and CUDA can hold up an ordinary exit.
    os._exit(code)
