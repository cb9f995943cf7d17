"""The commands in docs/scaling-out.md."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from server.cli import make_parser, parse_vllm, refuse_options

PAGE = (Path(__file__).parent.parent.parent / "docs" / "scaling-out.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
SERVERS = [command[1:] for command in COMMANDS if command[0] == "adaptive-serve"]


def parse(arguments):
    ours, rest = make_parser().parse_known_args(arguments)
    return ours, parse_vllm(rest)


@pytest.mark.parametrize("arguments", SERVERS, ids=" ".join)
def test_vllm_and_we_know_all_options_and_refuse_none(arguments, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    ours, args = parse(arguments)
    assert ours.head == ["mine=/heads/mine"] and args.model_tag == "MODEL"
    refuse_options(args)


def test_the_page_has_a_command_for_every_parallelism_in_its_table(monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    options = re.findall(r"^\| [a-z ]+ \| `--([a-z-]+)`", PAGE, re.MULTILINE)
    assert len(options) == 6
    known = vars(parse(["MODEL"])[1])
    assert all(option.replace("-", "_") in known for option in options)


def test_machines_of_one_server_differ_in_what_says_which_one_it_is():
    """All else must be the same, which the page says too."""
    of_a_machine = {"--node-rank", "--headless", "--data-parallel-start-rank"}
    for first, second in pairwise(SERVERS):
        if "--headless" in second:
            assert {word for word in set(first) ^ set(second) if word[:2] == "--"} <= of_a_machine
    assert sum("--headless" in arguments for arguments in SERVERS) == 2
