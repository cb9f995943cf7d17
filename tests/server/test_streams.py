"""Streams of chats and completions are vLLM's, whose own generators make every chunk."""

import asyncio
import copy
import inspect
import json
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaMessage, RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.utils.async_utils import merge_async_iterators

from server.engine_proxy import EngineProxy
from server.handlers import (
    HAS_CHUNK_OBJECTS,
    AdaptiveServingChat,
    AdaptiveServingCompletion,
)
from server.protocol import AdaptiveChatCompletionRequest, AdaptiveCompletionRequest
from server.report import set_current_report
from server.responses import AdaptiveServingResponses
from tests.server.fakes import make_mask, make_report

# A name that looks like all that is searched for.
MODEL = 'm","choices":[{"index":7,"token_ids":null,"text":"a","content":"a","finish_reason":"stop"'
TEXTS = ["a", "", '"', "\\", "\n\t\r\b\f", "\x00\x1f\x7f", "é\u2028😀", '","finish_reason":"stop"']
TEXTS += ['"token_ids":[1],', '"choices":[{"index":1', '"adaptive":{']
MICROS = [0, 300_000, 1_000_000]
MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass
class Engine:
    """Generates what was drawn: for each prompt its outputs, or the error in an output's place.

    Attributes:
        num_given: outputs that were asked for.
    """

    prompts: list[list[RequestOutput | Exception]]
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    num_given: int = 0
    num_open: int = 0

    async def generate(self, prompt, params, request_id):
        self.num_open += 1
        try:
            for output in copy.deepcopy(self.prompts[prompt]):
                for _ in range(self.draw.randint(0, 2)):
                    await asyncio.sleep(0)
                if isinstance(output, Exception):
                    raise output
                if not params.extra_args:
                    for completion in output.outputs:
                        completion.sampling_mask = None
                self.num_given += 1
                yield output
        finally:
            self.num_open -= 1


def draw_prompt(draw: random.Random, num_choices: int, end: str | Exception) -> list:
    """The outputs of one prompt. A token is named after its temperature, in millionths."""
    outputs: list = []
    micros: list[list[int]] = [[] for _ in range(num_choices)]
    open_choices = set(range(num_choices))
    while open_choices:
        completions = []
        for index in sorted(draw.sample(sorted(open_choices), draw.randint(1, len(open_choices)))):
            last, begin = (micros[index] or [0])[-1], len(micros[index])
            new = [draw.choice([last, last, *MICROS]) for _ in range(draw.choice([0, 1, 1, 1, 3]))]
            text = draw.choice(TEXTS) + draw.choice(TEXTS)
            logprobs = [{micro: Logprob(-0.5, 1, text)} for micro in new]
            output = CompletionOutput(index, text, new, None, logprobs)
            if new and (begin == 0 or {last} != {*new}):
                output.sampling_mask = make_mask(new, begin)
            micros[index] += new
            if draw.random() < 0.15:
                output.finish_reason = draw.choice(["length", "stop"]) if end == "any" else end
                output.stop_reason = "b" if output.finish_reason == "stop" else None
                open_choices.remove(index)
            completions.append(output)
            if isinstance(output.finish_reason, Exception):
                return [*outputs, output.finish_reason]
        outputs.append(
            RequestOutput("r", "p", [1, 2, 3], [None] * 3, completions, not open_choices)
        )
        outputs[-1].num_cached_tokens = 2
    return outputs


def make_handler(handler_class, **attributes):
    handler = handler_class.__new__(handler_class)
    defaults = dict(
        parser_cls=None,
        response_role="assistant",
        return_tokens_as_token_ids=False,
        enable_auto_tools=False,
        enable_force_include_usage=False,
        enable_log_outputs=False,
        enable_log_deltas=True,
        request_logger=None,
        system_fingerprint="f",
        enable_prompt_tokens_details=True,
        enable_per_request_metrics=False,
        _include_reasoning_tokens_details=False,
        log_error_stack=False,
    )
    vars(handler).update(defaults | attributes)
    return handler


