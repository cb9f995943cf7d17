"""Programs that tests run and Python's packages do not bring."""

import os
import shutil

import pytest

# A process of a test that takes longer hangs, in seconds.
HANG_S = 400


def require(program: str, package: str) -> str:
    """The path of a program. Without it the test is skipped, but for CI, where it fails.

    Args:
        package: Debian's package that has it.
    """
    path = shutil.which(program)
    if path is None:
        leave = pytest.fail if os.environ.get("CI") else pytest.skip
        leave(f"{program} is not installed (Debian's package {package})")
    return path
