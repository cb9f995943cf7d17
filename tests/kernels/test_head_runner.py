"""CUDA graphs, with a fake in the place of CUDA's: what is captured, replayed and padded."""

import copy
import math
from typing import ClassVar

import pytest
import torch

from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.vllm import head_runner
from adaptive_head.vllm.head_runner import (
    MAX_GRAPH_ROWS,
    HeadRunner,
    HiddenRows,
    SideStream,
    convert,
    graph_sizes,
    round_up,
)
from tests.test_selector import CPU, HEADS, WIDTH

HEAD = HEADS["first"]


class FakeGraph:
    """Records the head's products, and makes them again with what its input then holds."""

    log: ClassVar[list[str]] = []

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.shared_pool = pool
        self.hook = torch.nn.modules.module.register_module_forward_hook(self.record)

    def record(self, module, inputs, output):
        if isinstance(module, type(HEAD)):
            self.module, self.inputs, self.output = module, inputs, output

    def capture_end(self):
        self.hook.remove()
        self.log.append(f"captured {len(self.output)}")

    def replay(self):
        self.log.append(f"replayed {len(self.output)}")
        self.output.copy_(self.module(*self.inputs))


@pytest.fixture
def graphs(monkeypatch):
    FakeGraph.log.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    return FakeGraph.log


def make_runner(max_rows: int, has_graphs: bool = True) -> tuple[HeadRunner, HiddenRows]:
    rows = HiddenRows(WIDTH, max_rows, torch.float32, CPU, has_graphs)
    stream = SideStream(CPU)
    stream.pool = "pool"
    return HeadRunner(HEAD, rows, stream), rows


def test_a_graph_for_every_power_of_two_up_to_the_largest_step(graphs):
    runner, _ = make_runner(24)
    assert graphs == [f"captured {size}" for size in (32, 16, 8, 4, 2, 1)]
    assert [graph.shared_pool for graph, _ in runner._graphs.values()] == ["pool"] * 6
    make_runner(24, has_graphs=False)
    assert len(graphs) == 6


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8])
def test_a_step_replays_the_next_larger_graph_on_its_own_rows(graphs, num_rows):
    runner, rows = make_runner(8)
    tokens = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(num_rows))
    indices = torch.arange(num_rows) * 2
    for shift in (0, 1):  # The second step finds what the first has left in the buffer.
        scores = runner.run(rows.gather(tokens, indices + shift))
        assert graphs[-1] == f"replayed {round_up(num_rows)}"
        expected = HEAD(tokens[indices + shift])
        assert torch.allclose(scores[:num_rows], expected, atol=1e-5)


def test_a_step_beyond_the_graphs_runs_without_one(graphs):
    runner, rows = make_runner(2)
    tokens = torch.randn(9, WIDTH)
    scores = runner.run(rows.gather(tokens, torch.arange(5)))
    assert torch.allclose(scores, HEAD(tokens[:5]), atol=1e-5)
    assert not any(line.startswith("replayed") for line in graphs)


def test_hidden_states_of_another_type_run_without_a_graph(graphs):
    runner, rows = make_runner(4)
    tokens = torch.randn(4, WIDTH).bfloat16()
    scores = runner.run(rows.gather(tokens, torch.arange(4)))
    assert scores.dtype == torch.float32 and scores.isfinite().all()
    assert not any(line.startswith("replayed") for line in graphs)


def test_close_temperatures_do_not_become_equal_in_16_bits():
    head = AdaptiveHead(HeadConfig(WIDTH, (0.0, 0.5, 1.0), (16,)), seed=3)
    with torch.no_grad():
        head.layers[-1].weight[1:] = head.layers[-1].weight[:1]
        head.layers[-1].bias[:] = torch.tensor([5.01, 5.02, 5.025])
    hidden = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    converted = convert(copy.deepcopy(head), torch.bfloat16)
    assert converted.layers[0].weight.dtype == torch.bfloat16
    assert (converted(hidden).argmax(-1) == 2).all()
    assert (head.bfloat16()(hidden).argmax(-1) != 2).any(), "what the last layer would do"


def test_sizes_of_graphs():
    assert graph_sizes(0) == []
    assert graph_sizes(1) == [1]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert [round_up(count) for count in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    assert math.log2(MAX_GRAPH_ROWS).is_integer(), "else the largest step finds no graph"


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *_):
        self.log.append(f"off {self.name}")


def test_the_side_stream_begins_after_the_main_one_which_waits_for_it_once(monkeypatch):
    log = []
    main = FakeStream("main", log)
    monkeypatch.setattr(head_runner.torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(head_runner.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(
        head_runner.torch.cuda, "Stream", lambda device, priority: FakeStream("side", log)
    )
    monkeypatch.setattr(head_runner.torch.cuda, "graph_pool_handle", lambda: "pool")
    stream = SideStream(torch.device("cuda"))
    stream.join()
    assert log == []
    with stream.fork():
        log.append("work")
    stream.join()
    stream.join()
    assert log == ["side waits for main", "on side", "work", "off side", "main waits for side"]