def open_stream(handler_class, engine, report=None, tokenizer=None, attributes=(), **options):
    """The generator of chunks, and the metadata in which vLLM leaves the usage."""
    handler = make_handler(handler_class, **dict(attributes))
    metadata = RequestResponseMetadata(request_id="r")
    is_chat = issubclass(handler_class, OpenAIServingChat)
    body = {"messages": MESSAGES} if is_chat else {"prompt": "Hi", "max_tokens": 9}
    cls = AdaptiveChatCompletionRequest if is_chat else AdaptiveCompletionRequest
    request = cls.model_validate(body | {"stream": True, "model": MODEL} | options)
    if report is not None:
        request.begin_report(report)
    set_current_report(report)
    # As vLLM's handlers do, which ask for the parameters again for each prompt.
    generators = [
        EngineProxy(engine).generate(prompt, request.to_sampling_params(9, {}), "r")
        for prompt in range(len(engine.prompts))
    ]
    if is_chat:
        (outputs,) = generators
        chunks = handler.chat_completion_stream_generator(
            request, outputs, "r", MODEL, MESSAGES, tokenizer, metadata
        )
    else:
        inputs, outputs = [{}] * len(engine.prompts), merge_async_iterators(*generators)
        chunks = handler.completion_stream_generator(
            request, inputs, outputs, "r", 0, MODEL, len(inputs), tokenizer, metadata
        )
    return chunks, metadata


async def write(*args, **kwargs):
    """The chunks, as a connection takes them, and the usage."""
    chunks, metadata = open_stream(*args, **kwargs)
    written = []
    async for chunk in chunks:
        written.append(chunk)
        # What else is ready runs before the next one.
        for _ in range(4):
            await asyncio.sleep(0)
    return written, metadata.final_usage_info


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(chat_serving.time, "time", lambda: 1700000000.5)


ROUTES = pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (AdaptiveServingChat, OpenAIServingChat),
        (AdaptiveServingCompletion, OpenAIServingCompletion),
    ],
)
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2},
        {"return_token_ids": True, "n": 3},
        {"logprobs": 1},
        {"echo": True, "n": 2},
    ],
    ids=str,
)
ENDS = ["any", "any", "abort", "error", RuntimeError("boom")]


def draw_engine(seed: int, is_chat: bool, num_choices: int, end="any") -> Engine:
    draw = random.Random(seed)
    # One of several prompts that fails ends the stream wherever the others are.
    num_prompts = 1 if is_chat or end in ("error", *ENDS[-1:]) else draw.choice([1, 1, 2, 3])
    prompts = [draw_prompt(draw, num_choices, end) for _ in range(num_prompts)]
    return Engine(prompts, draw)


def suit(options: dict, is_chat: bool) -> dict:
    """Options as the route takes them."""
    if is_chat and "logprobs" in options:
        return {"logprobs": True, "top_logprobs": 1}
    if is_chat and options.get("echo"):
        # Echoes the last message, which is one of the role that answers.
        return options | {"add_generation_prompt": False}
    return options


@ROUTES
@OPTIONS
async def test_streams_of_ordinary_requests_are_vllms(ours, stock, options):
    is_chat = stock is OpenAIServingChat
    options = suit(options, is_chat)
    for seed in range(15):
        end = random.Random(seed).choice(ENDS)
        engines = [draw_engine(seed, is_chat, options.get("n", 1), end) for _ in range(2)]
        found, expected = [
            list(await write(handler, engine, **options))
            for handler, engine in zip((ours, stock), engines, strict=True)
        ]
        if len(engines[0].prompts) > 1:
            # Merged prompts take turns as they may.
            found[0].sort(), expected[0].sort()
        assert found == expected
        assert len(expected[0]) > 1


@pytest.mark.parametrize(
    ("ours", "method"),
    [
        (AdaptiveServingChat, "chat_completion_stream_generator"),
        (AdaptiveServingChat, "chat_completion_stream_generator_raw"),
        (AdaptiveServingChat, "chat_completion_full_generator"),
        (AdaptiveServingCompletion, "completion_stream_generator"),
        (AdaptiveServingResponses, "responses_stream_generator"),
        (AdaptiveServingResponses, "responses_full_generator"),
    ],
)
def test_an_ordinary_request_gets_what_vllms_own_method_returns(ours, method):
    """Not something that behaves like it."""
    (stock,) = ours.__bases__
    if not hasattr(stock, method):
        pytest.skip("this release of vLLM has no such method")
    num_arguments = sum(
        parameter.default is parameter.empty
        for parameter in inspect.signature(getattr(stock, method)).parameters.values()
    )
    for request in (SimpleNamespace(), AdaptiveCompletionRequest(prompt="Hi")):
        made = getattr(make_handler(ours), method)(request, *[()] * (num_arguments - 2))
        code = getattr(made, "ag_code", None) or made.cr_code
        assert code is getattr(stock, method).__code__
        if inspect.iscoroutine(made):
            made.close()


