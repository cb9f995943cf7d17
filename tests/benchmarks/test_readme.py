"""Every command for a benchmark in the documents is one that the programs understand."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks.arguments import read_batches, read_options, read_sizes
from benchmarks.models import PRESETS
from tests.loadtests.document import FRONTEND

README = (Path(__file__).parent.parent.parent / "benchmarks" / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python")]


def parse(command):
    """The program's name, and its parameters; a usage error for a wrong option."""
    words = shlex.split(command)[1:]
    if words[0] == "-m":
        words.pop(0)
    name, *arguments = words
    name = name.removesuffix(".py").replace("/", ".")
    app = typer.Typer()
    app.command()(importlib.import_module(name).main)
    return name, typer.main.get_command(app).make_context(name, arguments).params


@pytest.mark.parametrize("command", [*COMMANDS, FRONTEND.strip()])
def test_a_command_parses(command):
    name, params = parse(command)
    if name == "benchmarks.engine":
        read_batches(params["batch"])
        read_sizes("--head-layers", params["head_layers"])
        read_options(params["option"] or [])
        assert params["config"] in (*PRESETS, "path/to/config.json")


def test_there_are_commands_for_every_program():
    assert {parse(command)[0] for command in COMMANDS} == {
        "benchmarks.engine",
        "benchmarks.overhead",
        "benchmarks.frontend",
        "benchmarks.carrier",
        "benchmarks.head",
    }


def test_a_wrong_option_is_found():
    with pytest.raises(Exception, match="No such option"):
        parse("python -m benchmarks.engine --batches 1")
