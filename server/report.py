"""What an answer says of its temperatures, gathered while the engine generates it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput

from adaptive_head.options import Options, ReportDetail
from adaptive_head.slots import MICRO
from adaptive_head.vllm.wire import DecisionReader
from server.heads import ServedHead
from server.metrics import AdaptiveMetrics

_MAX_UNCOUNTED_TOKENS = 32


class ChoiceReport:
    """The temperatures of one answer (one `choice` of a response).

    Attributes:
        reader: takes them off the engine's outputs.
    """

    def __init__(self, options: Options, detail: ReportDetail) -> None:
        self._options = options
        self._detail = detail
        self.reader = DecisionReader()
        # By temperature, in millionths.
        self._num_tokens: dict[int, int] = {}
        self._uncounted: dict[int, int] = {}
        self._micros: list[int] = []
        self._num_sent = 0
        self._num_held = 0

    def restart(self) -> None:
        """The engine begins to generate, for tool calls not for the first time."""
        self._settle()
        self.reader.restart()

    def hold(self, num_tokens: int) -> None:
        """So many more tokens are not to be reported before the response is built from them."""
        self._num_held += num_tokens

    @property
    def num_tokens(self) -> Mapping[int, int]:
        """How many tokens so far at each temperature (millionths)."""
        self._settle()
        return self._num_tokens

    @property
    def mean(self) -> float | None:
        """Mean temperature so far; None before the first token."""
        return mean_of(self.num_tokens)

    def take_ready(self) -> list[float]:
        """Temperatures of the tokens that are in the response and not yet reported."""
        first, end = self._num_sent, self.reader.num_tokens - self._num_held
        self._num_sent = end
        # Tokens that are not settled yet, and none of which brought a change.
        if first >= len(self._micros) and (decision := self.reader.unchanged) is not None:
            return [decision.temperature / MICRO] * (end - first)
        self._settle()
        return [micro / MICRO for micro in self._micros[first:end]]

    def take_uncounted(self) -> Mapping[int, int]:
        """Tokens by temperature (millionths) since the last call."""
        self._settle()
        uncounted, self._uncounted = self._uncounted, {}
        return uncounted

    def _settle(self) -> None:
        """Count what has been read. Not at every token: most have the temperature before theirs."""
        for decision, count in self.reader.take():
            micro = decision.temperature
            self._num_tokens[micro] = self._num_tokens.get(micro, 0) + count
            self._uncounted[micro] = self._uncounted.get(micro, 0) + count
            if self._detail == "tokens":
                self._micros += [micro] * count

    def describe(self, show_tokens: bool) -> dict[str, Any]:
        """The `adaptive` object of a finished answer.

        Args:
            show_tokens: whether to list the temperature of every token.
        """
        used, mean = sorted(self.num_tokens), self.mean
        described: dict[str, Any] = {
            "policy": self._options.policy,
            "head": self._options.name if self._options.policy == "head" else None,
            "level": self._options.level,
            "tokens": sum(self._num_tokens.values()),
            "mean": None if mean is None else round(mean, 6),
            "min": used[0] / MICRO if used else None,
            "max": used[-1] / MICRO if used else None,
            "histogram": self._bin(used),
        }
        if show_tokens:
            described["temperatures"] = [micro / MICRO for micro in self._micros]
        return described

    def _bin(self, used: list[int]) -> dict[str, int]:
        histogram: dict[str, int] = {}
        for micro in used:
            value = micro / MICRO
            # An exact histogram would have a key per token.
            if self._options.is_continuous:
                value = round(value, 1)
            key = f"{value:g}"
            histogram[key] = histogram.get(key, 0) + self._num_tokens[micro]
        return histogram


class Report:
    """The temperatures of a whole response: `num_choices` answers for each of its prompts.

    `head` is only held: the engine keeps a head for as long as somebody does.

    Attributes:
        has_several_prompts: whether the response merges the outputs of several prompts.
    """

    def __init__(
        self,
        options: Options,
        detail: ReportDetail,
        num_choices: int,
        metrics: AdaptiveMetrics,
        head: ServedHead | None = None,
    ) -> None:
        self.options = options
        self.detail = detail
        self._num_choices = num_choices
        self._metrics = metrics
        self._head = head
        self._choices: list[ChoiceReport] = []
        self.has_several_prompts = False

    def begin_prompt(self) -> "PromptReport":
        """The next prompt of the request is about to be generated."""
        choices = [ChoiceReport(self.options, self.detail) for _ in range(self._num_choices)]
        self.has_several_prompts = bool(self._choices)
        self._choices += choices
        return PromptReport(self, choices, self._metrics)

    def __getitem__(self, index: int) -> ChoiceReport:
        """The report of the response's choice `index`."""
        return self._choices[index]


