import asyncio

import pytest
import vllm
from prometheus_client import CollectorRegistry
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import (
    QueueOverflowError,
    RetryableRequestError,
    VLLMServerError,
    VLLMValidationError,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from adaptive_head.options import EXTRA_ARGS_KEY, Options
from server.engine_proxy import EngineProxy
from server.record import _CURRENT, RequestRecord
from server.report import current_report, set_current_report
from tests.server.fakes import make_output, make_report, sample


class Engine:
    """Delivers its outputs, and remembers what it was asked and whether it was left."""

    errored = False

    def __init__(self, *outputs):
        self.outputs = outputs
        self.calls = []
        self.num_left = 0

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
        except (GeneratorExit, asyncio.CancelledError):
            self.num_left += 1
            raise


def three_outputs():
    return (
        make_output((0, [0.3], None)),
        make_output((0, [0.7], None, 1)),
        make_output((0, [1.0], "stop", 2), finished=True),
    )


def admit(registry=None, **fields) -> SamplingParams:
    """Work for an adaptive request from here on; its parameters, as vLLM's handlers make them."""
    report = make_report(registry=registry, **fields)
    set_current_report(report)
    return SamplingParams(seed=5, extra_args=report.options.to_extra_args())


async def read_all(engine, params) -> list:
    return [output async for output in EngineProxy(engine).generate("p", params, "id")]


@pytest.mark.parametrize("is_adaptive", [False, True])
@pytest.mark.parametrize(
    "extra_args", [None, {}, {"other": 1}, {EXTRA_ARGS_KEY: {"policy": "head"}}]
)
def test_an_ordinary_request_gets_the_engines_own_generator(extra_args, is_adaptive):
    """As does what vLLM may generate with other parameters on an adaptive one's way."""
    if is_adaptive:
        admit()
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


async def test_the_engine_gets_the_parameters_as_they_are():
    engine = Engine(*three_outputs())
    params = admit()
    outputs = [o async for o in EngineProxy(engine).generate("p", params, "id", priority=1)]
    ((prompt, sent, args, kwargs),) = engine.calls
    assert (prompt, args, kwargs) == ("p", ("id",), {"priority": 1})
    assert sent is params and Options.from_extra_args(sent.extra_args).name == "tok"
    assert len(outputs) == 3


async def test_a_chat_generates_again_and_continues_its_answer():
    """As after a tool call: the same prompt, in its next turn."""
    registry = CollectorRegistry()
    params = admit(registry, adaptive={"report": "tokens"})
    for _ in range(2):
        assert len(await read_all(Engine(*three_outputs()), params)) == 3
    assert sample(registry, "adaptive_requests_total") == 2
    assert sample(registry, "adaptive_temperature_count") == 6
    described = current_report()[0].describe(show_tokens=True)
    assert described["temperatures"] == [0.3, 0.7, 1.0] * 2


async def test_completions_generate_one_prompt_after_the_other():
    params = admit(takes_many_prompts=True, adaptive={"report": "tokens"})
    for _ in range(2):
        await read_all(Engine(*three_outputs()), params)
    for index in range(2):
        described = current_report()[index].describe(show_tokens=True)
        assert described["temperatures"] == [0.3, 0.7, 1.0]


async def test_requests_at_once_do_not_see_each_others_reports():
    """Of equal options, even; and tasks that a request starts, as vLLM does, work for it."""

    async def serve(temperature):
        params = admit(adaptive={"report": "tokens"})
        output = make_output((0, [temperature] * 3, "stop"), finished=True)
        await asyncio.sleep(0)
        await asyncio.create_task(read_all(Engine(output), params))
        return current_report()[0].describe(show_tokens=True)["temperatures"]

    temperatures = [0.0, 0.3, 0.7, 1.0]
    found = await asyncio.gather(*[asyncio.create_task(serve(value)) for value in temperatures])
    assert found == [[value] * 3 for value in temperatures]
    assert current_report() is None


async def test_leaving_early_leaves_the_engine_and_counts_what_came():
    registry = CollectorRegistry()
    engine = Engine(*three_outputs())
    generator = EngineProxy(engine).generate("p", admit(registry), "id")
    await anext(generator)
    await generator.aclose()
    assert engine.num_left == 1
    assert sample(registry, "adaptive_temperature_count") == 1
    assert sample(registry, "adaptive_request_temperature_count") == 0


async def test_cancelling_leaves_the_engine_and_counts_what_came():
    registry = CollectorRegistry()
    engine = Engine(*three_outputs())
    engine._generate = lambda: generate_and_wait(engine, three_outputs()[0])
    generator = EngineProxy(engine).generate("p", admit(registry), "id")
    task = asyncio.create_task(anext(generator))
    await task
    task = asyncio.create_task(anext(generator))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.num_left == 1
    assert sample(registry, "adaptive_temperature_count") == 1


async def generate_and_wait(engine, output):
    try:
        yield output
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        engine.num_left += 1
        raise


async def test_a_stream_that_nobody_closes_is_counted_when_its_request_is_over():
    registry = CollectorRegistry()
    generator = EngineProxy(Engine(*three_outputs())).generate("p", admit(registry), "id")
    await anext(generator)
    current_report().hold()
    assert sample(registry, "adaptive_temperature_count") == 0
    current_report().release()
    assert sample(registry, "adaptive_temperature_count") == 1
    await generator.aclose()
    assert sample(registry, "adaptive_temperature_count") == 1


async def test_what_came_before_an_error_is_counted():
    registry = CollectorRegistry()
    engine = Engine(three_outputs()[0], RuntimeError("engine"))
    generator = EngineProxy(engine).generate("p", admit(registry), "id")
    await anext(generator)
    with pytest.raises(RuntimeError, match="engine"):
        await anext(generator)
    assert sample(registry, "adaptive_temperature_count") == 1


def refusing_engine(error: Exception) -> AsyncLLM:
    """vLLM's own client of an engine that takes no request."""
    engine = AsyncLLM.__new__(AsyncLLM)
    engine.log_requests = False

    async def refuse(*args, **kwargs):
        raise error

    engine.add_request = refuse
    # At its end it closes what it has not opened.
    engine.shutdown = lambda *args, **kwargs: None
    return engine


@pytest.mark.parametrize(
    "error",
    [
        EngineDeadError(),
        VLLMValidationError("x", parameter="y"),
        QueueOverflowError(),
        RetryableRequestError("paused"),
        RuntimeError("bug"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_are_vllms_own(error):
    raised = []
    for engine in (refusing_engine(error), EngineProxy(refusing_engine(error))):
        with pytest.raises(Exception) as caught:
            await anext(engine.generate("p", admit(), "id"))
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]


async def test_a_paused_engine_answers_as_vllms_own():
    """With a 503, from 0.33 on."""
    engine = EngineProxy(refusing_engine(RetryableRequestError("paused")))
    with pytest.raises(VLLMServerError) as caught:
        await anext(engine.generate("p", admit(), "id"))
    is_retryable = vllm.__version_tuple__ >= (0, 33)
    assert create_error_response(caught.value).error.code == (503 if is_retryable else 500)


async def test_nothing_is_counted_before_the_first_output_is_asked_for():
    registry = CollectorRegistry()
    generator = EngineProxy(Engine()).generate("p", admit(registry), "id")
    assert sample(registry, "adaptive_requests_total") == 0
    await generator.aclose()


def test_an_adapter_that_is_found_late_is_refused_for_a_head():
    engine = Engine()
    with pytest.raises(VLLMValidationError) as caught:
        EngineProxy(engine).generate("prompt", admit(), "id", lora_request=object())
    assert caught.value.parameter == "model"
    assert not engine.calls


@pytest.fixture
def record():
    record = RequestRecord("POST", "/v1/completions")
    token = _CURRENT.set(record)
    yield record
    _CURRENT.reset(token)


async def test_a_token_without_temperature_is_told_once_and_the_record_ends(record):
    engine = Engine(make_output((0, [0.3], None)), make_output((0, [0.3], "stop", 7)))
    with pytest.raises(AssertionError):
        await read_all(engine, admit())
    assert record._num_open_prompts == 0


@pytest.mark.parametrize("is_adaptive", [False, True])
async def test_a_record_counts_the_tokens_of_any_request(record, is_adaptive):
    params = admit() if is_adaptive else SamplingParams()
    assert len(await read_all(Engine(*three_outputs()), params)) == 3
    assert (record.prompt_tokens, record.completion_tokens) == (2, 3)
    assert record.finish_reasons == ["stop"]
    assert record.ttft_s > 0
    assert (record.adaptive is not None) == is_adaptive
