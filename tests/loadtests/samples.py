"""Small things that the load tests meet."""

from loadtests.answers import Answer, Choice
from loadtests.scenario import Scenario, Style
from loadtests.target import Head, Target
from loadtests.workload import Ask

TARGET = Target(
    url="http://127.0.0.1:1",
    model="smol",
    heads={
        "tok": Head("token", (0.0, 0.3, 0.7, 1.0)),
        "seq": Head("sequence", (0.0, 0.3, 0.7, 1.0)),
        "mean": Head("token", (0.0, 0.3, 0.7, 1.0), "mean"),
    },
)


def make_scenario(**changes) -> Scenario:
    fields = {
        "about": "A test.",
        "stages": [{"duration": 1, "users": 2, "spawn_rate": 2}],
        "mix": {"chat": 1},
        "styles": [{"temperature": "adaptive"}, {"temperature": 0.7}],
    }
    return Scenario.model_validate(fields | changes)


def make_ask(temperature="adaptive", num_choices=1, ignore_eos=False, **adaptive) -> Ask:
    """A streamed request for at most 10 tokens a choice."""
    style = Style(temperature=temperature, adaptive=adaptive or None)
    body = {"stream": True, "max_tokens": 10, "ignore_eos": ignore_eos}
    return Ask("chat", "/v1/chat/completions", body, style, num_choices)


def make_choice(temperatures, lists=True, level="token", policy="head", **changes) -> Choice:
    """A right answer with these temperatures.

    Args:
        lists: whether it lists them, beside the summary.
        changes: of the summary.
    """
    histogram: dict[str, int] = {}
    for value in temperatures:
        histogram[f"{value:g}"] = histogram.get(f"{value:g}", 0) + 1
    summary = {
        "policy": policy,
        "head": {"token": "tok", "sequence": "seq"}[level] if policy == "head" else None,
        "level": level,
        "tokens": len(temperatures),
        "mean": round(sum(temperatures) / len(temperatures), 6),
        "min": min(temperatures),
        "max": max(temperatures),
        "histogram": dict(sorted(histogram.items())),
    }
    listed = list(temperatures) if lists else []
    return Choice("text", "stop", summary | changes, listed)


def make_answer(*choices: Choice, num_tokens=None) -> Answer:
    """A whole response; its usage counts the choices' tokens unless it is told another number."""
    if num_tokens is None:
        num_tokens = sum((choice.adaptive or {"tokens": 3})["tokens"] for choice in choices)
    return Answer(dict(enumerate(choices)), num_tokens, [0.1, 0.2, 0.3], 0.3, is_done=True)
