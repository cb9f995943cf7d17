"""Does a head read the hidden states that it was trained on? A few prompts show it.

A served model can hand its LM head another tensor than the trained one did: an implementation that
normalises later or does not divide, an adapter merged into the weights, fewer bits. The shape fits
and the fingerprint may, so a feature probe compares what the head makes of it.
"""

from collections.abc import Sequence
from typing import Final

import torch

from adaptive_head.head import AdaptiveHead, select_mean
from adaptive_head.metadata import FeatureProbe

# Of the heads that ship bfloat16 changes 0.001, a division of the hidden state by 10 at least 0.02
# (transformers, on a CPU).
MIN_TOLERANCE: Final = 0.01
# Engines round at other places than the model that a tolerance was measured on.
_MARGIN: Final = 4.0


def expect_temperatures(network: AdaptiveHead, states: torch.Tensor) -> tuple[float, ...]:
    """A head's expected temperature for each hidden state.

    Args:
        states: [rows, d], where the network is.

    Returns:
        Whole millionths, as answers report them.
    """
    temperatures = torch.tensor(network.config.temperatures, device=states.device)
    with torch.inference_mode():
        means = select_mean(network(states), temperatures)
    return tuple(round(value, 6) for value in means.tolist())


def compare_temperatures(first: Sequence[float], second: Sequence[float]) -> float:
    """The mean absolute difference: one prompt where the head is undecided does not count alone."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)


def choose_tolerance(difference: float) -> float:
    """The tolerance for a dtype in which the model was so far from float32, on average."""
    return round(max(MIN_TOLERANCE, _MARGIN * difference), 6)


def find_unreadable(probe: FeatureProbe, vocab_size: int, max_tokens: int) -> str | None:
    """Why a model cannot read a probe's prompts; None if it can.

    Args:
        max_tokens: of a prompt.
    """
    largest = max(max(prompt) for prompt in probe.prompts)
    if largest >= vocab_size:
        return f"its token {largest} is not one of the model's {vocab_size}"
    longest = max(map(len, probe.prompts))
    if longest > max_tokens:
        return f"it has a prompt of {longest} tokens, and the model reads {max_tokens}"
    return None


def find_mismatch(probe: FeatureProbe, temperatures: Sequence[float], dtype: str) -> str | None:
    """How the temperatures that a served model leads to differ from a probe's; None if they agree.

    Args:
        temperatures: one per prompt.
        dtype: that the model is served in. One without a tolerance of its own, such as that of a
            quantised model, gets the largest.
    """
    difference = compare_temperatures(probe.temperatures, temperatures)
    tolerance = probe.tolerances.get(dtype, max(probe.tolerances.values()))
    if difference <= tolerance:
        return None
    expected, found = (
        " ".join(f"{value:.2f}" for value in values)
        for values in (probe.temperatures, temperatures)
    )
    return (
        f"the temperatures at the end of its prompts should be {expected}, and are {found}: "
        f"{difference:.3f} apart on average, where {dtype} explains {tolerance:.3f}"
    )
