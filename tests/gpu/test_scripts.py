"""The scripts for a GPU, tried without one: a slip that would show there shows here."""

import importlib
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch

from adaptive_head import AdaptiveHead, HeadConfig
from adaptive_head.options import Level, PolicyName, Selection
from adaptive_head.vllm import selector_v2
from tests.gpu import benchmark, checks, graphs, kernels, loading, steps, tier1, tier2, timing
from tests.gpu.checks import FAILED, NOT_RUN, OK, ROOT, SKIPPED, Check, Setting, run_checks
from tests.gpu.command import run_tier
from tests.gpu.engine import make_adaptive, make_request
from tests.gpu.expectations import Alignment
from tests.gpu.texts import SMALL, list_options, make_heads, make_options
from tests.kernels.test_head_runner import FakeGraph

ON_CPU = Setting("cpu", budget_s=60)


def sample(name, limit_s=30.0, **fields):
    return Check(name, f"tests.gpu.samples:{name}", limit_s, **fields)


def test_each_check_has_an_outcome_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "MIN_SECONDS", 1.0)
    pid_file = tmp_path / "pid"
    group = [
        sample("succeed", arguments={"value": 2.5}),
        sample("fail"),
        Check("limited", "tests.gpu.samples:show_limit", 21.0, takes_limit=True),
        sample("skip"),
        sample("die"),
        sample("import_vllm"),
        sample("hang", 1.5, arguments={"pid_file": str(pid_file)}),
        Check("on a GPU", "no.such:module", 30, needs_gpu=True),
        Check("no time", "no.such:module", 0.5),
        Check("no module", "no.such:module", 30),
    ]
    outcomes = list(run_checks([group], replace(ON_CPU, blocked=("vllm",))))
    assert {one.name: (one.outcome, one.reason) for one in outcomes} == {
        "succeed": (OK, ""),
        "fail": (FAILED, "AssertionError: two"),
        "limited": (OK, ""),
        "skip": (SKIPPED, "no such thing here"),
        "die": (FAILED, "its process ended with code 3"),
        "import_vllm": (
            FAILED,
            "ModuleNotFoundError: import of vllm halted; None in sys.modules",
        ),
        "hang": (FAILED, "took longer than 2 s and was killed"),
        "on a GPU": (SKIPPED, "needs a GPU"),
        "no time": (NOT_RUN, "the 60 s of the tier are spent"),
        "no module": (FAILED, "ModuleNotFoundError: No module named 'no'"),
    }
    assert outcomes[0].figures == {"device": "cpu", "value": 2.5}
    assert outcomes[2].figures == {"limit_s": 20.0}
    assert "before the failure" in outcomes[1].log and outcomes[4].log == ("last words",)
    assert not outcomes[0].log
    table = checks.make_table(outcomes)
    assert "succeed      ok" in table and "value 2.5" in table
    assert "--- die: its process ended with code 3\nlast words" in table
    # What a check has started ends with it.
    deadline = time.monotonic() + 10
    while is_running(int(pid_file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid_file.read_text()))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            # A zombie waits for its new parent only.
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("name", "code"), [("succeed", 0), ("skip", 0), ("fail", 1), ("die", 1)])
def test_the_exit_code_says_whether_a_check_failed(name, code, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tests.gpu.command.MACHINE", sample("succeed"))
    groups = [[sample(name)], [sample("succeed")]]
    assert run_tier(1, groups, ON_CPU, tmp_path / "x.json") == code
    document = json.loads((tmp_path / "x.json").read_text())
    # Those after a failure run all the same.
    assert [check["outcome"] for check in document["checks"]][::2] == [OK, OK]
    assert name in capsys.readouterr().out
    assert run_tier(1, groups, ON_CPU, only=["unknown"]) == 2


def test_a_check_that_does_not_fit_is_reported_and_not_passed(capsys, monkeypatch):
    monkeypatch.setattr("tests.gpu.command.MACHINE", sample("succeed"))
    assert run_tier(1, [[sample("succeed")]], replace(ON_CPU, budget_s=10.1)) == 1
    assert "not run" in capsys.readouterr().out


def test_tier_1_runs_on_a_cpu_and_without_vllm(tmp_path):
    arguments = ["--device", "cpu", "--only", "logits kernels", "--only", "graph replay"]
    process = subprocess.run(
        [sys.executable, "-m", "tests.gpu.tier1", *arguments, "--json", tmp_path / "x.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["versions"]["torch"] == torch.__version__
    outcomes = {check["name"]: check for check in document["checks"]}
    assert 0 < outcomes["logits kernels"]["figures"]["scale_error"] < 1e-6
    assert outcomes["graph replay"]["outcome"] == SKIPPED
    for name in ("logits kernels", "graph replay"):
        assert name in process.stdout


def test_every_check_of_tier_1_exists():
    for check in (check for group in tier1.GROUPS for check in group):
        module, name = check.function.split(":")
        assert hasattr(sys.modules[module], name), check.function
    limits = [max(check.limit_s for check in group) for group in tier1.GROUPS]
    assert sum(limits) <= 420


# What needs a GPU, on a CPU with fakes for CUDA: its code runs, and it can fail.


class CapturingGraph(FakeGraph):
    """Knows whether it is being captured. Shared, as the state of CUDA's stream is."""

    is_capturing = False

    def capture_begin(self, *args, **kwargs):
        CapturingGraph.is_capturing = True
        super().capture_begin(*args, **kwargs)

    def capture_end(self):
        CapturingGraph.is_capturing = False
        if hasattr(self, "output"):
            super().capture_end()
        else:
            self.hook.remove()


@pytest.fixture
def cuda(monkeypatch):
    """Graphs that record what a head does; nothing else of CUDA does anything."""
    for module in (steps, kernels, timing, loading):
        monkeypatch.setattr(module, "can_capture", lambda _: True)
    monkeypatch.setattr(loading, "_check_allocator", lambda _: None)
    monkeypatch.setattr(loading, "_check_refusal", lambda _: None)
    monkeypatch.setattr(loading, "_copying", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CapturingGraph)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: CapturingGraph.is_capturing
    )
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def test_selectors_are_compared(cuda, few_requests):
    figures = kernels.compare_selectors("cpu", "bfloat16")
    # Two tokens in each of four rounds, without those of steps of ordinary requests alone.
    assert figures["requests"] == 5 and 32 <= figures["rows"] <= 40


def test_every_kind_of_request_is_compared():
    options = list_options(make_heads(SMALL), SMALL)
    kinds = {(one.policy, one.level, one.select) for one in options if one is not None}
    selections = get_args(Selection)
    assert kinds >= set(product(["head"], get_args(Level), selections))
    assert {policy for policy, _, _ in kinds} == set(get_args(PolicyName))
    assert None in options


def test_graphs_are_compared_with_eager_heads(cuda):
    figures = graphs.compare_replay("cpu")
    assert figures["equal_bit_for_bit"] == figures["runs"] == 2 * len(graphs.NUM_ROWS) * 4


def test_a_graph_that_keeps_its_first_rows_is_found(cuda, monkeypatch):
    monkeypatch.setattr(FakeGraph, "replay", lambda self: None)
    with pytest.raises(AssertionError, match="rows: off by"):
        graphs.compare_replay("cpu")


@pytest.fixture
def few_requests(monkeypatch):
    """A few kinds of requests instead of all, and short ones."""
    options = [
        None,
        make_options("head", name="first"),
        make_options("head", name="second", level="sequence", select="sample"),
        make_options("entropy"),
        make_options("two_phase"),
    ]
    for module in (kernels, loading):
        monkeypatch.setattr(module, "list_options", lambda *_: options)
        monkeypatch.setattr(module, "pick_sizes", lambda _: replace(SMALL, num_tokens=6))


@pytest.mark.parametrize("check", [loading.load_between_steps, loading.load_after_last])
def test_heads_come_and_go(check, cuda):
    assert check("cpu")["rows"] > 20


def test_steps_are_watched(cuda, few_requests):
    figures = loading.step_unsynchronised("cpu")
    assert figures["rows"] == 5 * 2 * 8
    assert cuda == ["default", "default", "error", "default"] * 4


def test_a_capture_that_fails_is_followed_by_one_that_works(cuda, monkeypatch):
    # On a CPU nothing keeps a capture from waiting.
    monkeypatch.setattr(loading, "BROKEN_HEADS", (loading.BrokenHead,))
    assert loading.load_after_failure("cpu")["errors"] == ["this head is broken"]


def test_a_capture_that_should_fail_and_does_not_is_found(cuda, monkeypatch):
    monkeypatch.setattr(loading.BrokenHead, "forward", lambda self, hidden: hidden.float())
    with pytest.raises(AssertionError, match="this check cannot fail"):
        loading.load_after_failure("cpu")


def test_times_are_taken_in_pairs(cuda, monkeypatch):
    monkeypatch.setattr(timing, "BATCHES", (1, 3))
    monkeypatch.setattr(timing, "NUM_PAIRS", 3)
    monkeypatch.setattr(timing, "NUM_STEPS", 1)
    figures = timing.measure("cpu")
    assert set(figures) == {"1", "3"}
    assert all(one["fixed_us"] > 0 and one["ratio"] > 0 for one in figures.values())


class FakeEvent:
    """An event of a device that has done everything, half a second after the one before it."""

    def __init__(self, enable_timing=False):
        self.is_recorded = False

    def record(self):
        self.is_recorded = True

    def query(self):
        return self.is_recorded

    def synchronize(self):
        assert self.is_recorded

    def elapsed_time(self, other):
        assert self.is_recorded and other.is_recorded
        return 500.0


@pytest.fixture
def device(monkeypatch):
    """As a CUDA device, as far as the checks themselves use one."""
    fakes = {
        "Event": FakeEvent,
        "Stream": lambda _: "stream",
        "stream": lambda _: nullcontext(),
        "synchronize": lambda: None,
        "memory_reserved": lambda: 0,
        "_sleep": lambda cycles: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def test_the_clock_notices_a_host_that_is_late(device):
    clock, runs = timing.Clock(torch.device("cuda")), []
    clock.calibrate(lambda: runs.append(1))
    assert clock.measure(lambda: runs.append(1)) == 0.5
    assert len(runs) == 3 and clock.num_late == 1


def test_an_allocator_that_keeps_what_was_freed_is_found(device, monkeypatch):
    loading._check_allocator(torch.device("cpu"))
    reserved = iter((0, 1 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(reserved))
    with pytest.raises(AssertionError, match="1024 MiB"):
        loading._check_allocator(torch.device("cpu"))


def test_a_device_that_does_not_refuse_to_wait_is_found(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with pytest.raises(AssertionError, match="does not see"):
        loading._check_refusal(torch.device("cpu"))


def test_a_thread_copies_while_a_head_loads(device, monkeypatch):
    target, number = torch.zeros(1024), []
    monkeypatch.setattr(loading, "can_capture", lambda _: True)
    monkeypatch.setattr(loading, "_allocate_pinned", lambda _: target)
    with loading._copying(torch.device("cpu")):
        deadline = time.monotonic() + 10
        while not target.any() and time.monotonic() < deadline:
            number.append(1)
    assert target.eq(1).all()


def test_a_wrong_kernel_is_found(monkeypatch, few_requests):
    """One that takes a head's first temperature for every row."""
    right = selector_v2.choose_by_head

    def choose_wrongly(choices, batch, table, head_index, scores, temperatures):
        right(choices, batch, table, head_index, torch.zeros_like(scores), temperatures)

    monkeypatch.setattr(selector_v2, "choose_by_head", choose_wrongly)
    with pytest.raises(AssertionError):
        kernels.compare_selectors("cpu", "float32")


# Tier 2 needs engines; here are the parts that do not.


def test_every_check_of_tier_2_exists():
    for check in (check for group in tier2.make_groups(None) for check in group):
        module, name = check.function.split(":")
        assert hasattr(importlib.import_module(module), name), check.function


def test_the_figures_of_a_benchmark_are_ratios_by_batch_size():
    ratio = {"tpot_s": {"mean": 1.001, "interval_95": [0.999, 1.003]}}
    result = {
        "config": "llama-3-8b",
        "threads": None,
        "model_runner": "V2",
        "async_scheduling": True,
        "heads_memory_bytes": 7,
        "arms": {"ordinary": {"1": {"tpot_s": 0.005}}},
        "ratios": {name: {"1": ratio} for name in benchmark.RATIOS},
    }
    figures = benchmark.summarise(result, is_whole=True)
    assert figures["batch 1"]["adaptive / ordinary"] == [1.001, 0.999, 1.003]
    assert figures["batch 1"]["tpot_ms"] == {"ordinary": 5.0}
    for wrong in ({"model_runner": "V1"}, {"async_scheduling": False}, {"ratios": {}}):
        with pytest.raises(AssertionError):
            benchmark.summarise(result | wrong, is_whole=True)


class Networks:
    """A reference whose hidden states are the tokens that come next, one-hot."""

    def __init__(self):
        config = HeadConfig(4, (0.0, 0.5, 1.0, 1.5), ())
        head = AdaptiveHead(config)
        with torch.no_grad():
            head.layers[0].weight.copy_(torch.eye(4) * 9)
        self.networks = {"tok": head, "seq": head}

    def run(self, prompt, token_ids):
        text = (prompt + token_ids)[len(prompt) - 1 : -1]
        return torch.eye(4)[text], torch.eye(4)[text] * 5


def make_answer(token_ids, micros):
    return {"token_ids": token_ids, "micros": micros}


def test_alignment_accepts_right_temperatures_and_finds_a_shift():
    request = make_adaptive([1, 2], 40, seed=1, head="tok")
    token_ids = [(3 * place + place // 5) % 4 for place in range(40)]
    right = [500_000 * token for token in [2, *token_ids[:-1]]]
    alignment = Alignment(Networks())
    alignment.add(request, make_answer(token_ids, right))
    assert (alignment.num_clear, alignment.num_agreeing) == (40, 40)
    shifted = Alignment(Networks())
    shifted.add(request, make_answer(token_ids, right[1:] + right[:1]))
    with pytest.raises(AssertionError, match="of clear choices"):
        shifted.judge()


@pytest.mark.parametrize(
    ("fields", "micros", "message"),
    [
        ({"head": "tok"}, None, "without temperatures"),
        ({"head": "tok"}, [1], "1 for 2 tokens"),
        ({"head": "seq"}, [1, 2], "choice changed"),
        ({"policy": "schedule"}, [1_000_000, 1_000_000], "schedule: token 1"),
    ],
)
def test_alignment_finds_what_is_wrong(fields, micros, message):
    request = make_adaptive([1, 2], 2, seed=1, **fields)
    with pytest.raises(AssertionError, match=message):
        Alignment(Networks()).add(request, make_answer([1, 3], micros))


def test_an_ordinary_answer_has_no_temperatures():
    request = make_request([1, 2], 2, seed=1)
    Alignment(Networks()).add(request, make_answer([1, 3], None))
    with pytest.raises(AssertionError, match="ordinary"):
        Alignment(Networks()).add(request, make_answer([1, 3], [1, 1]))
