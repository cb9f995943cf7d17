"""What an answer, a request or a log line says of many tokens' temperatures."""

from collections.abc import Mapping
from typing import Any

from adaptive_head.decision import MILLION
from adaptive_head.options import Options


def summarise(
    options: Options, num_tokens: Mapping[int, int], num_abstained: int = 0
) -> dict[str, Any]:
    """How tokens were sampled: by what, and the mean and extremes of their temperatures.

    Args:
        num_tokens: by temperature, in millionths. Without any, mean and extremes are None.
        num_abstained: how many of them got the head's fallback; left out where none can.
    """
    mean = mean_of(num_tokens)
    summary = {
        "policy": options.policy,
        "head": options.name if options.policy == "head" else None,
        "level": options.level,
        "mean": None if mean is None else round(mean, 6),
        "min": min(num_tokens) / MILLION if num_tokens else None,
        "max": max(num_tokens) / MILLION if num_tokens else None,
    }
    return summary | {"abstained": num_abstained} if options.can_abstain else summary


def bin_temperatures(options: Options, num_tokens: Mapping[int, int]) -> dict[str, int]:
    """How many tokens there are at each temperature, increasing.

    Args:
        num_tokens: by temperature, in millionths.

    Returns:
        By temperature as text, to a tenth where temperatures are continuous: an exact histogram
        would have a key per token.
    """
    histogram: dict[str, int] = {}
    for millionths in sorted(num_tokens):
        value = millionths / MILLION
        key = f"{round(value, 1) if options.is_continuous else value:g}"
        histogram[key] = histogram.get(key, 0) + num_tokens[millionths]
    return histogram


def mean_of(num_tokens: Mapping[int, int]) -> float | None:
    """Mean temperature of tokens counted by their temperatures (millionths); None without any."""
    total = sum(num_tokens.values())
    if not total:
        return None
    return sum(micro * count for micro, count in num_tokens.items()) / total / MILLION
