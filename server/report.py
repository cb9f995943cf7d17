"""What an answer says of its temperatures, gathered while the engine generates it."""

from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from adaptive_head.decision import MILLION, Decision
from adaptive_head.options import EXTRA_ARGS_KEY, Options, ReportDetail
from adaptive_head.summary import bin_temperatures, mean_of, summarise
from adaptive_head.vllm.wire import DecisionReader
from server.heads import ServedHead
from server.metrics import AdaptiveMetrics

_MAX_UNCOUNTED_TOKENS = 32
_CURRENT: ContextVar["Report | None"] = ContextVar("current_report", default=None)


class ChoiceReport:
    """The temperatures of one answer (one `choice` of a response).

    Attributes:
        num_abstained: how many tokens got the head's fallback.
        num_given: how many tokens vLLM has been given to make chunks of; None where these are all
            that have been read.
    """

    def __init__(self, options: Options, detail: ReportDetail, is_override: bool) -> None:
        self._options = options
        self._is_override = is_override
        self._has_list = detail == "tokens"
        self._reader = DecisionReader()
        # By temperature (millionths): all tokens so far, and those that no metric has counted.
        self._num_tokens: dict[int, int] = {}
        self._uncounted: dict[int, int] = {}
        # Tokens like the one before them, which are in neither.
        self._num_repeats = 0
        self.num_abstained = 0
        self.num_given: int | None = None
        # Of each token, where they are to be listed.
        self._temperatures: list[float] = []
        # Until another token comes. An answer shows it twice and more.
        self._summary: dict[str, Any] | None = None
        self._num_sent = 0

    @property
    def num_tokens(self) -> Mapping[int, int]:
        """How many tokens there are so far at each temperature (millionths)."""
        self._settle()
        return self._num_tokens

    def restart(self) -> None:
        """Begin to generate; with tool calls, more than once per answer."""
        self._settle()
        self._reader.restart()

    def read(self, completion: CompletionOutput) -> None:
        """Take the temperatures off an output."""
        if completion.sampling_mask is None:
            # Most tokens: to add them up until somebody asks costs a fraction.
            num_tokens = len(completion.token_ids)
            self._num_repeats += num_tokens
            if self._has_list:
                self._temperatures += self._temperatures[-1:] * num_tokens
            return
        self._settle()
        for decision, count in self._reader.read(completion):
            self._count(decision, count)
            if self._has_list:
                self._temperatures += [decision.temperature / MILLION] * count

    def take_uncounted(self) -> Mapping[int, int]:
        """Tokens by temperature (millionths) that have come since the last call."""
        self._settle()
        uncounted, self._uncounted = self._uncounted, {}
        return uncounted

    def _settle(self) -> None:
        if num_repeats := self._num_repeats:
            self._num_repeats = 0
            self._count(self._reader.repeat(num_repeats), num_repeats)

    def _count(self, decision: Decision, count: int) -> None:
        self._summary = None
        micro = decision.temperature
        for num_tokens in (self._num_tokens, self._uncounted):
            num_tokens[micro] = num_tokens.get(micro, 0) + count
        if decision.flags and decision.has_abstained:
            self.num_abstained += count

    def take_ready(self) -> list[float]:
        """Temperatures of the tokens that are in the response and not yet reported."""
        first = self._num_sent
        num_ready = self.num_given
        self._num_sent = end = len(self._temperatures) if num_ready is None else num_ready
        return self._temperatures[first:end]

    def describe(self, show_tokens: bool) -> dict[str, Any]:
        """The `adaptive` object of a finished answer.

        Args:
            show_tokens: whether to list the temperature of every token.
        """
        self._settle()
        if self._summary is None:
            self._summary = describe_tokens(
                self._options, self._num_tokens, self.num_abstained, self._is_override
            ) | {
                "tokens": sum(self._num_tokens.values()),
                "histogram": bin_temperatures(self._options, self._num_tokens),
            }
        return self._summary | ({"temperatures": self._temperatures[:]} if show_tokens else {})


