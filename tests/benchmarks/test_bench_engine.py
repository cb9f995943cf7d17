"""The clock, and the controls that end a benchmark whose arms are not what they should be."""

import itertools
from types import SimpleNamespace

import pytest

from adaptive_head.decision import Decision
from adaptive_head.options import AdaptiveRequest, resolve_options
from benchmarks import bench_engine
from benchmarks.bench_engine import (
    ADAPTIVE,
    AGAIN,
    MIXED,
    ORDINARY,
    STOCK,
    BenchEngine,
    check_answers,
)


def head_options(level="token", name="a"):
    metadata = {name: SimpleNamespace(level=level, select="argmax", abstain=None)}
    return resolve_options(AdaptiveRequest(head=name), metadata, name)


class FakeEngine:
    """Yields its steps' outputs, each after a second of a clock that stands otherwise."""

    def __init__(self, steps):
        self._steps = list(steps)
        self.mask = None
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def add_request(self, *_):
        pass

    def has_unfinished_requests(self):
        return bool(self._steps)

    def step(self):
        self.now += 1.0
        return [
            SimpleNamespace(
                request_id=request_id,
                outputs=[SimpleNamespace(token_ids=[7] * num_new, sampling_mask=self.mask)],
            )
            for request_id, num_new in self._steps.pop(0).items()
        ]


class CountedEngine(BenchEngine):
    """Its heads have chosen what `counts` says, from one look to the next."""

    def __init__(self):
        self.counts = itertools.repeat({})

    def count_choices(self):
        return next(self.counts)


def make_bench(fake, monkeypatch, temperatures=False):
    bench = CountedEngine()
    if temperatures:
        fake.mask = SimpleNamespace(token_ids=[[0, *Decision(700_000)], [], [], []])
    scheduler = SimpleNamespace(has_requests=lambda: False)
    bench._engine = fake
    bench._core = SimpleNamespace(scheduler=scheduler, batch_queue=None)
    bench._vocab_size, bench._num_requests = 512, 0
    monkeypatch.setattr(bench_engine.time, "perf_counter", fake.perf_counter)
    return bench


def test_the_clock_stops_at_the_last_first_token_and_at_the_end(monkeypatch):
    # Asynchronous scheduling: the first step returns nothing. The second request is prefilled late.
    steps = [{}, {"0": 1}, {"0": 1, "1": 0}, {"0": 1, "1": 1}, {"1": 1}, {"1": 1}]
    run = make_bench(FakeEngine(steps), monkeypatch).run(ORDINARY, 2, prompt_len=4, num_tokens=3)
    assert run.ttft_s == 4.0
    assert run.tpot_s == 1.0
    assert run.tokens_per_s == 1.0


def test_a_run_that_fails_leaves_garbage_collection_on(monkeypatch):
    bench = make_bench(FakeEngine([{"0": 1}, {"unknown": 1}]), monkeypatch)
    monkeypatch.setattr(bench._engine, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.run(ORDINARY, 1, prompt_len=4, num_tokens=2)
    assert bench_engine.gc.isenabled()


def test_every_head_is_asked_in_each_arm_that_asks_heads():
    bench = BenchEngine.__new__(BenchEngine)
    bench._head_options = ["a", "b"]
    chosen = {
        arm: [bench._choose_options(arm, index) for index in range(6)]
        for arm in (STOCK, ORDINARY, AGAIN, ADAPTIVE, MIXED)
    }
    assert chosen[STOCK] == chosen[ORDINARY] == chosen[AGAIN] == [None] * 6
    assert chosen[ADAPTIVE] == ["a", "b"] * 3
    assert chosen[MIXED] == ["a", None, "b", None, "a", None]
    assert bench._choose_options("entropy", 3).policy == "entropy"


@pytest.mark.parametrize(
    ("options", "answers", "message"),
    [
        (None, [(4, [700_000] * 4)], "an ordinary token came with a temperature"),
        (
            head_options(),
            [(2, [0, 1]), (2, None)],
            "an adaptive token came without its temperature",
        ),
        (head_options(), [(4, [0, 1])], "an adaptive token came without its temperature"),
        (None, [(3, None)], "an answer has not 4 tokens"),
    ],
)
def test_answers_that_an_arm_should_not_have_end_the_benchmark(options, answers, message):
    with pytest.raises(RuntimeError, match=f"an arm: {message}"):
        check_answers("an arm", [("0", *answer) for answer in answers], {"0": options}, 4)


def test_right_answers_pass():
    wanted = {"0": None, "1": head_options()}
    answers = [("0", 3, None), ("1", 2, [0, 1]), ("0", 1, None), ("1", 2, [1, 1]), ("1", 0, None)]
    check_answers("an arm", answers, wanted, 4)


@pytest.mark.parametrize(("level", "num_wanted"), [("token", 8), ("sequence", 2)])
@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_the_heads_must_have_chosen(monkeypatch, level, num_wanted, difference):
    """More than the answer has room for may come of speculation, fewer of nothing good."""
    bench = make_bench(FakeEngine([{"0": 4, "1": 4}]), monkeypatch, temperatures=True)
    bench._head_options = [head_options(level)]
    bench.counts = iter([{0.0: 3, 1.0: 2}, {0.0: 3, 1.0: 2 + num_wanted + difference}])
    if difference < 0:
        with pytest.raises(RuntimeError, match=f"not {num_wanted}"):
            bench.run(ADAPTIVE, 2, prompt_len=4, num_tokens=4)
    else:
        assert bench.run(ADAPTIVE, 2, prompt_len=4, num_tokens=4)


def test_where_nobody_asks_a_head_none_may_choose(monkeypatch):
    bench = make_bench(FakeEngine([{"0": 4}]), monkeypatch)
    bench.counts = iter([{0.0: 0}, {0.0: 1}])
    with pytest.raises(RuntimeError, match="chosen 1 times, not 0"):
        bench.run(ORDINARY, 1, prompt_len=4, num_tokens=4)
