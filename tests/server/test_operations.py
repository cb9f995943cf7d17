"""What docs/operations.md says of flags and commands."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from adaptive_head.vllm.settings import ADMIN_KEY_VARIABLE, AdaptiveSettings
from server.cli import make_parser, parse_vllm
from server.head_routes import HEADS_PATH
from tests.programs import HANG_S
from tests.server.conftest import ADMIN_KEY

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if "adaptive-serve" in line]


def test_every_flag_is_in_the_table_and_no_other():
    known = {option for action in make_parser()._actions for option in action.option_strings}
    table = DOCUMENT[DOCUMENT.index("## Flags") : DOCUMENT.index("Of vLLM's options")]
    assert set(re.findall(r"^\| `(--[a-z-]+)", table, re.MULTILINE)) == known


def test_every_field_of_the_settings_is_named():
    start = DOCUMENT.index("Under `vllm serve` the flags are fields")
    named = set(re.findall(r"`(\w+)`", DOCUMENT[start : DOCUMENT.index("\n\n", start)]))
    assert named - {"adaptive"} == AdaptiveSettings.model_fields.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_vllm_and_we_know_all_options_of_a_command(command, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    words = shlex.split(command.replace("$(", "").replace(")", ""))
    arguments = words[words.index("adaptive-serve") + 1 :]
    _, rest = make_parser().parse_known_args(arguments)
    parse_vllm(rest)


@pytest.mark.engine
def test_the_command_that_loads_a_head_loads_one(server):
    (command,) = (block for block in BLOCKS if block.startswith("curl") and HEADS_PATH in block)
    command = command.replace("http://127.0.0.1:8000", server.url).replace("mine-v2", "tok")
    environment = os.environ | {ADMIN_KEY_VARIABLE: ADMIN_KEY}
    done = subprocess.run(
        ["bash", "-euc", command],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANG_S,
    )
    headers = {"X-Admin-Key": ADMIN_KEY}
    assert server.http.delete(f"{HEADS_PATH}/mine", headers=headers).is_success, done.stdout
