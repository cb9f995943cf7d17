"""CUDA graphs, with a fake in the place of CUDA's: what is captured, replayed and padded."""

import copy
import math
from contextlib import suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
from tests.selection import CPU, HEADS, WIDTH

HEAD = HEADS["first"]


class FakeDevice:
    """PyTorch's allocator as graphs see it, after `CUDACachingAllocator.cpp` and `CUDAGraph.cpp`.

    Attributes:
        log: captures and replays.
        pools: how many graphs keep each pool alive. A pool stays known when they are gone, and
            the next capture into it fails an assertion.
        recording: pools that allocations go to. Only the end of a capture that CUDA accepts removes
            one: `cudaStreamEndCapture` is checked first.
        capturing: the graph that is being captured.
        workspace: of cuBLAS, of the one stream that captures here. Destroying a graph frees it.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pools: dict[str, int] = {}
        self.recording: set[str] = set()
        self.capturing: DeviceGraph | None = None
        self.workspace = object()
        self.num_handles = 0

    def make_pool(self) -> str:
        self.num_handles += 1
        return f"pool {self.num_handles}"

    def stop_recording(self, _device: int, pool: str) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)


class FakeGraph:
    """Records the head's products, and makes them again with what its input then holds."""

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.pool = pool
        self.hook = torch.nn.modules.module.register_module_forward_hook(self.record)

    def record(self, module, inputs, output):
        if isinstance(module, type(HEAD)):
            self.module, self.inputs, self.output = module, inputs, output

    def capture_end(self):
        self.hook.remove()

    def replay(self):
        self.output.copy_(self.module(*self.inputs))


class DeviceGraph(FakeGraph):
    """A graph on a `FakeDevice`, with what CUDA and PyTorch make of failures and ends."""

    device: FakeDevice

    def __init__(self) -> None:
        # Its own: it may be collected when the test's device is gone.
        self.device = type(self).device
        self.is_broken = self.is_whole = False

    def capture_begin(self, pool, capture_error_mode):
        if self.device.pools.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        if pool in self.device.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.device.pools[pool] = self.device.pools.get(pool, 0) + 1
        self.device.recording.add(pool)
        self.device.capturing = self
        self.workspace = self.device.workspace
        super().capture_begin(pool, capture_error_mode)

    def capture_end(self):
        super().capture_end()
        self.device.capturing = None
        if self.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.device.recording.remove(self.pool)
        self.is_whole = True
        if hasattr(self, "output"):
            self.device.log.append(f"captured {len(self.output)}")

    def replay(self):
        assert self.workspace is self.device.workspace, "an illegal memory access"
        self.device.log.append(f"replayed {len(self.output)}")
        super().replay()

    def __del__(self):
        if self.is_whole:
            self.device.pools[self.pool] -= 1
            self.device.workspace = object()


class FakeStream:
    def __init__(self, name="", log=None):
        self.name, self.log = name, [] if log is None else log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *_):
        self.log.append(f"off {self.name}")


@pytest.fixture
def device(monkeypatch):
    found = FakeDevice()
    monkeypatch.setattr(DeviceGraph, "device", found, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", DeviceGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", found.make_pool)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: FakeStream())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.stop_recording, raising=False)
    return found


@pytest.fixture
def graphs(device):
    return device.log


def make_runner(max_rows: int, has_graphs: bool = True) -> tuple[HeadRunner, HiddenRows]:
    rows = HiddenRows(WIDTH, max_rows, torch.float32, CPU, has_graphs)
    return HeadRunner(HEAD, rows, SideStream(torch.device("cuda"))), rows


def test_a_graph_for_every_power_of_two_up_to_the_largest_step(graphs):
    runner, _ = make_runner(24)
    assert graphs == [f"captured {size}" for size in (32, 16, 8, 4, 2, 1)]
    assert {graph.pool for graph, _ in runner._graphs.values()} == {"pool 1"}
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


# --- heads that come, fail and go ----------------------------------------------------------------


