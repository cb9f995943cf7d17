"""The engines of rollouts and evaluation answer every request once, and alike.

Each backend runs once, in a process of its own: this file as a script.
"""

import json
import math
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from vllm.logprobs import Logprob
from vllm.platforms import current_platform

from adaptive_head.lpo.engine import (
    Engine,
    Filters,
    Generation,
    GenerationRequest,
    engine_arguments,
    make_sampling_params,
    open_engine,
    read_generation,
)
from adaptive_head.lpo.engine_dp import DataParallelEngine
from adaptive_head.lpo.engine_ray import (
    REQUESTS_AHEAD,
    Inbox,
    RayEngine,
    connect,
    find_resources,
    import_ray,
)
from adaptive_head.lpo.experiment import EngineConfig
from adaptive_head.options import AdaptiveRequest
from tests.background import WAIT_S
from tests.engine.engines import TEMPERATURES, get_engines
from tests.processors import PROCESSORS, WITHOUT_BFLOAT16, run_on

REPLICATED = ("ray", "data_parallel")
BACKENDS = ("local", *(pytest.param(name, marks=pytest.mark.slow) for name in REPLICATED))
MAX_NUM_SEQS = 4
NUM_REQUESTS = 30
MAX_TOKENS = 8
MAX_MODEL_LEN = 256

# How temperatures are chosen, in turn.
CHOICES = (
    0.0,
    0.7,
    AdaptiveRequest(head="token", select="sample"),
    AdaptiveRequest(head="sequence", select="sample"),
    AdaptiveRequest(head="token", select="argmax"),
)


def make_config(backend: str, **options) -> EngineConfig:
    return EngineConfig(
        backend=backend,
        num_replicas=1 if backend == "local" else 2,
        max_num_seqs=MAX_NUM_SEQS,
        dtype="float32",
        options={
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": MAX_MODEL_LEN,
            "block_size": 32,
            "kv_cache_memory_bytes": 1 << 26,
            "distributed_executor_backend": "uni",
            **options,
        },
    )


def make_requests(count=NUM_REQUESTS, max_tokens=MAX_TOKENS) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=f"prompt/{number}",
            prompt_token_ids=tuple(range(5, 8 + number % 4)),
            max_tokens=max_tokens,
            seed=number,
            temperature=CHOICES[number % len(CHOICES)],
        )
        for number in range(count)
    ]


def run_scenario(backend: str, model: str, heads: dict[str, str]) -> dict:
    """What an engine says, at work and when a replica dies."""
    folders = {name: Path(folder) for name, folder in heads.items()}
    with open_engine(Path(model), make_config(backend), folders) as engine:
        result = {
            "answers": list(map(asdict, engine.generate(make_requests()))),
            "again": list(map(asdict, engine.generate(reversed(make_requests())))),
            "empty": list(engine.generate([])),
            "refused": describe_error(engine, [make_long_request()]),
            "loads": observe_loads(engine),
            # The requests that were abandoned neither stay nor answer.
            "after": [answer.id for answer in engine.generate(make_requests(3))],
        }
        if backend != "local":
            result["death"] = describe_death(engine)
    result["orphans"] = find_orphans()
    return result


def make_long_request() -> GenerationRequest:
    return GenerationRequest("long", (5,) * (MAX_MODEL_LEN + 1), 1, seed=0, temperature=1.0)


def describe_error(engine: Engine, requests: list[GenerationRequest]) -> tuple[str, str]:
    try:
        list(engine.generate(requests))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def observe_loads(engine: Engine) -> list[int]:
    """How many requests each replica has after the first answer; the rest are abandoned."""
    replicas: list[int] = []
    if isinstance(engine, DataParallelEngine):
        answer = engine._answer
        engine._answer = lambda request, replica: (
            replicas.append(replica) or answer(request, replica)
        )
    answers = engine.generate(make_requests(max_tokens=100))
    next(answers)
    if isinstance(engine, RayEngine):
        loads = [seat.num_requests for seat in engine._seats]
    else:
        loads = list(Counter(replicas).values())
    answers.close()
    return loads


