"""What a comparison plans, and what it measures; JSON between two processes and on disk."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel

from loadtests.scenario import Mix, Scenario

Arm = Literal["adaptive", "fixed"]
ARMS: tuple[Arm, Arm] = ("adaptive", "fixed")
# Users of a comparison. The other kind leaves early, and so gives no fixed amount of work.
KINDS = ("chat", "batch", "long_prompt")


class Plan(BaseModel):
    """A comparison.

    Attributes:
        urls: an arm's server; usually the same.
        num_pairs: pairs of blocks, one of each arm.
        num_requests: of each user in a block.
    """

    urls: dict[Arm, str]
    scenario: Scenario
    num_pairs: int
    num_requests: int


class Block(BaseModel):
    """All users' requests with one arm's styles.

    Attributes:
        pair: blocks of the same pair hold the same requests; -1 for those that warm up.
        seconds: from the first request to the last answer's end.
        cpu_seconds: processor time of the server's API process; near 0 if it does not say.
        num_tokens: of all answers.
        ttfts: seconds to the first token, of each stream.
        itls: mean seconds between two tokens, of each stream.
        failures: why requests failed, or answers are wrong.
        temperatures: tokens by head (or policy) and temperature.
    """

    arm: Arm
    pair: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    num_requests: int = 0
    num_tokens: int = 0
    ttfts: list[float] = []
    itls: list[float] = []
    failures: list[str] = []
    temperatures: dict[str, dict[str, int]] = {}


class Measurements(BaseModel):
    """All blocks of a comparison.

    Attributes:
        versions: of the servers' vLLM, by arm.
        heads: the temperatures of each.
        wrong_tokens: where the server counted other tokens than its clients.
    """

    plan: Plan
    model: str
    versions: dict[Arm, str]
    heads: dict[str, tuple[float, ...]]
    blocks: list[Block] = []
    wrong_tokens: list[str] = []

    def list_pairs(self) -> list[tuple[Block, Block]]:
        """Whole pairs without a failure: the adaptive block, and the fixed one."""
        blocks = {(b.arm, b.pair): b for b in self.blocks if not b.failures and b.pair >= 0}
        pairs = sorted({pair for _, pair in blocks})
        return [
            (blocks["adaptive", pair], blocks["fixed", pair])
            for pair in pairs
            if ("adaptive", pair) in blocks and ("fixed", pair) in blocks
        ]

    @property
    def is_broken(self) -> bool:
        """Whether a request failed, an answer was wrong, or tokens do not add up."""
        return bool(self.wrong_tokens) or any(block.failures for block in self.blocks)


def order_blocks(num_pairs: int) -> Iterator[tuple[int, Arm]]:
    """The blocks as (pair, arm): two to warm up, whose pair is -1, and then the pairs.

    Who goes first alternates (ABBA), so that a machine that becomes slower does so for both.
    """
    for pair in range(-1, num_pairs):
        yield pair, ARMS[pair % 2]
        yield pair, ARMS[1 - pair % 2]


def assign_kinds(mix: Mix, num_users: int) -> list[str]:
    """What kind each user is: shares as the mix's, as near as so few users allow."""
    weights = {kind: getattr(mix, kind) for kind in KINDS if getattr(mix, kind)}
    chosen: Counter[str] = Counter()
    for _ in range(num_users):
        chosen[max(weights, key=lambda kind: weights[kind] / (chosen[kind] + 1))] += 1
    return list(chosen.elements())
