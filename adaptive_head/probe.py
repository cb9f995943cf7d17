"""Does a head read the hidden states that it was trained on? Eight prompts show it.

A served model can hand its LM head another tensor than the trained one's: a norm that an
implementation applies later, a division, an adapter merged into the weights, fewer bits. The shape
is right and the fingerprint may be, so a feature probe compares what the head makes of it.
"""

from collections.abc import Sequence
from typing import Annotated, Final, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adaptive_head.head import MAX_TEMPERATURE, AdaptiveHead, select_mean

NUM_PROMPTS: Final = 8
MAX_PROMPT_TOKENS: Final = 64
# Measured between PyTorch and vLLM on a CPU, float32: 1e-6. Below this no difference matters.
MIN_TOLERANCE: Final = 0.01
# Engines round at other places than the model that the tolerance was measured on.
_MARGIN: Final = 4.0

_TokenId = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]
_Prompt = Annotated[tuple[_TokenId, ...], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
_Temperature = Annotated[float, Field(ge=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
_Tolerance = Annotated[float, Field(gt=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False)]


class FeatureProbe(BaseModel):
    """What a head makes of a few prompts on the model that it was made for.

    Attributes:
        prompts: token ids.
        temperatures: the head's expected temperature at the end of each (`select: "mean"`), of
            float32 hidden states.
        tolerances: by the dtype of a served model, such as `bfloat16`: how far the served
            temperatures may be from these on average. A dtype that is missing, and weights of
            fewer bits, get the largest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[tuple[_Prompt, ...], Field(min_length=NUM_PROMPTS, max_length=NUM_PROMPTS)]
    temperatures: tuple[_Temperature, ...]
    tolerances: Annotated[dict[str, _Tolerance], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.prompts) != len(self.temperatures):
            raise ValueError("temperatures: one per prompt")
        return self

    def find_tolerance(self, dtype: str) -> float:
        """How far temperatures may be from the expected ones on average, in a served dtype."""
        return self.tolerances.get(dtype, max(self.tolerances.values()))

    def find_unreadable(self, vocab_size: int, max_tokens: int) -> str | None:
        """Why a model cannot read the prompts; None if it can.

        Args:
            max_tokens: of a prompt.
        """
        largest = max(max(prompt) for prompt in self.prompts)
        if largest >= vocab_size:
            return f"its token {largest} is not one of the model's {vocab_size}"
        longest = max(map(len, self.prompts))
        if longest > max_tokens:
            return f"it has a prompt of {longest} tokens, and the model reads {max_tokens}"
        return None

    def find_mismatch(self, temperatures: Sequence[float], dtype: str) -> str | None:
        """How temperatures that a served model led to differ from the expected ones; None if
        they agree.

        Args:
            temperatures: one per prompt.
            dtype: that the model is served in.
        """
        difference = compare_temperatures(self.temperatures, temperatures)
        tolerance = self.find_tolerance(dtype)
        if difference <= tolerance:
            return None
        expected, found = (
            " ".join(f"{value:.2f}" for value in values)
            for values in (self.temperatures, temperatures)
        )
        return (
            f"the temperatures at the end of its {NUM_PROMPTS} prompts should be {expected}, and "
            f"are {found}: {difference:.3f} apart on average, where {dtype} explains "
            f"{tolerance:.3f}"
        )


def expect_temperatures(network: AdaptiveHead, states: torch.Tensor) -> tuple[float, ...]:
    """A head's expected temperature for each hidden state.

    Args:
        states: [rows, d], on the CPU.
    """
    with torch.inference_mode():
        means = select_mean(network(states), torch.tensor(network.config.temperatures))
    # Temperatures travel as millionths.
    return tuple(round(value, 6) for value in means.tolist())


def compare_temperatures(first: Sequence[float], second: Sequence[float]) -> float:
    """The mean absolute difference: one prompt near a decision of the head's does not decide."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)


def choose_tolerance(difference: float) -> float:
    """The tolerance for a dtype in which the model was `difference` from float32 in PyTorch."""
    return round(max(MIN_TOLERANCE, _MARGIN * difference), 6)
