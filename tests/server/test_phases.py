"""What of a prompt counts for the phase that a two-phase answer begins with."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.sampling_params import SamplingParams

from adaptive_head.embedded_model import prepare
from adaptive_head.options import EXTRA_ARGS_KEY, Options
from server.engine_proxy import EngineProxy
from server.phases import count_common, count_written, find_beginnings
from server.report import set_current_report
from tests.server.conftest import CHAT_TEMPLATE, MODEL
from tests.server.fakes import make_report

EXAMPLE = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>One more.</think>2"},
    {"role": "user", "content": "2 + 2?"},
]
CONTINUED = [*EXAMPLE, {"role": "assistant", "content": "<think>Two"}]
ANSWERED = [*EXAMPLE, {"role": "assistant", "content": "<think>Two more.</think>4"}]
# Of a template that closes a conversation which nobody continues.
CLOSED = CHAT_TEMPLATE + "{% if not add_generation_prompt %}</s></think>{% endif %}"
OPENED = CHAT_TEMPLATE.rstrip() + "{% if add_generation_prompt %}<think>\n{% endif %}"
CAREFUL = "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(prepare())


@pytest.fixture
def renderer(tokenizer):
    """vLLM's renderer, as far as it renders templates."""
    model_config = SimpleNamespace(max_model_len=2048, trust_remote_code=False, model="m")
    with ThreadPoolExecutor(1) as executor:
        renderer = HfRenderer.__new__(HfRenderer)
        vars(renderer).update(
            tokenizer=tokenizer, model_config=model_config, config=None, _executor=executor
        )

        async def render(model_config, tokenizer, conversation, **options):
            return safe_apply_chat_template(model_config, tokenizer, conversation, **options)

        renderer._apply_chat_template_async = render
        find_beginnings(renderer, lambda text: tokenizer.encode(text, add_special_tokens=False))
        yield renderer


def render(renderer, conversation, template=CHAT_TEMPLATE, tokenize=False, **options):
    """A prompt's text or token ids, rendered for the current request."""
    choice = {"add_generation_prompt": not options.get("continue_final_message", False)}
    return asyncio.run(
        renderer._apply_chat_template_async(
            renderer.model_config,
            renderer.tokenizer,
            conversation,
            chat_template=template,
            tokenize=tokenize,
            **choice | options,
        )
    )


def begin(policy="two_phase", report="summary"):
    report = make_report({"policy": policy, "report": report})
    set_current_report(report)
    return report


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("conversation", "options", "beginning"),
    [
        (EXAMPLE, {}, "<|im_start|>assistant\n"),
        (EXAMPLE, {"enable_thinking": False}, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (EXAMPLE, {"template": OPENED}, "<|im_start|>assistant\n<think>\n"),
        (EXAMPLE, {"template": CLOSED}, "<|im_start|>assistant\n"),
        (CONTINUED, {"continue_final_message": True}, "<|im_start|>assistant\n<think>Two"),
        (
            ANSWERED,
            {"continue_final_message": True},
            "<|im_start|>assistant\n<think>Two more.</think>4",
        ),
        (CONTINUED[-1:], {"continue_final_message": True}, "<|im_start|>assistant\n<think>Two"),
    ],
)
def test_a_beginning_is_what_the_template_adds(
    renderer, tokenizer, conversation, options, beginning, tokenize
):
    report = begin()
    prompt = render(renderer, conversation, tokenize=tokenize, **options)
    text = tokenizer.decode(prompt) if tokenize else prompt
    assert text.endswith(beginning)
    token_ids = prompt if tokenize else tokenizer.encode(prompt, add_special_tokens=False)
    num_written = count_written(token_ids, report.beginnings)
    assert tokenizer.decode(token_ids[len(token_ids) - num_written :]) == beginning


@pytest.mark.parametrize(
    "options", [{"add_generation_prompt": False}, {"template": CAREFUL}], ids=str
)
def test_where_the_template_adds_nothing_or_says_nothing_nothing_counts(renderer, options):
    report = begin()
    assert "1 + 1?" in render(renderer, EXAMPLE, **options)
    assert not report.beginnings


def test_conversations_that_begin_alike_count_once(renderer):
    report = begin()
    for _ in range(3):
        render(renderer, EXAMPLE)
    assert len(report.beginnings) == 1


def test_only_two_phase_requests_render_twice(renderer):
    rendered = []
    original = renderer._apply_chat_template_async.__self__._render

    async def count(*args, **options):
        rendered.append(options)
        return await original(*args, **options)

    renderer._apply_chat_template_async.__self__._render = count
    render(renderer, EXAMPLE)
    assert not begin("entropy").beginnings
    render(renderer, EXAMPLE)
    assert len(rendered) == 2
    begin()
    render(renderer, EXAMPLE)
    assert len(rendered) == 4


