"""Tier 1: this package's layer on a GPU. Needs torch and Triton, and no vLLM.

python -m tests.gpu.tier1 [--json FILE]
"""

import sys

from tests.gpu.checks import Check, Setting
from tests.gpu.command import make_parser, run_tier

GROUPS = (
    (
        Check("kernels, float32", "tests.gpu.kernels:compare_selectors", 120, {"dtype": "float32"}),
        Check("logits kernels", "tests.gpu.kernels:compare_logits", 60),
    ),
    (
        Check(
            "kernels, bfloat16", "tests.gpu.kernels:compare_selectors", 120, {"dtype": "bfloat16"}
        ),
        Check("graph replay", "tests.gpu.graphs:compare_replay", 60, needs_gpu=True),
        Check("loading between steps", "tests.gpu.loading:load_between_steps", 90),
    ),
    (
        Check("loading after the last head", "tests.gpu.loading:load_after_last", 60),
        Check(
            "loading after a failure", "tests.gpu.loading:load_after_failure", 60, needs_gpu=True
        ),
        Check("no synchronisation", "tests.gpu.loading:step_unsynchronised", 60, needs_gpu=True),
    ),
    (Check("next to an LM head", "tests.gpu.timing:measure", 100, needs_gpu=True),),
)


def main() -> int:
    """Run the tier as the command line says; the exit code."""
    arguments = make_parser(__doc__).parse_args()
    environment = {"TRITON_INTERPRET": "1"} if arguments.device == "cpu" else {}
    setting = Setting(arguments.device, ("vllm",), environment, arguments.budget)
    return run_tier(1, GROUPS, setting, arguments.json, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
