"""An environment for each client, built once and kept outside the checkout.

Clients pin what they need against one another, and against vLLM.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

from tests.minors.overlay import find_cache
from tests.programs import require

REQUIREMENTS = Path(__file__).parent / "requirements"
# The folder with the packages that npm installs.
NODE = REQUIREMENTS / "ai-sdk"


def find_python(client: str) -> Path:
    """Return the Python that has a client, of those with a file in `requirements/`."""
    requirements = REQUIREMENTS / f"{client}.txt"
    recipe = requirements.read_bytes()

    def build(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run(*pip, "--no-cache-dir", "install", "--no-deps", f"--requirement={requirements}")

    return find_environment(client, recipe, build) / "bin" / "python"


def find_node_modules() -> Path:
    """Return the folder of packages for JavaScript."""
    npm = require("npm", "npm")
    recipe = (NODE / "package-lock.json").read_bytes()

    def build(folder: Path) -> None:
        shutil.copytree(NODE, folder, dirs_exist_ok=True)
        run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", f"--prefix={folder}")

    return find_environment(NODE.name, recipe, build) / "node_modules"


def find_environment(name: str, recipe: bytes, build) -> Path:
    """Return a finished environment; one process builds it while others wait.

    Args:
        recipe: what it is made from; another one has another folder.
        build: fills an empty folder. What an interrupted one has left is thrown away.
    """
    digest = hashlib.sha256(recipe).hexdigest()[:12]
    cache = find_cache()
    folder = cache / f"client-{name}-{sys.implementation.cache_tag}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.exists():
            partial = cache / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(folder)
    return folder


def run(*command: object) -> None:
    # Without the checkout: the environment is to have the client's packages and no others.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*map(str, command)], env=environment, stdout=sys.stderr, check=True)