class Report:
    """The temperatures of a whole response: `num_choices` answers for each of its prompts.

    Args:
        takes_many_prompts: whether each call of the engine generates the next prompt's answers, as
            for `/v1/completions`. Otherwise each continues the one prompt's, as after a tool call.
        head: chooses the temperatures; None for a policy without one.
        is_override: whether the options are the operator's and not those of the request.
        alias: the name that the request gives the model, where vLLM's own differs and answers are
            to repeat it.

    Attributes:
        extra_args: the options as the sampling parameters of each of its prompts carry them.
        beginnings: how the answers to its chats begin, token ids; see `server.phases`.
    """

    def __init__(
        self,
        options: Options,
        detail: ReportDetail,
        num_choices: int,
        metrics: AdaptiveMetrics,
        *,
        takes_many_prompts: bool = False,
        head: ServedHead | None = None,
        is_override: bool = False,
        alias: str | None = None,
    ) -> None:
        self.options = options
        self.detail = detail
        self.is_override = is_override
        self.alias = alias
        self.extra_args = options.to_extra_args()
        self.beginnings: list[list[int]] = []
        self._num_choices = num_choices
        self._metrics = metrics
        self._takes_many_prompts = takes_many_prompts
        self._head = head
        self._choices: list[ChoiceReport] = []
        self._prompts: list[PromptReport] = []

    def begin_prompt(self) -> "PromptReport":
        """Return the report of what the engine is about to generate."""
        if self._takes_many_prompts or not self._prompts:
            choices = [
                ChoiceReport(self.options, self.detail, self.is_override)
                for _ in range(self._num_choices)
            ]
            self._choices += choices
            self._prompts.append(PromptReport(self, choices, self._metrics))
        return self._prompts[-1]

    def __getitem__(self, index: int) -> ChoiceReport:
        """The report of the response's choice `index`."""
        return self._choices[index]

    @property
    def num_begun(self) -> int:
        """How many answers the engine has begun to generate."""
        return len(self._choices)

    @property
    def mean(self) -> float | None:
        """The mean temperature of all answers' tokens; None without any."""
        num_tokens: Counter[int] = Counter()
        for prompt in self._prompts:
            prompt.count_into(num_tokens)
        return mean_of(num_tokens)

    def describe(self) -> dict[str, Any] | list[dict[str, Any]]:
        """The summary of the only answer, or a list of those of all answers in their order."""
        summaries = [choice.describe(show_tokens=False) for choice in self._choices]
        return summaries[0] if len(summaries) == 1 else summaries

    async def follow(
        self, outputs: AsyncGenerator[tuple[int, RequestOutput], None]
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Count the tokens of several prompts as vLLM's generator of chunks takes them.

        vLLM's merging of prompts reads one output ahead of the chunk that is being sent, so more
        has been read from the engine than is in the response.
        """
        async with aclosing(outputs):
            async for prompt, output in outputs:
                for completion in output.outputs:
                    choice = self[prompt * self._num_choices + completion.index]
                    choice.num_given = (choice.num_given or 0) + len(completion.token_ids)
                yield prompt, output

    def hold(self) -> None:
        """Keep the head in the workers until `release` has been called as often."""
        if self._head is not None:
            self._head.num_holders += 1

    def release(self) -> None:
        """Let go of the head, and count what was read: nobody may close a stream that is left."""
        if self._head is not None:
            self._head.num_holders -= 1
        for prompt in self._prompts:
            prompt.flush()

    @contextmanager
    def held(self) -> Iterator[None]:
        """`hold`, and `release` at the end."""
        self.hold()
        try:
            yield
        finally:
            self.release()


class PromptReport:
    """Reads the engine's outputs for one prompt."""

    def __init__(
        self, report: Report, choices: list[ChoiceReport], metrics: AdaptiveMetrics
    ) -> None:
        self.options = report.options
        self.detail = report.detail
        self.is_override = report.is_override
        self._choices = choices
        self._metrics = metrics
        self._num_abstained_counted = 0
        self._num_uncounted = 0

    def begin(self) -> None:
        """Note that the prompt is being handed to the engine, which may still refuse it."""
        self._metrics.count_request(self.options)
        for choice in self._choices:
            choice.restart()

    def read(self, output: RequestOutput) -> None:
        """Take the temperatures off an output, count them, and remember them."""
        for completion in output.outputs:
            choice = self._choices[completion.index]
            choice.read(completion)
            self._num_uncounted += len(completion.token_ids)
            is_whole = completion.finish_reason not in (None, "abort")
            if is_whole and (mean := mean_of(choice.num_tokens)) is not None:
                self._metrics.count_answer(self.options, mean)
        if self._num_uncounted >= _MAX_UNCOUNTED_TOKENS or output.finished:
            self.flush()

    def count_into(self, num_tokens: Counter[int]) -> None:
        """Add how many tokens there are at each temperature (millionths), of all choices."""
        for choice in self._choices:
            num_tokens.update(choice.num_tokens)

    @property
    def num_abstained(self) -> int:
        """How many tokens of all choices got the head's fallback."""
        return sum(choice.num_abstained for choice in self._choices)

    def flush(self) -> None:
        """Move what has been counted into the metrics."""
        if not self._num_uncounted:
            return
        self._num_uncounted = 0
        for choice in self._choices:
            if uncounted := choice.take_uncounted():
                self._metrics.count_tokens(self.options, uncounted)
        if (num_new := self.num_abstained - self._num_abstained_counted) > 0:
            self._metrics.count_abstained(self.options, num_new)
            self._num_abstained_counted += num_new


def current_report() -> Report | None:
    """The report of the request that this task works for; None for an ordinary one."""
    return _CURRENT.get()


def set_current_report(report: Report | None) -> None:
    """Let this task, and those that it starts from now on, work for a request."""
    _CURRENT.set(report)


def find_prompt_report(params: SamplingParams) -> PromptReport | None:
    """The report of a prompt that this task hands to the engine; None for an ordinary one."""
    report = _CURRENT.get()
    if report is None:
        return None
    # A prompt that vLLM generates with other parameters is none of the request's own.
    asked = (params.extra_args or {}).get(EXTRA_ARGS_KEY)
    is_own = asked == report.extra_args[EXTRA_ARGS_KEY]
    return report.begin_prompt() if is_own else None


def summarise_all(reports: Sequence[PromptReport]) -> dict[str, Any]:
    """What one line says of all prompts and choices of a request; there is at least one."""
    num_tokens: Counter[int] = Counter()
    for report in reports:
        report.count_into(num_tokens)
    first = reports[0]
    num_abstained = sum(report.num_abstained for report in reports)
    described = describe_tokens(first.options, num_tokens, num_abstained, first.is_override)
    return described | {"report": first.detail}


def describe_tokens(
    options: Options, num_tokens: Mapping[int, int], num_abstained: int, is_override: bool
) -> dict[str, Any]:
    """`summarise`, with a mark where the operator's override has answered."""
    described = summarise(options, num_tokens, num_abstained)
    return described | {"override": True} if is_override else described
