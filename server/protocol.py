"""Requests as clients send them: vLLM's own, with `temperature: "adaptive"` and `adaptive`."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PrivateAttr, model_validator
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from adaptive_head.options import EXTRA_ARGS_KEY, AdaptiveRequest, OptionError, parse_request, quote
from server.report import Report

ADAPTIVE = "adaptive"


class AdaptiveFields(BaseModel):
    """The two fields, and how they reach the engine. Mixed into each of vLLM's requests."""

    temperature: float | Literal["adaptive"] | None = Field(
        default=None,
        description='A number, "adaptive" to let the model choose, or null for the default.',
    )
    adaptive: AdaptiveRequest | None = Field(
        default=None, description='How to choose, with temperature "adaptive".'
    )
    # Whether vLLM generates several prompts of a request, or only one, in one or several turns.
    takes_many_prompts: ClassVar[bool] = False
    _report: Report | None = PrivateAttr(default=None)

    if TYPE_CHECKING:
        model: str | None

    @model_validator(mode="before")
    @classmethod
    def _check_adaptive(cls, data: Any) -> Any:
        if isinstance(data, dict):
            _check_temperature(data.get("temperature"))
            if data.get("adaptive") is not None:
                _check_options(data["adaptive"])
            xargs = data.get("vllm_xargs")
            if isinstance(xargs, dict) and EXTRA_ARGS_KEY in xargs:
                raise VLLMValidationError(
                    "use the request's own field `adaptive`",
                    parameter=f"vllm_xargs.{EXTRA_ARGS_KEY}",
                )
        return data

    def begin_report(self, report: Report) -> None:
        """Make the request adaptive. Its own temperature becomes 1, which vLLM leaves alone."""
        self._report = report
        self.temperature = 1.0

    @property
    def report(self) -> Report | None:
        """What will be said of the answer's temperatures; None for an ordinary request."""
        return self._report

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's conversion; an adaptive request's parameters carry its options."""
        params: SamplingParams = super().to_sampling_params(*args, **kwargs)  # type: ignore[misc]
        if (report := self._report) is not None:
            params.extra_args = {**(params.extra_args or {}), **report.extra_args}
        return params


class AdaptiveChatCompletionRequest(AdaptiveFields, ChatCompletionRequest):
    """`/v1/chat/completions`"""

    field_names: ClassVar[set[str] | None] = None


class AdaptiveCompletionRequest(AdaptiveFields, CompletionRequest):
    """`/v1/completions`"""

    takes_many_prompts: ClassVar[bool] = True
    field_names: ClassVar[set[str] | None] = None


class AdaptiveResponsesRequest(AdaptiveFields, ResponsesRequest):
    """`/v1/responses`"""

    field_names: ClassVar[set[str] | None] = None

    @model_validator(mode="before")
    @classmethod
    def _check_parts(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("input"), list):
            _check_no_refusal(data["input"])
        return data


class AdaptiveMessagesRequest(AdaptiveFields, AnthropicMessagesRequest):
    """`/v1/messages`, which vLLM answers as a chat"""


class AdaptiveBatchRequest(AdaptiveFields, BatchChatCompletionRequest):
    """`/v1/chat/completions/batch`, of which vLLM makes a chat for each conversation"""

    takes_many_prompts: ClassVar[bool] = True
    field_names: ClassVar[set[str] | None] = None

    def to_chat_completion_request(self, messages: list[Any]) -> ChatCompletionRequest:
        # Without a field that a chat of vLLM's own does not have.
        bare = self.model_copy(update={"adaptive": None})
        chat = BatchChatCompletionRequest.to_chat_completion_request(bare, messages)
        return carry_options(chat, self._report)


def carry_options(chat: ChatCompletionRequest, report: Report | None) -> ChatCompletionRequest:
    """Let a chat that vLLM has made of an adaptive request carry its options.

    Its temperature is that of the request: 1, which vLLM leaves alone.
    """
    if report is not None:
        chat.vllm_xargs = {**(chat.vllm_xargs or {}), **report.extra_args}
    return chat


def _check_temperature(value: Any) -> None:
    if value is None or value == ADAPTIVE:
        return
    try:
        # As vLLM does, take a number that comes as a string.
        is_number = not isinstance(value, bool | list | dict) and math.isfinite(float(value))
    except (ValueError, OverflowError):
        is_number = False
    if not is_number:
        raise VLLMValidationError(
            f'temperature must be a finite number, "adaptive" or null, got {quote(value)}',
            parameter="temperature",
        )


def _check_options(value: Any) -> None:
    try:
        parse_request(value)
    except OptionError as error:
        raise invalid_option(error) from None


def _check_no_refusal(items: list[Any]) -> None:
    # vLLM's types take such a part, and its conversion to a chat fails over it.
    for index, item in enumerate(items):
        content = item.get("content") if isinstance(item, dict) else None
        for position, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("type") == "refusal":
                raise VLLMValidationError(
                    "a refusal cannot be passed to the model; send its text as output_text",
                    parameter=f"input.{index}.content.{position}",
                )


def invalid_option(error: OptionError) -> VLLMValidationError:
    """The 400 for an option that cannot be served; `param` is its path in the body."""
    # A client may send a field whose name is megabytes long.
    path = ".".join(filter(None, (ADAPTIVE, error.field)))[:100]
    return VLLMValidationError(f"{path}: {error}", parameter=path)
