import asyncio

import pytest
from prometheus_client import CollectorRegistry
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from adaptive_head.options import EXTRA_ARGS_KEY, Options
from server.engine_proxy import EngineProxy, logger
from server.record import _CURRENT, RequestRecord
from tests.server.fakes import Queue, make_output, make_report, sample


class Engine:
    """Delivers its outputs, and remembers what it was asked and whether it was left."""

    errored = False
    log_requests = False

    def __init__(self, *outputs):
        self.outputs = outputs
        self.calls = []
        self.aborted = []
        self.is_closed = False

    def generate(self, prompt, sampling_params, *args, **kwargs):
        self.calls.append((prompt, sampling_params, args, kwargs))
        self.generator = self._generate()
        return self.generator

    async def add_request(self, request_id, prompt, params, **kwargs):
        self.calls.append((prompt, params, (request_id,), kwargs))
        self.queue = Queue(self._generate())
        return self.queue

    async def abort(self, request_id, internal):
        assert internal, "a client may give several requests one name"
        self.aborted.append(request_id)

    async def _generate(self):
        try:
            for output in self.outputs:
                if isinstance(output, Exception):
                    raise output
                await asyncio.sleep(0)
                yield output
        finally:
            self.is_closed = True


def three_outputs():
    return (
        make_output((0, [0.3], None)),
        make_output((0, [0.7], None, 1)),
        make_output((0, [1.0], "stop", 2), finished=True),
    )


def adaptive_params(registry=None, **extra_args) -> SamplingParams:
    prompt_report = make_report(registry=registry).begin_prompt()
    return SamplingParams(seed=5, extra_args={EXTRA_ARGS_KEY: prompt_report} | extra_args)


@pytest.mark.parametrize(
    "extra_args", [None, {}, {"other": 1}, {EXTRA_ARGS_KEY: {"policy": "head"}}]
)
def test_an_ordinary_request_gets_the_engines_own_generator(extra_args):
    engine = Engine()
    params = SamplingParams(extra_args=extra_args)
    assert EngineProxy(engine).generate("p", params, "id", priority=1) is engine.generator
    assert engine.calls == [("p", params, ("id",), {"priority": 1})]
    assert engine.calls[0][1] is params


def test_everything_else_is_the_engines():
    engine = Engine()
    assert EngineProxy(engine).errored is False
    assert EngineProxy(engine).calls is engine.calls
    with pytest.raises(AttributeError):
        _ = EngineProxy(engine).nonsense


async def test_the_engine_gets_plain_options_and_the_caller_keeps_its_parameters():
    engine = Engine(*three_outputs())
    params = adaptive_params(other=1)
    before = dict(params.extra_args)
    outputs = [o async for o in EngineProxy(engine).generate("p", params, "id", priority=1)]
    ((prompt, sent, args, kwargs),) = engine.calls
    assert (prompt, args, kwargs) == ("p", ("id",), {"priority": 1})
    assert sent.extra_args["other"] == 1
    assert Options.from_extra_args(sent.extra_args).name == "tok"
    assert sent.seed == params.seed
    assert params.extra_args == before
    assert len(outputs) == 3


async def test_the_same_parameters_can_generate_again():
    registry = CollectorRegistry()
    params = adaptive_params(registry)
    for _ in range(2):
        engine = Engine(*three_outputs())
        assert len([o async for o in EngineProxy(engine).generate("p", params, "id")]) == 3
    assert sample(registry, "adaptive_requests_total") == 2
    assert sample(registry, "adaptive_temperature_count") == 6


async def test_leaving_early_aborts_the_request_and_counts_what_came():
    registry = CollectorRegistry()
    engine = Engine(*three_outputs())
    generator = EngineProxy(engine).generate("p", adaptive_params(registry), "id")
    await anext(generator)
    await generator.aclose()
    assert engine.aborted == ["internal"] and engine.queue.is_closed
    assert sample(registry, "adaptive_temperature_count") == 1


async def test_cancelling_aborts_the_request_and_counts_what_came():
    registry = CollectorRegistry()
    engine = Engine(*three_outputs())
    generator = EngineProxy(engine).generate("p", adaptive_params(registry), "id")

    async def consume():
        async for _ in generator:
            await asyncio.sleep(3600)

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await generator.aclose()
    assert engine.aborted == ["internal"] and engine.queue.is_closed
    assert sample(registry, "adaptive_temperature_count") == 1


async def test_an_error_of_the_engines_aborts_and_what_came_before_is_counted():
    registry = CollectorRegistry()
    engine = Engine(three_outputs()[0], RuntimeError("engine"))
    generator = EngineProxy(engine).generate("p", adaptive_params(registry), "id")
    await anext(generator)
    with pytest.raises(EngineGenerateError) as caught:
        await anext(generator)
    assert str(caught.value.__cause__) == "engine"
    assert engine.aborted == ["internal"] and engine.queue.is_closed
    assert sample(registry, "adaptive_temperature_count") == 1


@pytest.mark.parametrize(
    "error",
    [EngineDeadError(), VLLMValidationError("x", parameter="y"), QueueOverflowError()],
)
async def test_errors_that_vllm_lets_through_are_let_through(error, monkeypatch):
    engine = Engine(error)
    with pytest.raises(type(error)):
        await anext(EngineProxy(engine).generate("p", adaptive_params(), "id"))
    assert not engine.aborted and engine.queue.is_closed

    async def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(engine, "add_request", refuse)
    with pytest.raises(type(error)):
        await anext(EngineProxy(engine).generate("p", adaptive_params(), "id"))