def describe_death(engine: Engine) -> tuple[str, str]:
    """The error when a replica is killed while others run."""
    answers = engine.generate(make_requests(max_tokens=200))
    next(answers)
    find_replicas()[0].kill()
    try:
        list(answers)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def find_orphans() -> list[str]:
    """Processes that the engine leaves. Those that are about to end have time for it."""
    children = [
        child
        for child in psutil.Process().children(recursive=True)
        # Of Python's own; it ends with the process.
        if "resource_tracker" not in read_command(child)
    ]
    _, alive = psutil.wait_procs(children, timeout=30)
    return [str(child) for child in alive]


def find_replicas() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any(name in read_command(process) for name in ("ray::Replica", "EngineCore_DP"))
    ]


def read_command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "ended"


def begin_processes(background):
    begin_backend(background, "local")


def begin_slow_processes(background):
    for backend in REPLICATED:
        begin_backend(background, backend)


def begin_backend(background, backend):
    engines = get_engines(background)
    heads = {level: str(engines.heads[level[:3]]) for level in ("token", "sequence")}
    scenario = {"backend": backend, "model": str(engines.model), "heads": heads}
    engines.begin_module(f"lpo-{backend}", "tests.lpo.test_engine", "v1", scenario)


@pytest.fixture(scope="module")
def results(background):
    """What a backend said."""

    def wait(backend: str) -> dict:
        begin_backend(background, backend)
        return background.wait(f"lpo-{backend}")

    return wait


def by_id(answers: list[dict]) -> dict[str, dict]:
    return {answer["id"]: answer for answer in answers}


@pytest.mark.engine
@pytest.mark.timeout(WAIT_S)
class TestRunning:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_request_is_answered_once(self, results, backend):
        ids = Counter(answer["id"] for answer in results(backend)["answers"])
        assert ids == Counter(request.id for request in make_requests())
        assert NUM_REQUESTS > 2 * 2 * MAX_NUM_SEQS
        assert not results(backend)["empty"]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_token_has_the_temperature_that_was_asked_for(self, results, backend):
        answers = by_id(results(backend)["answers"])
        seen = set()
        for request in make_requests():
            answer = answers[request.id]
            assert len(answer["token_ids"]) == len(answer["temperatures"])
            assert answer["finish_reason"] in ("length", "stop")
            if answer["finish_reason"] == "length":
                assert len(answer["token_ids"]) == MAX_TOKENS
            temperatures = set(answer["temperatures"])
            if not isinstance(request.temperature, AdaptiveRequest):
                assert temperatures == {request.temperature}
                continue
            assert temperatures <= set(TEMPERATURES)
            if request.temperature.head == "sequence":
                assert len(temperatures) == 1
            seen |= temperatures
        assert len(seen) > 2

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_log_probabilities_are_those_at_temperature_1(self, results, backend):
        answers = by_id(results(backend)["answers"])
        greedy = {}
        for request in make_requests():
            logprobs = answers[request.id]["logprobs"]
            assert len(logprobs) == len(answers[request.id]["token_ids"])
            # At the temperature that they were sampled at, greedy tokens would have 0.
            assert max(logprobs) < 0
            if request.temperature == 0:
                greedy[request.prompt_token_ids] = logprobs[0]
        assert len(greedy) == 4
        for request in make_requests():
            first = answers[request.id]["logprobs"][0]
            assert first <= greedy[request.prompt_token_ids] + 1e-4

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(self, results, backend):
        assert by_id(results(backend)["answers"]) == by_id(results(backend)["again"])
        assert by_id(results(backend)["answers"]) == by_id(results("local")["answers"])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_refused_request_is_named_and_leaves_the_engine_usable(self, results, backend):
        kind, message = results(backend)["refused"]
        assert kind == "ValueError"
        assert "request long: " in message
        assert "maximum context length is 256" in message
        assert len(results(backend)["after"]) == 3

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_abandoned_requests_do_not_answer_later(self, results, backend):
        expected = [request.id for request in make_requests(3)]
        assert sorted(results(backend)["after"]) == expected

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", REPLICATED)
    def test_replicas_share_the_requests_and_have_no_more_than_they_need(self, results, backend):
        loads = results(backend)["loads"]
        assert len(loads) == 2
        assert min(loads) > 0 and max(loads) <= REQUESTS_AHEAD * MAX_NUM_SEQS

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("backend", "sentence"),
        [
            ("ray", r"replica [01] \(process \d+ on .*\) died"),
            ("data_parallel", "one of the 2 data-parallel engine processes died"),
        ],
    )
    def test_a_replica_that_dies_is_an_error_and_no_hang(self, results, backend, sentence):
        kind, message = results(backend)["death"]
        assert kind == "RuntimeError"
        assert re.match(sentence, message)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_closing_leaves_no_process(self, results, backend):
        assert not results(backend)["orphans"]