def test_what_a_template_refuses_is_refused(renderer):
    begin()
    with pytest.raises(VLLMValidationError, match="no"):
        render(renderer, EXAMPLE, template="{{ raise_exception('no') }}")


@settings(deadline=None, derandomize=True, database=None)
@given(st.text("ab"), st.text("ab"))
def test_a_common_beginning_is_as_long_as_can_be(first, second):
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    assert count_common(first, second) == len(list(alike))
    assert count_common(list(first), list(second)) == count_common(first, second)


@pytest.mark.parametrize(
    ("prompt", "beginnings", "num_written"),
    [
        ([1, 2, 3, 4], [], 0),
        ([1, 2, 3, 4], [[3, 4]], 2),
        # The longest, of several chats or of a template that was tried in several ways.
        ([1, 2, 3, 4], [[3, 4], [2, 3, 4], [4]], 3),
        # Its first tokens may have become others behind the text before it.
        ([1, 2, 3, 4, 5, 6], [[9, 3, 4, 5, 6]], 4),
        # Cut at its end, and at its start.
        ([1, 2, 3, 4], [[3, 4, 5, 6]], 0),
        ([1, 2, 4], [[3, 4, 5, 6, 4]], 0),
        ([5, 6], [[1, 2, 3, 4, 5, 6]], 2),
        ([1, 2, 3], [[3]], 1),
        ([1, 2, 3], [[4]], 0),
        ([1, 2, 3], [[7, 8, 9]], 0),
        ([1, 2, 3], [[]], 0),
    ],
)
def test_a_beginning_counts_where_the_prompt_ends_with_it(prompt, beginnings, num_written):
    assert count_written(prompt, beginnings) == num_written


def test_every_turn_of_a_request_says_how_its_own_answer_begins():
    """A later turn has another prompt and the same parameters."""
    calls = []
    engine = SimpleNamespace(generate=lambda prompt, params, *_: calls.append(params))
    report = begin()
    params = SamplingParams(extra_args={"other": 1} | report.extra_args)
    report.beginnings.append([8, 9])
    for token_ids in ([1, 8, 9], [1, 8, 9, 2, 2], [8, 9, 8, 9]):
        EngineProxy(engine).generate({"prompt_token_ids": token_ids}, params, "id")
    EngineProxy(engine).generate({"prompt_embeds": ...}, params, "id")
    options = [Options.from_extra_args(params.extra_args) for params in calls]
    assert [one.num_written for one in options] == [2, 0, 2, 0]
    assert all(params.extra_args["other"] == 1 for params in calls)
    assert params.extra_args[EXTRA_ARGS_KEY] == report.extra_args[EXTRA_ARGS_KEY]


TWO_PHASE = {"thinking": 1.2, "answer": 0.4}
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}
FINAL = {"continue_final_message": True, "add_generation_prompt": False}


def ask(server, path, **body) -> dict:
    adaptive = {"policy": "two_phase", "two_phase": TWO_PHASE | body.pop("two_phase", {})}
    common = {"model": MODEL, "temperature": "adaptive", "adaptive": adaptive}
    response = server.post(path, common | body)
    assert response.is_success, response.text
    return response.json()


@pytest.mark.parametrize(
    ("body", "first"),
    [
        ({"messages": EXAMPLE}, 1.2),
        ({"messages": EXAMPLE, "n": 2}, 1.2),
        # A marker that stands in every chat.
        ({"messages": EXAMPLE[:1], "two_phase": {"marker": "<|im_end|>"}}, 1.2),
        ({"messages": EXAMPLE} | QUIET, 0.4),
        ({"messages": EXAMPLE, "truncate_prompt_tokens": 16} | QUIET, 0.4),
        ({"messages": CONTINUED} | FINAL, 1.2),
        ({"messages": ANSWERED} | FINAL, 0.4),
    ],
)
def test_a_chat_begins_with_the_phase_of_its_generation_prompt(mock_server, body, first):
    answer = ask(mock_server, "/v1/chat/completions", max_tokens=4, **body)
    for choice in answer["choices"]:
        assert choice["adaptive"]["mean"] == first


@pytest.mark.parametrize("prompt", ["<think>Hm.</think>", ["a</think>", "</think>"]])
def test_a_completion_begins_with_thinking(mock_server, prompt):
    for choice in ask(mock_server, "/v1/completions", prompt=prompt, max_tokens=4)["choices"]:
        assert choice["adaptive"]["mean"] == 1.2


@pytest.mark.parametrize(("options", "first"), [({}, 1.2), (QUIET, 0.4)])
def test_a_response_begins_with_the_phase_of_its_generation_prompt(mock_server, options, first):
    body = {"input": EXAMPLE, "max_output_tokens": 4}
    answer = ask(mock_server, "/v1/responses", **body, **options)
    assert answer["adaptive"]["mean"] == first