def read(chunk: str) -> dict | None:
    return json.loads(chunk.removeprefix("data: ")) if chunk.startswith("data: {") else None


def take_adaptive(chunks: list[str]) -> tuple[list, dict[int, list[float]], dict[int, dict]]:
    """The chunks without `adaptive`; each choice's listed temperatures, and its summary.

    A summary stands twice on the chunk that ends a choice, and once more in the usage.
    """
    rest, listed, summaries = [], {}, {}
    for chunk in chunks:
        content = read(chunk)
        repeated = (content or {}).pop("adaptive", {})
        for choice in (content or {}).get("choices", ()):
            adaptive = choice.pop("adaptive", {})
            assert "adaptive" not in choice.get("delta", {})
            index = choice["index"]
            temperatures = adaptive.pop("temperatures", [])
            listed.setdefault(index, []).extend(temperatures)
            assert adaptive == repeated
            if adaptive:
                assert choice["finish_reason"] and index not in summaries
                summaries[index] = adaptive
            if temperatures and choice.get("token_ids") is not None:
                assert temperatures == [micro / 1e6 for micro in choice["token_ids"]]
            if "role" in choice.get("delta", {}):
                assert not temperatures
        if content and content.get("usage") and not content["choices"]:
            ordered = [summaries[index] for index in sorted(summaries)]
            wanted = ordered[0] if len(ordered) == 1 else ordered or None
            assert content["usage"].pop("adaptive", None) == wanted
        rest.append(content or chunk)
    return rest, listed, summaries


@ROUTES
@OPTIONS
@pytest.mark.parametrize("detail", ["none", "summary", "tokens"])
async def test_temperatures_are_added_to_the_chunk_of_their_tokens(ours, stock, options, detail):
    is_chat = stock is OpenAIServingChat
    options = suit(options, is_chat)
    num_choices = options.get("n", 1)
    for seed in range(10):
        engines = [draw_engine(seed, is_chat, num_choices) for _ in range(2)]
        report = make_report(
            {"report": detail}, num_choices=num_choices, takes_many_prompts=not is_chat
        )
        chunks, usage = await write(ours, engines[0], report, **options)
        expected, expected_usage = await write(stock, engines[1], **options)
        assert usage == expected_usage
        rest, listed, summaries = take_adaptive(chunks)
        assert sorted(map(str, rest)) == sorted(str(read(chunk) or chunk) for chunk in expected)
        if len(engines[0].prompts) == 1:
            assert rest == [read(chunk) or chunk for chunk in expected]
        micros: dict[int, list[int]] = {}
        for prompt, outputs in enumerate(engines[0].prompts):
            for output in (o for result in outputs for o in result.outputs):
                micros.setdefault(prompt * num_choices + output.index, []).extend(output.token_ids)
        is_listed = detail == "tokens"
        assert {index: values for index, values in listed.items() if values} == {
            index: [micro / 1e6 for micro in values]
            for index, values in micros.items()
            if is_listed and values
        }
        assert {index: found["tokens"] for index, found in summaries.items()} == {
            index: len(values) for index, values in micros.items() if detail != "none"
        }


@ROUTES
@pytest.mark.parametrize("end", ["error", RuntimeError("boom")], ids=str)
async def test_an_adaptive_stream_breaks_as_vllms_does(ours, stock, end):
    is_chat = stock is OpenAIServingChat
    for seed in range(10):
        engines = [draw_engine(seed, True, 2, end) for _ in range(2)]
        report = make_report({"report": "tokens"}, num_choices=2, takes_many_prompts=not is_chat)
        chunks, _ = await write(ours, engines[0], report, n=2)
        expected, _ = await write(stock, engines[1], n=2)
        rest, *_ = take_adaptive(chunks)
        assert rest == [read(chunk) or chunk for chunk in expected]
        assert "error" in rest[-2]


