"""What was decided for a token: its temperature and, where something sets them, the rest.

Values are whole millionths: exact in decimal, equal wherever they are compared, and integers on the
way from the engine to the API process.
"""

from enum import IntFlag
from typing import Final, NamedTuple

MILLION: Final = 1_000_000
# Of `top_p` and `min_p`: the request's own value, or none, holds.
NOT_SET: Final = -1


class DecisionFlag(IntFlag):
    """What else there is to know about a decision."""

    ABSTAINED = 1


class Decision(NamedTuple):
    """How a token was sampled. Equal to the plain tuple of its fields.

    Attributes:
        temperature: millionths.
        top_p: millionths, or NOT_SET.
        min_p: millionths, or NOT_SET.
        flags: a `DecisionFlag`.
    """

    temperature: int
    top_p: int = NOT_SET
    min_p: int = NOT_SET
    flags: int = 0

    @property
    def has_abstained(self) -> bool:
        """Whether the head was too unsure, and the temperature is its fallback."""
        return bool(self.flags & DecisionFlag.ABSTAINED)


def round_to_millionth(value: float) -> float:
    """A value as decisions carry it."""
    return round(value * MILLION) / MILLION
