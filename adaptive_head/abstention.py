"""When a head is too unsure to choose, and what a row gets then."""

from enum import IntEnum
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from adaptive_head.parameters import Temperature

Statistic = Literal["margin", "probability"]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class StatisticIndex(IntEnum):
    """A statistic as options and the device carry it."""

    MARGIN = 0
    PROBABILITY = 1


class Abstention(BaseModel):
    """Below the threshold the head is too unsure, and a row gets the fallback instead.

    Attributes:
        statistic: what is compared: the largest probability of the head's distribution, or how far
            the second largest is below it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Probability
    fallback: Temperature
    statistic: Statistic

    @property
    def parameters(self) -> tuple[float, float, float]:
        """Threshold, fallback and `StatisticIndex`, as `Options.parameters` of a head."""
        return self.threshold, self.fallback, float(StatisticIndex[self.statistic.upper()])


def find_unsure(
    logits: torch.Tensor, thresholds: torch.Tensor, statistics: torch.Tensor
) -> torch.Tensor:
    """Which rows' distributions are below their thresholds.

    Args:
        logits: float32 [rows, K]. NaN, of a broken hidden state, is taken for very unlikely.
        thresholds: float32 [rows]; 0 for a row that always chooses.
        statistics: float32 [rows], each a `StatisticIndex`.

    Returns:
        bool [rows].
    """
    shares = logits.nan_to_num(nan=torch.finfo(logits.dtype).min).softmax(dim=-1)
    largest, second = shares.topk(2, dim=-1).values.unbind(dim=-1)
    is_margin = statistics == StatisticIndex.MARGIN
    return torch.where(is_margin, largest - second, largest) < thresholds
