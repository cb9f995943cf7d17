"""Plain streams are vLLM's, byte for byte, though vLLM writes only their first and last chunks."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaMessage, RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput

from server.handlers import AdaptiveServingChat, AdaptiveServingCompletion
from server.protocol import AdaptiveChatCompletionRequest, AdaptiveCompletionRequest
from server.text_stream import is_plain
from tests.server.fakes import make_mask, make_report

# A name that looks like all that is searched for.
MODEL = 'm","choices":[{"index":7,"text":"a","content":"a","finish_reason":"stop"'
TEXTS = ["a", "", '"', "\\", "\n\t\r\b\f", "\x00\x1f\x7f", "é\u2028😀", '","finish_reason":"stop"']
MICROS = [0, 300_000, 1_000_000]


@dataclass
class Answer:
    """What the engine makes of a request.

    Attributes:
        outputs: the text of each, and its tokens' temperatures in millionths.
        end: what the last output says, or the error in its place.
    """

    outputs: list[tuple[str, list[int]]]
    end: str | Exception = "length"
    report: object = None
    num_given: int = field(default=0, init=False)

    async def generate(self, is_chat, reader):
        micros = [micro for _, new in self.outputs for micro in new]
        begin = 0
        for position, (text, new) in enumerate(self.outputs):
            is_last = position == len(self.outputs) - 1
            if is_last and isinstance(self.end, Exception):
                raise self.end
            output = CompletionOutput(0, text, [5] * len(new), None, None)
            output.finish_reason = self.end if is_last else None
            output.stop_reason = "b" if output.finish_reason == "stop" else None
            if reader is not None and new and (begin == 0 or {micros[begin - 1]} != {*new}):
                output.sampling_mask = make_mask(new, begin)
            begin += len(new)
            result = RequestOutput("r", "p", [1, 2, 3], None, [output], is_last)
            result.num_cached_tokens = 2
            if reader is not None:
                reader.read(result)
            yield result if is_chat else (0, result)
            self.num_given += 1
            await asyncio.sleep(0)


def draw_answer(draw: random.Random) -> Answer:
    outputs = []
    last = 0
    for _ in range(draw.randint(1, 9)):
        new = [draw.choice([last, last, *MICROS]) for _ in range(draw.choice([0, 1, 1, 1, 3]))]
        last = new[-1] if new else last
        outputs.append((draw.choice(TEXTS) + draw.choice(TEXTS), new))
    end = draw.choice(["length", "stop", "abort", "error", RuntimeError("boom")])
    return Answer(outputs, end)


def make_handler(handler_class, attributes):
    handler = handler_class.__new__(handler_class)
    defaults = dict(
        parser_cls=None,
        response_role="assistant",
        enable_force_include_usage=False,
        enable_log_outputs=False,
        request_logger=None,
        system_fingerprint="f",
        enable_prompt_tokens_details=True,
        enable_per_request_metrics=False,
        _include_reasoning_tokens_details=False,
        log_error_stack=False,
    )
    vars(handler).update(defaults | attributes)
    return handler


def adapt(request, answer):
    if answer.report is not None:
        request.begin_report(answer.report)
    return request


async def write(
    handler_class,
    answer: Answer,
    *,
    leave_after=None,
    tokenizer=None,
    attributes=MappingProxyType({}),
    **options,
):
    """The chunks, and the usage that vLLM leaves for its middleware."""
    is_chat = issubclass(handler_class, OpenAIServingChat)
    handler = make_handler(handler_class, attributes)
    metadata = RequestResponseMetadata(request_id="r")
    reader = answer.report and answer.report.begin_prompt()
    outputs = answer.generate(is_chat, reader)
    if is_chat:
        messages = [{"role": "user", "content": "Hi"}]
        fields = {"messages": messages, "stream": True} | options
        request = adapt(AdaptiveChatCompletionRequest.model_validate(fields), answer)
        chunks = handler.chat_completion_stream_generator(
            request, outputs, "r", MODEL, messages, tokenizer, metadata
        )
    else:
        fields = {"prompt": "Hi", "max_tokens": 9, "stream": True} | options
        request = adapt(AdaptiveCompletionRequest.model_validate(fields), answer)
        chunks = handler.completion_stream_generator(
            request, [{}], outputs, "r", 0, MODEL, 1, None, metadata
        )
    written = []
    async for chunk in chunks:
        written.append(chunk)
        if len(written) == leave_after:
            await chunks.aclose()
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


@ROUTES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"return_token_ids": True},
        {"n": 1},
    ],
)
async def test_streams_are_vllms(ours, stock, options):
    draw = random.Random(0)
    for seed in range(60):
        answers = [draw_answer(random.Random(seed)) for _ in range(2)]
        if draw.random() < 0.5 and answers[0].outputs[0][1]:
            # The case that all is for.
            for answer in answers:
                answer.outputs = [(text, new or [5]) for text, new in answer.outputs]
        assert await write(ours, answers[0], **options) == await write(stock, answers[1], **options)


@pytest.fixture
def seen(monkeypatch):
    """The chunks that vLLM itself writes for a chat or a completion."""
    seen = []

    def spy(stock, name):
        whole = getattr(stock, name)

        async def generate(*args, **kwargs):
            async for chunk in whole(*args, **kwargs):
                seen.append(chunk)
                yield chunk

        monkeypatch.setattr(stock, name, generate)

    spy(OpenAIServingChat, "chat_completion_stream_generator")
    spy(OpenAIServingCompletion, "completion_stream_generator")
    return seen


@ROUTES
async def test_vllm_writes_only_the_beginning_and_the_end(ours, stock, seen):
    chunks, usage = await write(ours, Answer([("a", [0])] * 50))
    num_opening = 2 if stock is OpenAIServingChat else 1
    assert len(chunks) == 50 + num_opening
    assert seen == [*chunks[:num_opening], *chunks[-2:]]
    assert usage.completion_tokens == 50


class Parser:
    """Makes a delta of every text, as a parser of tools or of reasoning does."""

    def __init__(self, *args, **kwargs):
        pass

    def parse_delta(self, delta_text, **kwargs):
        return DeltaMessage(reasoning=delta_text)


async def test_where_a_parser_or_a_log_reads_the_deltas_vllm_writes_all(seen):
    logged = []
    logger = SimpleNamespace(log_outputs=lambda **fields: logged.append(fields["outputs"]))
    log = {"enable_log_outputs": True, "enable_log_deltas": True, "request_logger": logger}
    chunks, _ = await write(AdaptiveServingChat, Answer([("a", [0])] * 9), attributes=log)
    assert seen == chunks
    assert logged == [*"a" * 9, "a" * 9]
    seen.clear()
    parser = {"parser_cls": Parser, "_make_parser": Parser}
    answer = Answer([("a", [0])] * 9)
    chunks, _ = await write(AdaptiveServingChat, answer, tokenizer=object(), attributes=parser)
    assert seen == chunks
    assert sum('"reasoning":"a"' in chunk for chunk in chunks) == 9


@ROUTES
@pytest.mark.parametrize("detail", ["none", "summary", "tokens"])
async def test_temperatures_are_added_and_nothing_else(ours, stock, detail):
    for seed in range(60):
        answer, plain = (draw_answer(random.Random(seed)) for _ in range(2))
        report = make_report({"report": detail})
        answer.report = report
        if isinstance(answer.end, Exception) or answer.end == "error":
            answer.end = plain.end = "length"
        chunks, usage = await write(ours, answer)
        wanted, wanted_usage = await write(stock, plain)
        assert usage == wanted_usage
        listed, summary = [], None
        for position, chunk in enumerate(chunks[:-1]):
            content = json.loads(chunk.removeprefix("data: "))
            adaptive = content["choices"][0].pop("adaptive", None)
            text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
            chunks[position] = f"data: {text}\n\n"
            if adaptive is not None:
                listed += adaptive.get("temperatures", [])
                summary = adaptive if "histogram" in adaptive else summary
        assert chunks == wanted
        micros = [micro for _, new in answer.outputs for micro in new]
        assert listed == ([micro / 1e6 for micro in micros] if detail == "tokens" else [])
        if detail == "none":
            assert summary is None
        elif micros:
            assert summary["tokens"] == len(micros)


@ROUTES
async def test_a_stream_that_is_left_goes_no_further(ours, stock):
    answer = Answer([("a", [0])] * 50)
    chunks, _ = await write(ours, answer, leave_after=7)
    assert len(chunks) == 7
    assert answer.num_given < 8


@pytest.mark.parametrize(
    ("request_class", "options", "is_usage_forced", "expected"),
    [
        (AdaptiveChatCompletionRequest, {}, False, True),
        (AdaptiveChatCompletionRequest, {"n": 2}, False, False),
        (AdaptiveChatCompletionRequest, {"logprobs": True}, False, False),
        (AdaptiveChatCompletionRequest, {"logprobs": False}, False, True),
        (AdaptiveChatCompletionRequest, {"echo": True}, False, False),
        (AdaptiveChatCompletionRequest, {"return_token_ids": True}, False, False),
        (AdaptiveChatCompletionRequest, {}, True, False),
        (AdaptiveCompletionRequest, {}, False, True),
        (AdaptiveCompletionRequest, {"logprobs": 0}, False, False),
        (AdaptiveCompletionRequest, {"n": 2}, False, False),
        (AdaptiveCompletionRequest, {"echo": True}, False, False),
    ],
)
def test_plain_is_one_answer_of_which_only_the_text_is_told(
    request_class, options, is_usage_forced, expected
):
    content = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "stream": True}
    request = request_class.model_validate(content | options)
    assert is_plain(request, is_usage_forced) is expected