class FakeRay:
    """Runs calls at once, but returns their results one at a time, in order."""

    class exceptions:
        RayTaskError = RayError = RuntimeError

    def get(self, call):
        return call()

    def wait(self, calls, num_returns, timeout=None):
        return calls[:1], calls[1:]


class FakeReplica:
    """Has room for everything, and finishes one request a call."""

    def __init__(self) -> None:
        self.requests: deque[GenerationRequest] = deque()
        self.most = 0
        self.is_abandoned = False
        self.advance = self.abandon = self

    def remote(self, requests=None):
        if requests is None:
            self.requests.clear()
            self.is_abandoned = True
            return None
        self.requests.extend(requests)
        self.most = max(self.most, len(self.requests))
        done = [self.requests.popleft()] if self.requests else []
        return lambda: [Generation(request.id, (), (), "", "stop") for request in done]


@pytest.fixture
def fake_engine():
    from adaptive_head.lpo.engine_ray import _Seat

    engine = RayEngine.__new__(RayEngine)
    engine._ray = FakeRay()
    engine._max_requests = REQUESTS_AHEAD * MAX_NUM_SEQS
    engine._seats = [_Seat(f"replica {number}", FakeReplica()) for number in range(3)]
    return engine


def test_ray_replicas_are_filled_evenly_and_only_so_far(fake_engine):
    taken = 0

    def count() -> Iterator[GenerationRequest]:
        nonlocal taken
        for request in make_requests(100):
            taken += 1
            yield request

    answers = fake_engine.generate(count())
    first = next(answers)
    assert taken <= 3 * REQUESTS_AHEAD * MAX_NUM_SEQS + 1
    ids = [first.id, *(answer.id for answer in answers)]
    assert sorted(ids) == sorted(request.id for request in make_requests(100))
    assert all(seat.actor.most <= REQUESTS_AHEAD * MAX_NUM_SEQS for seat in fake_engine._seats)
    assert all(seat.num_requests == 0 and not seat.calls for seat in fake_engine._seats)


def test_few_requests_are_spread_over_all_ray_replicas(fake_engine):
    assert len(list(fake_engine.generate(make_requests(3)))) == 3
    assert [seat.actor.most for seat in fake_engine._seats] == [1, 1, 1]
    assert not any(seat.actor.is_abandoned for seat in fake_engine._seats)


def test_ray_replicas_forget_what_the_caller_abandons(fake_engine):
    answers = fake_engine.generate(make_requests(100))
    next(answers)
    answers.close()
    assert all(seat.actor.is_abandoned for seat in fake_engine._seats)
    assert len(list(fake_engine.generate(make_requests(5)))) == 5


