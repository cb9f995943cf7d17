"""The tests that docs/reliability.md names exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_that_shows_a_promise_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT)
    assert named
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {getattr(node, "name", "") for node in tree.body}, f"{path}::{name}"


def test_every_folder_and_module_of_a_command_exists():
    for block in re.findall(r"^```bash\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL):
        (named,) = re.findall(r"\btests[./]\w+", block)
        assert (ROOT / named.replace(".", "/")).is_dir(), named
