"""Every command and every example in README.md, run as a stranger would."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.settings import read_settings
from server.cli import make_parser, prepare_args
from tests.programs import HANG_S
from tests.server.conftest import BIN, MODEL

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
NAME = "SmolLM2-135M-Instruct"


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


SERVE, CURL, TEST, OWN_MODEL, TRAIN, STOCK, BENCHMARKS = find_blocks("bash")


def redirect(text: str, server) -> str:
    """The same for the server of this test session, which has another port and name."""
    return text.replace("http://127.0.0.1:8000", server.url).replace(NAME, MODEL)


def run(command: str, **options) -> str:
    return subprocess.run(
        ["bash", "-euc", command],
        check=True,
        capture_output=True,
        text=True,
        **options,
        timeout=HANG_S,
    ).stdout


@pytest.mark.parametrize(
    ("block", "program"), [(SERVE, "adaptive-serve"), (TEST, "python -m pytest")]
)
def test_make_knows_both_commands(block, program):
    assert program in run(f"{block.strip()} --dry-run", cwd=ROOT)


@pytest.mark.engine
def test_the_curl_answers_in_the_form_that_is_shown(server):
    (shown,) = (json.loads(block) for block in find_blocks("json"))
    (choice,) = json.loads(run(redirect(CURL, server)))["choices"]
    assert shown.keys() <= choice.keys()
    assert shown["message"].keys() <= choice["message"].keys()
    # The heads of this server never abstain.
    assert shown["adaptive"].keys() - {"abstained"} == choice["adaptive"].keys()
    for adaptive in (shown["adaptive"], choice["adaptive"]):
        assert len(adaptive["temperatures"]) == adaptive["tokens"]


@pytest.mark.engine
def test_the_python_example_runs(server):
    (example,) = find_blocks("python")
    output = subprocess.run(
        [sys.executable, "-c", redirect(example, server)],
        check=True,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    ).stdout
    assert "{" in output.splitlines()[-1]


def test_the_python_example_passes_a_type_checker(tmp_path):
    (example,) = find_blocks("python")
    (tmp_path / "example.py").write_text(example)
    # With this project's settings, and so with what `make lint` has read of the client.
    command = [sys.executable, "-m", "mypy", str(tmp_path / "example.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout


def test_a_head_for_ones_own_model(model, tmp_path):
    _, init, show, serve = OWN_MODEL.replace("path/to/model", str(model)).strip().splitlines()
    assert NAME.lower() in run(f"PATH={BIN}:$PATH; {init}; {show}", cwd=tmp_path).lower()
    arguments = serve.replace("heads/mine", str(tmp_path / "heads" / "mine"))
    args = prepare_args(*make_parser().parse_known_args(shlex.split(arguments)[1:]))
    assert list(read_settings(args.additional_config).heads) == ["mine"]


@pytest.mark.parametrize("document", ["README.md", "docs/training.md", "docs/results.md"])
def test_every_experiment_that_a_document_runs_is_there(document):
    """`tests/lpo/test_quick.py` runs each of them."""
    text = (ROOT / document).read_text()
    commands = re.findall(r"^adaptive-head run (\S+)( --quick)?$", text, re.MULTILINE)
    assert commands
    assert TRAIN.strip() == "adaptive-head run experiments/voting.yaml --quick"
    assert all((ROOT / path).is_file() for path, _ in commands)


def test_the_options_for_vllms_own_command_line():
    words = shlex.split(STOCK.replace("\\\n", " "))
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert words[:3] == ["VLLM_PLUGINS=adaptive", "vllm", "serve"]
    assert options["--worker-cls"] == WORKER_CLS
    assert options["--scheduler-cls"] == SCHEDULER_CLS
    assert read_settings(json.loads(options["--additional-config"])).heads


@pytest.mark.engine
def test_the_benchmarks_run(server):
    overhead, carrier = BENCHMARKS.strip().splitlines()
    small = f"--url {server.url} --num-pairs 2 --concurrency 2 --max-tokens 4"
    result = json.loads(run(f"{overhead} {small}", cwd=ROOT))
    assert result["adaptive_to_fixed"] > 0
    small = "--num-pairs 2 --num-steps 2"
    result = json.loads(run(f"{carrier} {small}", cwd=ROOT))
    assert result["microseconds_a_token"] > 0
