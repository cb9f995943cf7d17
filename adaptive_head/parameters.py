"""What the learning-free policies are given, as a request writes it."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, FailFast, Field

from adaptive_head.head import MAX_TEMPERATURE

# Temperatures of a list policy; the device has room for as many in every slot.
MAX_LIST_LEN: Final = 4096

Temperature = Annotated[float, Field(ge=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False)]


class Strict(BaseModel):
    # Strict: true is not the number 1, and "0.5" is not 0.5.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EntropyParameters(Strict):
    """T = t0 * 0.8^(theta / H) with H in nats (EDT, arXiv 2403.14541).

    The defaults suit SmolLM2-135M-Instruct; see docs/results.md.
    """

    t0: Temperature = 0.7
    theta: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0


class ScheduleParameters(Strict):
    """From `start`, in a line, to `end` after `tokens` generated tokens."""

    start: Temperature = 1.0
    end: Temperature = 0.3
    tokens: Annotated[int, Field(ge=1, le=10_000_000)] = 256


class TwoPhaseParameters(Strict):
    """`thinking` until the model has written `marker`, then `answer`."""

    thinking: Temperature = 1.0
    answer: Temperature = 0.3
    marker: Annotated[str, Field(min_length=1, max_length=64)] = "</think>"


class ConstantParameters(Strict):
    """The control: one temperature for every token."""

    temperature: Temperature = 0.7


class ListParameters(Strict):
    """One temperature per generated token, in order; the last one repeats."""

    # Stops at the first wrong entry: a client may send thousands of them.
    temperatures: Annotated[
        list[Temperature], Field(min_length=1, max_length=MAX_LIST_LEN), FailFast()
    ]