def test_an_inbox_ends_for_the_moment_only():
    inbox = Inbox()
    assert list(inbox) == []
    inbox.extend(make_requests(2))
    assert [request.id for request in inbox] == ["prompt/0", "prompt/1"]
    inbox.extend(make_requests(1))
    assert len(list(inbox)) == 1


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the dtype for CPUs")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_engines_run_in_float32_without_bfloat16_instructions(processor, monkeypatch):
    run_on(monkeypatch, processor)
    default = "float32" if processor in WITHOUT_BFLOAT16 else "auto"

    def find_dtype(**settings) -> str:
        return engine_arguments("model", EngineConfig(**settings), {})["dtype"]

    assert find_dtype() == default
    assert find_dtype(dtype="bfloat16") == find_dtype(options={"dtype": "bfloat16"}) == "bfloat16"


def test_engines_report_raw_log_probabilities_whatever_the_options_say():
    options = {"logprobs_mode": "processed_logprobs"}
    arguments = engine_arguments("model", EngineConfig(options=options), {})
    assert arguments["logprobs_mode"] == "raw_logprobs"


def test_filters_travel_with_a_request_of_any_kind():
    filters = Filters(top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    policy = AdaptiveRequest(policy="entropy")
    for temperature, expected in ((0.7, 0.7), (policy, 1.0)):
        request = GenerationRequest("a", (5,), 8, 3, temperature, filters)
        params = make_sampling_params(request, {})
        assert (params.top_p, params.top_k, params.min_p) == (0.9, 20, 0.1)
        assert params.repetition_penalty == 1.1
        assert (params.temperature, params.seed, params.logprobs) == (expected, 3, 0)


def test_a_generation_has_the_log_probability_of_each_token():
    positions = [{7: Logprob(-0.25, 1)}, {9: Logprob(-math.inf, 3)}]
    completion = SimpleNamespace(
        token_ids=[7, 9], logprobs=positions, text="ab", finish_reason="length"
    )
    request = GenerationRequest("a", (5,), 8, 3, 0.7)
    generation = read_generation(SimpleNamespace(outputs=[completion]), request)
    # JSON has no infinity.
    assert generation.logprobs == (-0.25, -9999.0)


def make_nodes(kind: str, *counts: int) -> list[dict]:
    nodes = [{"Alive": True, "Resources": {kind: float(count)}} for count in counts]
    return [*nodes, {"Alive": False, "Resources": {}}]


@pytest.mark.parametrize(
    ("counts", "options", "expected"),
    [
        ((2,), {}, 1),
        ((1, 1), {}, 1),
        ((4,), {"tensor_parallel_size": 2}, 2),
        ((2, 3), {"tensor_parallel_size": 2}, 2),
        ((8,), {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 4),
    ],
)
def test_a_ray_replica_reserves_the_gpus_of_its_ranks(counts, options, expected):
    config = make_config("ray", **options)
    assert find_resources(make_nodes("GPU", *counts), config) == {"num_gpus": expected}


def test_a_ray_replicas_gpus_must_be_on_one_machine():
    config = make_config("ray", tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"2 with 2 GPUs each, .* machines of 3, 1 GPUs"):
        find_resources(make_nodes("GPU", 3, 1), config)


@pytest.mark.parametrize(
    ("counts", "expected"), [((2,), 1), ((16,), 8), ((16, 4), 8), ((16, 16), 16), ((1, 1), 1)]
)
def test_without_gpus_ray_replicas_share_the_cores(counts, expected):
    assert find_resources(make_nodes("CPU", *counts), make_config("ray")) == {"num_cpus": expected}


def test_more_ray_replicas_than_cores_are_refused():
    with pytest.raises(ValueError, match="num_replicas: 2 do not fit the cluster's 1 cores"):
        find_resources(make_nodes("CPU", 1), make_config("ray"))


def test_without_ray_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'adaptive-head-server\[ray\]'"):
        import_ray()


def test_an_address_without_a_cluster_is_refused_at_once():
    with pytest.raises(ValueError, match="no Ray cluster answers at localhost:1: "):
        connect(None, "localhost:1")


if __name__ == "__main__":
    outcome = run_scenario(**json.load(sys.stdin))
    Path(sys.argv[1]).write_text(json.dumps(outcome))
