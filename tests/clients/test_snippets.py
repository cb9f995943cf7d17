"""Every example of docs/clients.md, run with its client against the mock server."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.cli import EMBEDDED_NAME, make_parser, prepare_args
from tests.clients.conftest import FAST, TOOLS
from tests.clients.environments import REQUIREMENTS, find_node_modules, find_python
from tests.programs import HANG_S, require
from tests.server.conftest import Server, running

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = (ROOT / "docs" / "clients.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL))
PYTHON = {
    "openai": "openai",
    "LangChain": "langchain",
    "LiteLLM": "litellm",
    "LlamaIndex": "llama-index",
    "Instructor": "instructor",
    "Pydantic AI": "pydantic-ai",
    "Haystack": "haystack",
}
# What every example prints, as this is what the server chooses.
TEMPERATURE = "0.35"
POLICY = f'{{"policy": "constant", "constant": {{"temperature": {TEMPERATURE}}}}}'
# LiteLLM would download a list of prices, Haystack send statistics.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False"}


@pytest.fixture(scope="module")
def constant(tmp_path_factory) -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.clients.json_server", "mock-server", *FAST, *TOOLS]
    command.append(f"--adaptive-policy={POLICY}")
    with running(command, tmp_path_factory.mktemp("constant") / "log.txt") as server:
        server.wait_until_ready()
        yield server


def find_snippet(section: str, language: str, server: Server | None = None) -> str:
    (snippet,) = re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.M | re.S)
    return snippet.replace("http://127.0.0.1:8000", server.url) if server else snippet


def run(command: list[object], folder: Path) -> list[str]:
    """The lines that a program prints, which has none of this environment's packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=environment | OFFLINE,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_client_has_a_section_a_line_in_the_table_and_an_environment():
    clients = [*PYTHON, "AI SDK"]
    assert [name for name in SECTIONS if name in clients] == clients
    assert re.findall(r"^\| \[(.+?)\]\(#", DOCUMENT, re.M) == clients
    assert {path.stem for path in REQUIREMENTS.glob("*.txt")} == {*PYTHON.values()}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # builds an environment, once
@pytest.mark.parametrize("client", PYTHON)
@pytest.mark.parametrize("is_alias", [False, True])
def test_an_example_in_python_shows_the_temperatures(constant, tmp_path, client, is_alias):
    snippet = find_snippet(client, "python", constant)
    num_prints = snippet.count("print(")
    if is_alias:
        snippet = use_alias(snippet, '"temperature": "adaptive"')
    script = tmp_path / "snippet.py"
    script.write_text(snippet)
    printed = run([find_python(PYTHON[client]), "-I", "-X", "utf8", script], tmp_path)
    assert {*printed} <= {TEMPERATURE, "constant"}
    assert len(printed) == num_prints
    assert TEMPERATURE in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_alias", [False, True])
def test_the_example_in_javascript_shows_the_temperatures(constant, tmp_path, is_alias):
    snippet = find_snippet("AI SDK", "js", constant)
    if is_alias:
        snippet = use_alias(snippet, ', temperature: "adaptive"')
    (tmp_path / "node_modules").symlink_to(find_node_modules())
    script = tmp_path / "snippet.mjs"
    script.write_text(snippet)
    printed = run([require("node", "nodejs"), script], tmp_path)
    assert printed == [TEMPERATURE] * snippet.count("console.log(")


def use_alias(snippet: str, field: str) -> str:
    """Ask by the model's name instead of by the temperature."""
    assert field in snippet and EMBEDDED_NAME in snippet
    return snippet.replace(field, "").replace(EMBEDDED_NAME, f"{EMBEDDED_NAME}:adaptive")


def test_the_flags_for_tools_are_what_the_server_takes():
    command = find_snippet("Tools", "bash").strip()
    done = subprocess.run(
        ["bash", "-euc", f"{command} --dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    (flags,) = re.findall(r'ARGS="(.+)"', command)
    assert f"{flags}\n" in done.stdout
    args = prepare_args(*make_parser().parse_known_args(shlex.split(flags)))
    assert args.enable_auto_tool_choice
    assert args.tool_call_parser == "hermes"
