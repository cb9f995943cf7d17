"""Tier 2: this package in vLLM on a GPU. Needs an importable vLLM, and downloads nothing.

    python -m tests.gpu.tier2 [MODEL] [--json FILE]

MODEL is what the benchmark takes for its shape: a config.json, a folder with one, or one of the
names of `benchmarks.models`. Weights are drawn.
"""

import os
import sys

from tests.gpu.checks import ROOT, Check, Setting
from tests.gpu.command import make_parser, run_tier

INTERPRETED = ROOT / "tests" / "engine" / "interpreted_triton"


def make_groups(model: str | None) -> list[list[Check]]:
    """The checks. Those that measure time or memory run alone."""
    benchmark = Check(
        "benchmark", "tests.gpu.benchmark:run_benchmark", 200, {"model": model}, takes_limit=True
    )
    return [
        [
            Check("preemption, asynchronous", "tests.gpu.engine_checks:check_preemption", 110),
            Check("speculation, n-grams", "tests.gpu.engine_checks:check_speculation", 110),
        ],
        [
            Check("ordinary as stock vLLM", "tests.gpu.engine_checks:check_ordinary", 110),
            Check("a load while serving", "tests.gpu.engine_checks:check_hot_load", 110),
        ],
        [Check("sleep and wake", "tests.gpu.engine_checks:check_sleep", 90, needs_gpu=True)],
        [benchmark],
    ]


def make_environment(device: str) -> dict[str, str]:
    """What vLLM and Triton read in the checks' processes."""
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        paths = [str(INTERPRETED), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return environment | {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        # Everything of an engine in one process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def main() -> int:
    """Run the tier as the command line says; the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="shape of the benchmark's model")
    arguments = parser.parse_args()
    environment = make_environment(arguments.device)
    # Triton's interpreter takes its time.
    patience = 4.0 if arguments.device == "cpu" else 1.0
    setting = Setting(arguments.device, (), environment, arguments.budget, patience)
    return run_tier(2, make_groups(arguments.model), setting, arguments.json, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
