"""The rows of features that the two sides of each pair have, packed into batches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from adaptive_head.lpo.feature_file import Features
from adaptive_head.lpo.losses import PackedSide, read_base_model
from adaptive_head.lpo.records import Pair, Side
from adaptive_head.options import Level

ROWS_PER_CHUNK = 8192
_MAX_BYTES_IN_MEMORY = 2 * 2**30


@dataclass(frozen=True)
class Rows:
    """Rows of features; the last two, of `read_base_model`, are real for cross-entropy only."""

    hidden: torch.Tensor
    choices: torch.Tensor
    logprobs: torch.Tensor
    token_ids: torch.Tensor
    base_probabilities: torch.Tensor
    right: torch.Tensor

    def take(self, index: torch.Tensor, device: torch.device) -> "Rows":
        return Rows(*(getattr(self, field.name)[index].to(device) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    """The rows of B pairs' chosen sides, and behind them those of their rejected sides."""

    rows: Rows
    segments: torch.Tensor
    num_chosen: int
    num_pairs: int

    def pack_sides(self, log_p: torch.Tensor) -> tuple[PackedSide, PackedSide]:
        chosen, rejected = slice(self.num_chosen), slice(self.num_chosen, None)
        return self._pack(log_p, chosen), self._pack(log_p, rejected)

    def _pack(self, log_p: torch.Tensor, side: slice) -> PackedSide:
        return PackedSide(
            log_p[side],
            self.rows.choices[side],
            self.rows.logprobs[side],
            self.segments[side],
            self.num_pairs,
        )


class PairRows:
    """The rows that each pair's sides have, in main memory unless they are too many for it."""

    def __init__(self, features: Features, pairs: Sequence[Pair], level: Level) -> None:
        self.sides = [
            (_find_rows(pair.chosen, features, level), _find_rows(pair.rejected, features, level))
            for pair in pairs
        ]
        self.used = _index([side for sides in self.sides for side in sides]).unique()
        self._rows = Rows(
            features.hidden,
            features.choices,
            features.logprobs,
            features.token_ids,
            base_probabilities=torch.zeros(1).expand(len(features.hidden)),
            right=torch.zeros(1, dtype=torch.bool).expand(len(features.hidden)),
        )

    @property
    def hidden_size(self) -> int:
        return self._rows.hidden.shape[1]

    def fingerprint(self) -> str:
        """Tells rollouts apart in which the same tokens of the same responses are paired."""
        columns = (self._rows.choices, self._rows.logprobs, self._rows.token_ids)
        hashed = hashlib.sha256()
        for column in columns:
            hashed.update(column[self.used].numpy().tobytes())
        return hashed.hexdigest()

    def gather(self) -> None:
        """Read the rows into main memory, if they fit: their files are slow to pick rows from."""
        hidden = self._rows.hidden
        if len(self.used) * hidden.shape[1] * hidden.element_size() > _MAX_BYTES_IN_MEMORY:
            return
        self._rows = self._rows.take(self.used, torch.device("cpu"))
        # Used rows are in order and whole sides, so a side stays one range.
        self.sides = [
            (self._shift(chosen), self._shift(rejected)) for chosen, rejected in self.sides
        ]

    def _shift(self, side: range) -> range:
        start = int(torch.searchsorted(self.used, side.start))
        return range(start, start + len(side))

    def add_base_model(self, unembedding: torch.Tensor) -> None:
        """Compute once what cross-entropy takes from the frozen model."""
        probabilities = torch.zeros(len(self._rows.hidden))
        right = torch.zeros(len(self._rows.hidden), dtype=torch.bool)
        for index in _index([chosen for chosen, _ in self.sides]).unique().split(ROWS_PER_CHUNK):
            probabilities[index], right[index] = read_base_model(
                self._rows.hidden[index], self._rows.token_ids[index], unembedding
            )
        self._rows = replace(self._rows, base_probabilities=probabilities, right=right)

    def pack(self, pairs: Sequence[int], device: torch.device) -> Batch:
        chosen = [self.sides[pair][0] for pair in pairs]
        rejected = [self.sides[pair][1] for pair in pairs]
        lengths = torch.tensor([len(side) for side in (*chosen, *rejected)])
        owners = torch.arange(len(pairs)).repeat(2)
        return Batch(
            self._rows.take(_index([*chosen, *rejected]), device),
            segments=owners.repeat_interleave(lengths).to(device),
            num_chosen=sum(map(len, chosen)),
            num_pairs=len(pairs),
        )


def _index(sides: Sequence[range]) -> torch.Tensor:
    return torch.cat([torch.arange(side.start, side.stop) for side in sides])


def _find_rows(side: Side, features: Features, level: Level) -> range:
    name = f"sample {side.sample} of prompt {side.prompt_id}"
    if side.key not in features.starts:
        raise ValueError(f"there are no features of {name}")
    start, stop = features.starts[side.key]
    if level == "sequence":
        if stop - start != 1:
            raise ValueError(
                f"{name} has {stop - start} rows; features for a sequence-level head have one"
            )
        return range(start, stop)
    if not 0 <= side.start < side.stop <= stop - start:
        raise ValueError(
            f"tokens [{side.start}, {side.stop}) of {name} are not among its {stop - start} rows"
        )
    return range(start + side.start, start + side.stop)