class PromptReport:
    """Reads the engine's outputs for one prompt. It travels to `EngineProxy` with the prompt's
    sampling parameters, which is what ties an output to the response it belongs to."""

    def __init__(
        self, report: Report, choices: list[ChoiceReport], metrics: AdaptiveMetrics
    ) -> None:
        self.options = report.options
        self.detail = report.detail
        self._report = report
        self._choices = choices
        self._metrics = metrics
        self._num_uncounted = 0
        self._is_first = True

    def __repr__(self) -> str:
        # vLLM logs a request's parameters, with this among them, where it is asked to.
        return repr(self.options)

    def begin(self) -> None:
        """The prompt is handed to the engine."""
        self._metrics.count_request(self.options)
        self._is_first = True
        for choice in self._choices:
            choice.restart()

    def read(self, output: RequestOutput) -> None:
        """Take the temperatures off an output, count them, and remember them."""
        for completion in output.outputs:
            choice = self._choices[completion.index]
            self._num_uncounted += choice.reader.read(completion)
            is_end = completion.finish_reason is not None
            if is_end and completion.finish_reason != "abort" and (mean := choice.mean) is not None:
                self._metrics.count_answer(self.options, mean)
        if self._num_uncounted >= _MAX_UNCOUNTED_TOKENS or output.finished:
            self.flush()
        # Between the first output and its use a chat's stream sends chunks that name the role.
        if self.detail == "tokens" and (self._is_first or self._report.has_several_prompts):
            self._is_first = False
            output.outputs = _Outputs(output.outputs, self._choices)

    def count_into(self, num_tokens: Counter[int]) -> None:
        """Add how many tokens there are at each temperature (millionths), of all choices."""
        for choice in self._choices:
            num_tokens.update(choice.num_tokens)

    def flush(self) -> None:
        """Move what has been counted into the metrics."""
        for choice in self._choices:
            if uncounted := choice.take_uncounted():
                self._metrics.count_tokens(self.options, uncounted)
        self._num_uncounted = 0


class _Outputs(list[CompletionOutput]):
    """Outputs whose tokens are held until a response is built from them.

    vLLM's merging of several prompts reads one output ahead of the chunk that is being sent, so
    that the arrival of a token says nothing about the chunk it will be in; its use does.
    """

    def __init__(self, outputs: list[CompletionOutput], choices: list[ChoiceReport]) -> None:
        super().__init__(outputs)
        self._choices: list[ChoiceReport] | None = choices
        for output in outputs:
            choices[output.index].hold(len(output.token_ids))

    def __iter__(self) -> Iterator[CompletionOutput]:
        self._release()
        return super().__iter__()

    def __getitem__(self, position: Any) -> Any:
        self._release()
        return super().__getitem__(position)

    def _release(self) -> None:
        choices, self._choices = self._choices, None
        if choices is not None:
            for output in super().__iter__():
                choices[output.index].hold(-len(output.token_ids))


def summarise(reports: Sequence[PromptReport]) -> dict[str, Any]:
    """What one line says of all prompts and choices of a request; there is at least one."""
    options = reports[0].options
    num_tokens: Counter[int] = Counter()
    for report in reports:
        report.count_into(num_tokens)
    mean = mean_of(num_tokens)
    return {
        "policy": options.policy,
        "head": options.name if options.policy == "head" else None,
        "level": options.level,
        "report": reports[0].detail,
        "mean": None if mean is None else round(mean, 6),
        "min": min(num_tokens) / MICRO if num_tokens else None,
        "max": max(num_tokens) / MICRO if num_tokens else None,
    }


def mean_of(num_tokens: Mapping[int, int]) -> float | None:
    """Mean temperature of tokens counted by their temperatures (millionths); None without any."""
    total = sum(num_tokens.values())
    if not total:
        return None
    return sum(micro * count for micro, count in num_tokens.items()) / total / MICRO


def find_report(request: Any) -> Report | None:
    """The report that the answer to a request shall show, if any."""
    report = getattr(request, "report", None)
    return report if isinstance(report, Report) and report.detail != "none" else None