async def test_nothing_is_counted_before_the_first_output_is_asked_for():
    registry = CollectorRegistry()
    generator = EngineProxy(Engine()).generate("p", adaptive_params(registry), "id")
    assert sample(registry, "adaptive_requests_total") == 0
    await generator.aclose()


def test_an_adapter_that_is_found_late_is_refused_for_a_head():
    engine = Engine()
    with pytest.raises(VLLMValidationError) as caught:
        EngineProxy(engine).generate("prompt", adaptive_params(), "id", lora_request=object())
    assert caught.value.parameter == "model"
    assert not engine.calls


class AbortableEngine(Engine):
    """Delivers nothing but what an abort makes it deliver."""

    async def abort(self, request_id, internal):
        await super().abort(request_id, internal)
        (self.queue.waiting,) = self.outputs or (None,)

    async def _generate(self):
        await asyncio.sleep(3600)
        yield


def whole_params(registry=None) -> SamplingParams:
    params = adaptive_params(registry)
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


async def leave(generator, error=asyncio.CancelledError):
    """Wait for a generator as a handler does whose client goes away."""
    task = asyncio.create_task(anext(generator))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(error):
        await task
    await generator.aclose()


async def test_tokens_of_an_answer_whose_client_left_are_counted():
    registry = CollectorRegistry()
    engine = AbortableEngine(make_output((0, [0.3, 0.7], "abort"), finished=True))
    await leave(EngineProxy(engine).generate("p", whole_params(registry), "id"))
    assert engine.aborted == ["internal"] and engine.queue.is_closed
    assert sample(registry, "adaptive_temperature_count") == 2
    assert sample(registry, "adaptive_request_temperature_count") == 0


async def test_an_engine_that_delivers_nothing_at_an_abort_is_left_all_the_same():
    engine = AbortableEngine()
    await leave(EngineProxy(engine).generate("p", whole_params(), "id"))
    assert engine.queue.is_closed


async def test_an_engine_that_fails_at_an_abort_keeps_no_client(monkeypatch):
    engine = AbortableEngine()

    async def fail(request_id, internal):
        raise RuntimeError("engine gone")

    monkeypatch.setattr(engine, "abort", fail)
    await leave(EngineProxy(engine).generate("p", whole_params(), "id"), RuntimeError)
    assert engine.queue.is_closed


async def test_a_client_that_leaves_before_the_engine_has_the_request_aborts_nothing(monkeypatch):
    engine = AbortableEngine()
    monkeypatch.setattr(engine, "add_request", lambda *args: asyncio.sleep(3600))
    await leave(EngineProxy(engine).generate("p", whole_params(), "id"))
    assert not engine.aborted


async def test_a_client_that_leaves_a_dead_engine_is_still_a_client_that_leaves():
    engine = AbortableEngine(EngineDeadError())
    await leave(EngineProxy(engine).generate("p", whole_params(), "id"))
    assert engine.queue.is_closed


async def test_requests_that_fail_or_are_left_are_logged_where_vllm_logs_them(monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "info", lambda message, *values: lines.append(message % values))
    engine = Engine(VLLMValidationError("too much", parameter="n"))
    for engine.log_requests in (False, True):
        with pytest.raises(VLLMValidationError):
            await anext(EngineProxy(engine).generate("p", adaptive_params(), "first"))
    left = AbortableEngine()
    left.log_requests = True
    await leave(EngineProxy(left).generate("p", whole_params(), "second"))
    failed, aborted = lines
    assert failed.startswith("Request first failed: ") and "too much" in failed
    assert aborted == "Request second aborted."


async def test_a_token_without_temperature_is_told_once_and_the_record_ends():
    record = RequestRecord("POST", "/v1/completions")
    token = _CURRENT.set(record)
    try:
        engine = Engine(make_output((0, [0.3], None)), make_output((0, [0.3], "stop", 7)))
        with pytest.raises(EngineGenerateError):
            [o async for o in EngineProxy(engine).generate("p", adaptive_params(), "id")]
    finally:
        _CURRENT.reset(token)
    assert record._num_open_prompts == 0


async def test_an_answer_that_is_finished_is_not_aborted():
    registry = CollectorRegistry()
    engine = Engine(make_output((0, [0.3], "stop"), finished=True))
    outputs = [o async for o in EngineProxy(engine).generate("p", whole_params(registry), "id")]
    assert len(outputs) == 1 and not engine.aborted and engine.queue.is_closed
    assert sample(registry, "adaptive_temperature_count") == 1


@pytest.mark.parametrize("params", [SamplingParams(), adaptive_params(), whole_params()])
async def test_a_record_counts_the_tokens_of_any_request(params):
    record = RequestRecord("POST", "/v1/completions")
    token = _CURRENT.set(record)
    try:
        engine = Engine(*three_outputs())
        outputs = [o async for o in EngineProxy(engine).generate("p", params, "id")]
    finally:
        _CURRENT.reset(token)
    assert len(outputs) == 3
    assert (record.prompt_tokens, record.completion_tokens) == (2, 3)
    assert record.finish_reasons == ["stop"]
    assert record.ttft_s > 0
    assert (record.adaptive is not None) == bool(params.extra_args)
