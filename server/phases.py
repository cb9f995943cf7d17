"""Where an answer begins in its prompt, which the phases of `two_phase` begin with.

A chat template ends a prompt with the beginning of the answer: a role, an opening or an empty
`<think></think>`, the text of a message that the model is to continue. A marker there is as good as
one that the model writes; elsewhere in the prompt it is part of an example or an earlier turn.
"""

from asyncio import get_running_loop
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, TypeVar

from vllm.exceptions import VLLMValidationError
from vllm.renderers import BaseRenderer
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams

from adaptive_head.options import EXTRA_ARGS_KEY
from server.report import Report, current_report

# How many of a beginning's first tokens may differ in the whole prompt, which has more before them.
MAX_UNLIKE = 2
# Characters before a beginning that are tokenized with it: a token may begin in one of them.
_CONTEXT = 64
Rendering = TypeVar("Rendering", str, list[int])
Tokenize = Callable[[str], list[int]]


def find_beginnings(renderer: BaseRenderer, tokenize: Tokenize) -> None:
    """Let a renderer note on a two-phase request's report how each of its answers begins.

    Tokenizers that come without a chat template, such as Mistral's, say nothing of that: nothing of
    their prompts counts.
    """
    if isinstance(renderer, HfRenderer):
        templates = Templates(renderer, tokenize)
        renderer._apply_chat_template_async = templates.render


class Templates:
    """Stands before a renderer's chat template.

    Args:
        tokenize: the text without special tokens around it.
    """

    def __init__(self, renderer: HfRenderer, tokenize: Tokenize) -> None:
        self._render = renderer._apply_chat_template_async
        self._executor = renderer._executor
        self._tokenize = tokenize
        tokenizer = renderer.get_tokenizer()
        max_len = renderer.model_config.max_model_len
        self._max_chars = max_len * getattr(tokenizer, "max_chars_per_token", 1)

    async def render(
        self, model_config: Any, tokenizer: Any, conversation: list[Any], **options: Any
    ) -> Any:
        """The prompt, as vLLM renders it: its text, or its token ids."""
        render = partial(self._render, model_config, tokenizer)
        prompt = await render(conversation, **options)
        report = current_report()
        if report is None or report.options.policy != "two_phase":
            return prompt
        is_continued = options.get("continue_final_message", False)
        if not (is_continued or options.get("add_generation_prompt", False)):
            return prompt
        earlier = conversation[:-1] if is_continued else conversation
        changes = {"add_generation_prompt": False, "continue_final_message": False}
        try:
            before = await render(earlier, **options | changes) if earlier else prompt[:0]
        except VLLMValidationError:
            # A template need not know a conversation that nobody continues.
            return prompt
        beginning = await self._find_beginning(prompt, before)
        # The conversations of a batch often have the same.
        if beginning not in report.beginnings:
            report.beginnings.append(beginning)
        return prompt

    async def _find_beginning(self, prompt: Rendering, before: Rendering) -> list[int]:
        """The tokens that a prompt has after those that it shares with `before`."""
        if isinstance(prompt, str):
            run = partial(get_running_loop().run_in_executor, self._executor)
            return await run(self._read_beginning, prompt, before)
        return prompt[count_common(prompt, before) :]

    def _read_beginning(self, prompt: str, before: str) -> list[int]:
        num_common = count_common(prompt, before)
        # No more than fits the model: vLLM refuses or cuts what is longer.
        start = max(0, num_common - _CONTEXT, len(prompt) - self._max_chars)
        tokens = self._tokenize(prompt[start:])
        return tokens[count_common(tokens, self._tokenize(before[start : num_common + _CONTEXT])) :]


def count_common(first: Rendering, second: Rendering) -> int:
    """How long the beginning is that two renderings share."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def count_written(prompt_token_ids: Sequence[int], beginnings: Sequence[list[int]]) -> int:
    """How many of a prompt's last tokens are the beginning of its answer: the longest that fits.

    A prompt that was cut at its end has none. One that was cut at its start may be nothing else.
    """
    prompt, longest = list(prompt_token_ids), 0
    for beginning in beginnings:
        max_alike = min(len(beginning), len(prompt))
        # As a whole: there may be hundreds of prompts and beginnings, of thousands of tokens.
        num_alike = max(0, min(len(beginning) - MAX_UNLIKE, len(prompt)))
        if prompt[len(prompt) - num_alike :] != beginning[len(beginning) - num_alike :]:
            continue
        while num_alike < max_alike and prompt[-1 - num_alike] == beginning[-1 - num_alike]:
            num_alike += 1
        longest = max(longest, num_alike)
    return longest


def mark_beginning(params: SamplingParams, prompt: Any, report: Report | None) -> SamplingParams:
    """The sampling parameters of one prompt of a two-phase request, which say where it begins.

    A copy: with tool calls, the next turn is generated with the same parameters.
    """
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if report is None or not token_ids:
        return params
    if not (num_written := count_written(token_ids, report.beginnings)):
        return params
    params, extra_args = copy(params), params.extra_args or {}
    options = extra_args[EXTRA_ARGS_KEY] | {"num_written": num_written}
    params.extra_args = extra_args | {EXTRA_ARGS_KEY: options}
    return params
