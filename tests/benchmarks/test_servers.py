"""The servers that a benchmark compares take the options that they are started with."""

import sys

import pytest
from transformers import AutoConfig, AutoTokenizer
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adaptive_head import load_head
from adaptive_head.vllm.moved import make_arg_parser
from benchmarks.servers import MOCK, OURS, STOCK, make_commands, start
from server.cli import make_parser, prepare_args


def test_the_mock_servers_differ_by_the_plugin_only(tmp_path):
    ours, stock = make_commands("mock", tmp_path)
    assert stock == [*ours, "--stock"] and ours[: len(MOCK)] == MOCK


def test_the_tiny_servers_have_the_same_engine(tmp_path):
    ours, stock = make_commands("tiny", tmp_path)
    found = vars(prepare_args(*make_parser().parse_known_args(ours[len(OURS) :])))
    wanted = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(stock[len(STOCK) :]))
    assert {name for name, value in wanted.items() if found[name] != value} == {
        "additional_config",
        "host",
        "max_num_queued_reqs",
        "model",
        "model_tag",
        "scheduler_cls",
        "shutdown_timeout",
        "worker_cls",
    }


def test_the_tiny_model_can_be_served_and_its_heads_fit(tmp_path):
    make_commands("tiny", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) <= config.vocab_size and config.hidden_size == 64
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not list((tmp_path / "model").glob("*.safetensors"))
    for level in ("sequence", "token"):
        head = load_head(tmp_path / level)
        assert (head.metadata.level, head.metadata.hidden_size) == (level, config.hidden_size)


def test_a_server_that_ends_before_it_is_ready_ends_the_benchmark():
    program = "import sys; sys.exit(3)"
    with (
        start([sys.executable, "-c", program]) as server,
        pytest.raises(SystemExit, match="ended with 3"),
    ):
        server.wait_until_ready()


def test_a_servers_processor_time_is_that_of_its_process():
    program = "import time\nwhile time.process_time() < 1: pass\ntime.sleep(60)"
    with start([sys.executable, "-c", program]) as server:
        while server.cpu_seconds() < 1:
            assert server.process.poll() is None
        assert server.cpu_seconds() < 1.5
    assert server.process.poll() is not None
