import asyncio

import pytest
from prometheus_client import CollectorRegistry
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from adaptive_head.options import EXTRA_ARGS_KEY, Options
from server import engine_proxy
from server.engine_proxy import EngineProxy
from server.record import _CURRENT, RequestRecord
from tests.server.fakes import make_output, make_report, sample


class Engine:
    """Yields its outputs, and remembers what it was asked and whether it was closed."""

    errored = False

    def __init__(self, *outputs):
        self.outputs = outputs
        self.calls = []
        self.is_closed = False

    def generate(self, prompt, sampling_params, *args, **kwargs):
        self.calls.append((prompt, sampling_params, args, kwargs))
        self.generator = self._generate()
        return self.generator

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


async def test_leaving_early_closes_the_engines_generator_and_counts_what_came():
    registry = CollectorRegistry()
    engine = Engine(*three_outputs())
    generator = EngineProxy(engine).generate("p", adaptive_params(registry), "id")
    await anext(generator)
    await generator.aclose()
    assert engine.is_closed
    assert sample(registry, "adaptive_temperature_count") == 1


async def test_cancelling_closes_the_engines_generator_and_counts_what_came():
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
    assert engine.is_closed
    assert sample(registry, "adaptive_temperature_count") == 1


async def test_the_engines_error_arrives_and_what_came_before_is_counted():
    registry = CollectorRegistry()
    engine = Engine(three_outputs()[0], RuntimeError("engine"))
    generator = EngineProxy(engine).generate("p", adaptive_params(registry), "id")
    await anext(generator)
    with pytest.raises(RuntimeError, match="engine"):
        await anext(generator)
    assert sample(registry, "adaptive_temperature_count") == 1


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
    """Delivers nothing but what an abort by name makes it deliver."""

    def __init__(self, *outputs):
        super().__init__(*outputs)
        self.aborted = []
        self.is_aborted = asyncio.Event()

    async def abort(self, request_id):
        self.aborted.append(request_id)
        if self.outputs:
            self.is_aborted.set()

    async def _generate(self):
        try:
            await self.is_aborted.wait()
            for output in self.outputs:
                yield output
        finally:
            self.is_closed = True


def whole_params(registry=None) -> SamplingParams:
    params = adaptive_params(registry)
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


def aborted_output():
    return make_output((0, [0.3, 0.7], "abort"), finished=True)


async def leave(generator):
    """Wait for a generator as a handler does whose client goes away."""
    task = asyncio.create_task(anext(generator))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await generator.aclose()


async def test_tokens_of_a_whole_answer_whose_client_left_are_counted():
    registry = CollectorRegistry()
    engine = AbortableEngine(aborted_output())
    await leave(EngineProxy(engine).generate("p", whole_params(registry), "id"))
    assert engine.is_closed
    assert sample(registry, "adaptive_temperature_count") == 2
    assert sample(registry, "adaptive_request_temperature_count") == 0


async def test_a_whole_answer_has_a_name_that_no_client_can_give_another():
    names = set()
    for _ in range(2):
        engine = AbortableEngine(aborted_output())
        await leave(EngineProxy(engine).generate("p", whole_params(), "id"))
        ((_, _, args, _),) = engine.calls
        assert args == tuple(engine.aborted)
        names.update(args)
    assert len(names) == 2
    assert all(name.startswith("id-") for name in names)


async def test_an_engine_that_delivers_nothing_at_an_abort_is_left_all_the_same(monkeypatch):
    monkeypatch.setattr(engine_proxy, "_ABORT_TIMEOUT_S", 0.01)
    engine = AbortableEngine()
    await leave(EngineProxy(engine).generate("p", whole_params(), "id"))
    await asyncio.sleep(0)
    assert engine.is_closed


async def test_an_engine_that_fails_at_an_abort_keeps_no_client(monkeypatch):
    engine = AbortableEngine()

    async def fail(request_id):
        raise RuntimeError("engine gone")

    monkeypatch.setattr(engine, "abort", fail)
    generator = EngineProxy(engine).generate("p", whole_params(), "id")
    task = asyncio.create_task(anext(generator))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(RuntimeError, match="engine gone"):
        await task
    assert engine.is_closed


async def test_a_whole_answer_that_is_finished_or_fails_is_not_aborted():
    registry = CollectorRegistry()
    engine = AbortableEngine(make_output((0, [0.3], "stop"), finished=True))
    engine.is_aborted.set()
    outputs = [o async for o in EngineProxy(engine).generate("p", whole_params(registry), "id")]
    assert len(outputs) == 1 and not engine.aborted
    assert sample(registry, "adaptive_temperature_count") == 1
    broken = Engine(RuntimeError("engine"))
    with pytest.raises(RuntimeError, match="engine"):
        await anext(EngineProxy(broken).generate("p", whole_params(), "id"))
    assert broken.is_closed


@pytest.mark.parametrize("params", [SamplingParams(), adaptive_params(), whole_params()])
async def test_a_record_counts_the_tokens_of_any_request(params):
    record = RequestRecord("POST", "/v1/completions")
    token = _CURRENT.set(record)
    try:
        engine = Engine(*three_outputs())
        outputs = [o async for o in EngineProxy(engine).generate("p", params, "id")]
    finally:
        _CURRENT.reset(token)
    assert len(outputs) == 3 and engine.is_closed
    assert (record.prompt_tokens, record.completion_tokens) == (2, 3)
    assert record.finish_reasons == ["stop"]
    assert record.ttft_s > 0
    assert (record.adaptive is not None) == bool(params.extra_args)