class Loads:
    """Heads that share a stream, as those of an engine do."""

    def __init__(self) -> None:
        self.rows = HiddenRows(WIDTH, 4, torch.float32, CPU, has_graphs=True)
        self.stream = SideStream(torch.device("cuda"))

    def load(self, head: AdaptiveHead = HEAD) -> HeadRunner:
        return HeadRunner(head, self.rows, self.stream)

    def assert_runs(self, runner: HeadRunner, head: AdaptiveHead = HEAD) -> None:
        tokens = torch.randn(3, WIDTH)
        scores = runner.run(self.rows.gather(tokens, torch.arange(3)))
        assert torch.allclose(scores[:3], head(tokens), atol=1e-5)


class FailingHead(AdaptiveHead):
    """Fails the second time that it runs: the first is a warm-up, the second is captured."""

    num_runs = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        type(self).num_runs += 1
        if self.num_runs > 1:
            self.fail()
        return super().forward(hidden)

    def fail(self) -> None:
        raise MemoryError("no memory for the head")


class BreakingHead(FailingHead):
    """Does what CUDA forbids in a capture, which cannot be ended without another error."""

    def fail(self) -> None:
        DeviceGraph.device.capturing.is_broken = True
        raise MemoryError("no memory for the head")


class SilentlyBreakingHead(BreakingHead):
    """Does so without an error of its own: only the end of the capture says it."""

    def fail(self) -> None:
        with suppress(MemoryError):
            super().fail()


@pytest.mark.usefixtures("device")
def test_a_head_can_be_loaded_when_the_last_one_is_gone():
    loads = Loads()
    runner = loads.load()
    del runner
    loads.assert_runs(loads.load())


def test_heads_keep_their_graphs_when_another_is_removed(device):
    loads = Loads()
    kept, removed = loads.load(), loads.load(HEADS["second"])
    del removed
    loads.assert_runs(kept)
    assert {graph.pool for graph, _ in kept._graphs.values()} == {"pool 1"}


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (FailingHead, "no memory for the head"),
        (BreakingHead, "no memory for the head"),
        (SilentlyBreakingHead, "a previous error during capture"),
    ],
)
def test_a_load_that_fails_says_why_and_leaves_room_for_others(
    device, failing, message, monkeypatch
):
    monkeypatch.setattr(failing, "num_runs", 0)
    loads = Loads()
    with pytest.raises((MemoryError, RuntimeError), match=message):
        loads.load(failing(HEAD.config))
    assert not device.recording, "the allocator still records"
    first = loads.load()
    monkeypatch.setattr(failing, "num_runs", 0)
    with pytest.raises((MemoryError, RuntimeError), match=message):
        loads.load(failing(HEAD.config))
    loads.assert_runs(first)
    loads.assert_runs(loads.load(HEADS["second"]), HEADS["second"])
    assert not device.recording


# --- steps without a graph -----------------------------------------------------------------------


def note_rows(monkeypatch) -> list[int]:
    num_rows = []
    forward = AdaptiveHead.forward

    def noting(self, hidden):
        num_rows.append(len(hidden))
        return forward(self, hidden)

    monkeypatch.setattr(AdaptiveHead, "forward", noting)
    return num_rows


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("max_rows", "has_graphs"), [(300, False), (700, True)])
def test_a_head_runs_its_largest_step_before_memory_is_measured(monkeypatch, max_rows, has_graphs):
    """In eager mode, and where steps are larger than any graph."""
    num_rows = note_rows(monkeypatch)
    runner, _ = make_runner(max_rows, has_graphs)
    assert num_rows[0] == max_rows
    assert runner.reserve_bytes > 0


def test_a_head_whose_graphs_hold_every_step_reserves_nothing(device, monkeypatch):
    num_rows = note_rows(monkeypatch)
    runner, _ = make_runner(24)
    assert max(num_rows) == 32 and runner.reserve_bytes == 0


class Allocations(TorchDispatchMode):
    """Bytes of what is made inside, as if nothing were freed before the end."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in inputs:
                self.num_bytes += storage.nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_step_without_a_graph_allocates_is_reserved(dtype):
    rows = HiddenRows(WIDTH, 100, dtype, CPU, has_graphs=False)
    runner = HeadRunner(HEAD, rows, SideStream(CPU))
    runner._network = convert(copy.deepcopy(HEAD), dtype)
    tokens = torch.randn(120, WIDTH).to(dtype)
    with Allocations() as allocations:
        runner.run(rows.gather(tokens, torch.arange(100)))
    assert 0.3 * runner.reserve_bytes < allocations.num_bytes <= runner.reserve_bytes