@ROUTES
@pytest.mark.parametrize("detail", ["none", "tokens"])
async def test_a_stream_repeats_the_alias_that_was_asked_for(ours, stock, detail):
    is_chat = stock is OpenAIServingChat
    report = make_report({"report": detail}, takes_many_prompts=not is_chat, alias="m:adaptive")
    options = {"stream_options": {"include_usage": True}}
    set_current_report(report)
    chunks, _ = await write(ours, draw_engine(3, True, 1), report, **options)
    names = {content["model"] for chunk in chunks if (content := read(chunk))}
    assert names == {"m:adaptive"}


class Parser:
    """Makes a delta of every second text, as a parser of tools or of reasoning may."""

    reasoning_parser = None
    tool_parser = None

    def __init__(self, *args, **kwargs):
        self.num_texts = 0

    def parse_delta(self, delta_text, finished, **kwargs):
        self.num_texts += 1
        return DeltaMessage(reasoning=delta_text) if self.num_texts % 2 or finished else None


@pytest.mark.parametrize("is_shown", [True, False])
async def test_tokens_that_a_parser_swallows_go_with_the_next_chunk(is_shown):
    outputs = [
        RequestOutput("r", "p", [1], None, [CompletionOutput(0, "a", [micro], None, None)], False)
        for micro in (0, 300_000, 0, 0, 0)
    ]
    for position, output in enumerate(outputs):
        output.outputs[0].sampling_mask = make_mask(output.outputs[0].token_ids, position)
    outputs[-1].outputs[0].finish_reason, outputs[-1].finished = "stop", True
    report = make_report({"report": "tokens"})
    parser = {"parser_cls": Parser, "_make_parser": Parser}
    chunks, _ = await write(
        AdaptiveServingChat,
        Engine([outputs]),
        report,
        tokenizer=object(),
        attributes=parser,
        include_reasoning=is_shown,
    )
    contents = [choice for chunk in chunks if read(chunk) for choice in read(chunk)["choices"]]
    listed = [choice.get("adaptive", {}).get("temperatures") for choice in contents]
    assert listed == ([None, [0.0], [0.3, 0.0], [0.0, 0.0]] if is_shown else [None] * 4)
    assert contents[-1]["adaptive"]["tokens"] == 5


@ROUTES
@pytest.mark.parametrize("detail", [None, "tokens"])
async def test_the_log_of_outputs_is_vllms(ours, stock, detail):
    """From 0.33 on, completions log their deltas, too."""
    logs = []
    for handler in (ours, stock):
        logged: list = []
        logger = SimpleNamespace(log_outputs=lambda to=logged, **fields: to.append(fields))
        report = None
        if detail and handler is ours:
            report = make_report({"report": detail}, takes_many_prompts=True)
        engine = draw_engine(3, True, 1)
        attributes = {"enable_log_outputs": True, "request_logger": logger}
        await write(handler, engine, report, attributes=attributes)
        logs.append(logged)
    assert logs[0] == logs[1]
    if HAS_CHUNK_OBJECTS or stock is OpenAIServingChat:
        deltas = [fields for fields in logs[0] if fields["delta"]]
        texts = [output.outputs[0].text for output in engine.prompts[0]]
        assert [fields["outputs"] for fields in deltas] == [text for text in texts if text]


@ROUTES
@pytest.mark.parametrize("detail", [None, "none", "summary", "tokens"])
async def test_a_stream_that_is_left_leaves_the_engine(ours, stock, detail):
    is_chat = stock is OpenAIServingChat
    engine = draw_engine(1, True, 1)
    engine.prompts[0] = [replace_end(output) for output in engine.prompts[0]] * 50
    report = None
    if detail is not None:
        report = make_report({"report": detail}, takes_many_prompts=not is_chat)
    chunks, _ = open_stream(ours, engine, report)
    for _ in range(5):
        await anext(chunks)
    await chunks.aclose()
    # What vLLM does not close itself, Python's finalizers do in a moment.
    for _ in range(5):
        await asyncio.sleep(0)
    assert engine.num_given < 7 and engine.num_open == 0


def replace_end(output: RequestOutput) -> RequestOutput:
    output = copy.deepcopy(output)
    output.finished = False
    output.outputs = [replace(done, finish_reason=None) for done in output.outputs]
    return output
