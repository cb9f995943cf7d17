"""Is an answer right? Not its words: its form, its tokens and its temperatures."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from loadtests.answers import Answer, Choice
from loadtests.target import Head, Target
from loadtests.workload import Ask

_FINISHED = ("stop", "length")
# Policies whose temperatures are continuous.
_CONTINUOUS_POLICIES = ("entropy", "schedule", "list")
_ROUNDING = 2e-6


class WrongAnswerError(Exception):
    """An answer that is not what was asked for; the message says what is wrong with it."""


def check_answer(ask: Ask, answer: Answer, target: Target) -> None:
    """Check a whole response.

    Raises:
        WrongAnswerError: names the first thing that is wrong.
    """
    try:
        wrong = next(_find_wrong(ask, answer, target), None)
    except (KeyError, TypeError, AttributeError) as error:
        wrong = f"`adaptive` is not of the form that it has ({error!r})"
    if wrong is not None:
        raise WrongAnswerError(wrong)


def check_beginning(ask: Ask, answer: Answer) -> None:
    """Check what a client has read that left in the middle of a stream.

    Raises:
        WrongAnswerError: it ended too soon, a temperature is missing, or one is there that nobody
            asked for.
    """
    if len(answer.arrivals) < (ask.leave_after or 0):
        raise WrongAnswerError("the stream ended without [DONE]")
    choice = answer.choices[0]
    if not ask.style.is_adaptive and choice.adaptive is not None:
        raise WrongAnswerError("a fixed answer carries temperatures")
    if _get_detail(ask) == "tokens" and len(choice.temperatures) < len(answer.arrivals):
        raise WrongAnswerError(
            f"{len(answer.arrivals)} chunks with {len(choice.temperatures)} temperatures"
        )


def _find_wrong(ask: Ask, answer: Answer, target: Target) -> Iterator[str]:
    if ask.is_stream and not answer.is_done:
        yield "the stream ended without [DONE]"
    if set(answer.choices) != set(range(ask.num_choices)):
        yield f"{len(answer.choices)} choices of {ask.num_choices}"
    if answer.num_tokens is None:
        yield "no usage"
    elif answer.num_tokens > ask.max_tokens:
        yield f"{answer.num_tokens} tokens of at most {ask.max_tokens}"
    elif ask.body["ignore_eos"] and answer.num_tokens != ask.max_tokens:
        yield f"{answer.num_tokens} tokens, and {ask.max_tokens} were asked for"
    for index, choice in answer.choices.items():
        if choice.finish_reason not in _FINISHED:
            yield f"choice {index}: finish_reason is {choice.finish_reason}"
        if _get_detail(ask) == "none":
            if choice.adaptive is not None:
                yield f"choice {index} carries `adaptive`, which nobody asked for"
        elif not choice.adaptive:
            yield f"choice {index} has no summary of its temperatures"
        else:
            yield from (f"choice {index}: {wrong}" for wrong in _find_odd(ask, choice, target))
    if _get_detail(ask) != "none":
        described = sum((c.adaptive or {}).get("tokens", 0) for c in answer.choices.values())
        if described != answer.num_tokens:
            yield f"usage counts {answer.num_tokens} tokens, the summaries {described}"


def _find_odd(ask: Ask, choice: Choice, target: Target) -> Iterator[str]:
    """What is wrong with a choice's temperatures."""
    summary = choice.adaptive or {}
    asked = ask.style.adaptive or {}
    policy = asked.get("policy", "head")
    if summary["policy"] != policy:
        yield f"policy {summary['policy']} where {policy} was asked for"
    num_tokens, histogram = summary["tokens"], summary["histogram"]
    if sum(histogram.values()) != num_tokens:
        yield f"the histogram counts {sum(histogram.values())} of {num_tokens} tokens"
    is_listed = _get_detail(ask) == "tokens"
    head = target.heads.get(summary["head"])
    select = asked.get("select") or (head and head.select)
    is_continuous = policy in _CONTINUOUS_POLICIES or select == "mean"
    if is_listed:
        # The keys of a histogram are rounded where temperatures are continuous.
        yield from _find_misaligned(choice.temperatures, summary, is_exact=not is_continuous)
    elif choice.temperatures:
        yield "lists temperatures, which nobody asked for"
    used = choice.temperatures if is_listed else [float(key) for key in histogram]
    if policy == "head":
        yield from _find_foreign(summary, used, asked, head, is_continuous)
    if summary["level"] == "sequence" and len(set(used)) > 1:
        yield f"{len(set(used))} temperatures in an answer of level sequence"


def _find_misaligned(
    listed: list[float], summary: Mapping[str, Any], is_exact: bool
) -> Iterator[str]:
    """Where a list of temperatures differs from its summary."""
    if len(listed) != summary["tokens"]:
        yield f"{len(listed)} temperatures for {summary['tokens']} tokens"
    elif listed:
        ends = min(listed), max(listed)
        if ends != (summary["min"], summary["max"]):
            yield f"temperatures from {ends[0]} to {ends[1]} contradict the summary's min and max"
        if abs(sum(listed) / len(listed) - summary["mean"]) > _ROUNDING:
            yield f"the temperatures' mean is not {summary['mean']}"
        if is_exact and Counter(f"{value:g}" for value in listed) != summary["histogram"]:
            yield "the temperatures contradict the histogram"


def _find_foreign(
    summary: Mapping[str, Any],
    used: list[float],
    asked: Mapping[str, Any],
    head: Head | None,
    is_continuous: bool,
) -> Iterator[str]:
    """Temperatures that the head that answered does not have."""
    if head is None:
        yield f"the head {summary['head']!r} is not one of the server's"
        return
    if summary["level"] != head.level:
        yield f"level {summary['level']} of a head whose level is {head.level}"
    low, high = asked.get("min") or 0.0, asked.get("max")
    allowed = [value * asked.get("scale", 1.0) for value in (*head.temperatures, *head.fallback)]
    allowed = [max(low, value if high is None else min(value, high)) for value in allowed]
    for value in used:
        if is_continuous:
            # Keys of a histogram are rounded to tenths.
            if not min(allowed) - 0.051 < value < max(allowed) + 0.051:
                yield f"temperature {value} is not from {min(allowed)} to {max(allowed)}"
        elif not any(abs(value - known) < _ROUNDING for known in allowed):
            yield f"temperature {value} is none of the head's {', '.join(map(str, allowed))}"


def _get_detail(ask: Ask) -> str:
    if not ask.style.is_adaptive:
        return "none"
    return str((ask.style.adaptive or {}).get("report", "summary"))
