"""The requests of an engine by slot: what they asked for, and what the device remembers of them.

The host stages a request's options (`add`) and copies them over (`flush`); what chooses the
temperatures reads the device's side. Neither waits for the other. The device's side is written by
one stream at a time: `flush`, `start_phase`, `park` and `restore` come between two steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from adaptive_head.decision import MILLION
from adaptive_head.head import MAX_NUM_TEMPERATURES, AdaptiveHead
from adaptive_head.options import Options, PolicyName
from adaptive_head.parameters import MAX_LIST_LEN
from adaptive_head.phases import PhaseTracker
from adaptive_head.transfer import copy_over, upload

ORDINARY = -1


class Column(IntEnum):
    """Columns of the table of options, one row per slot.

    Heads and lists have names of their own for the policy's parameters.
    """

    IS_SEQUENCE = 0
    SELECTION = 1
    SCALE = 2
    MIN = 3
    MAX = 4
    PARAMETER_0 = 5
    PARAMETER_1 = 6
    PARAMETER_2 = 7

    # 0 where the head always chooses.
    THRESHOLD = PARAMETER_0
    FALLBACK = PARAMETER_1
    STATISTIC = PARAMETER_2
    LIST_LEN = PARAMETER_0


class SelectionIndex(IntEnum):
    """How a head's distribution becomes a temperature; see `Options.select`."""

    ARGMAX = 0
    SAMPLE = 1
    MEAN = 2


class PolicyIndex(IntEnum):
    """What chooses for a slot; heads follow, in the order in which they came."""

    ENTROPY = 0
    SCHEDULE = 1
    TWO_PHASE = 2
    CONSTANT = 3
    LIST = 4
    FIRST_HEAD = 5


@dataclass(frozen=True)
class HeadCounts:
    """How often a head has chosen each of its temperatures."""

    name: str
    generation: int
    counts: dict[float, int]


class ParkedChoice(NamedTuple):
    """What a request that leaves its slot has to find again in another one; on the device.

    Attributes:
        chosen: float32, 0-d, the sequence-level choice; NaN where there is none.
        has_abstained: bool, 0-d, whether it is the head's fallback.
    """

    chosen: torch.Tensor
    has_abstained: torch.Tensor


class SlotTable:
    """Options, seeds, sequence-level choices and phases of the requests in their slots.

    Args:
        heads: loaded heads by name, of generation 0.
        num_slots: how many requests can be tracked at once.
        device: where the sampler's tensors live.

    Attributes:
        policies: int32 [slots], a `PolicyIndex` or a head's index; ORDINARY where a slot is empty
            or its request is ordinary.
        options: float32 [slots, columns].
        seeds: int64 [slots].
        chosen: float32 [slots], what a sequence-level request has chosen, NaN until it has.
        has_abstained: bool [slots], whether that choice is the head's fallback. For a token-level
            request, `TemperatureSelector` stores whether its latest token got the fallback.
        lists: float32 [slots, 4096], the temperatures of the requests of policy list.
        phases: of the two-phase requests.
        counts: int64 [indices, 64], how often each head has chosen each of its temperatures.
    """

    def __init__(
        self, heads: Mapping[str, AdaptiveHead], num_slots: int, device: torch.device
    ) -> None:
        self.device = device
        # By policy, name and generation; see `Options`.
        self._index: dict[tuple[PolicyName, str, int], int] = {
            ("entropy", "entropy", 0): PolicyIndex.ENTROPY,
            ("schedule", "schedule", 0): PolicyIndex.SCHEDULE,
            ("two_phase", "two_phase", 0): PolicyIndex.TWO_PHASE,
            ("constant", "constant", 0): PolicyIndex.CONSTANT,
            ("list", "list", 0): PolicyIndex.LIST,
        }
        self._num_indices = int(PolicyIndex.FIRST_HEAD)
        self._temperatures: dict[int, tuple[float, ...]] = {}
        self.counts = self._make_counts(2 * self._num_indices)

        self._options_np = np.zeros((num_slots, len(Column)), dtype=np.float32)
        self._policy_np = np.full(num_slots, ORDINARY, dtype=np.int32)
        self._seeds_np = np.zeros(num_slots, dtype=np.int64)
        self._staged: set[int] = set()
        self._staged_lists: dict[int, np.ndarray] = {}

        self.policies = torch.full((num_slots,), ORDINARY, dtype=torch.int32, device=device)
        self.options = torch.zeros((num_slots, len(Column)), device=device)
        self.seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.chosen = torch.full((num_slots,), torch.nan, device=device)
        self.has_abstained = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.lists = torch.zeros((num_slots, MAX_LIST_LEN), device=device)
        self.phases = PhaseTracker(num_slots, device)
        for name, head in heads.items():
            self.add_head(name, 0, head)

    def add_head(self, name: str, generation: int, head: AdaptiveHead) -> int:
        """Serve a head from now on, beside earlier generations of its name.

        Returns:
            Its index. Never reused: a step of an aborted request may still refer to it after
            removal.
        """
        index = self._index["head", name, generation] = self._num_indices
        self._num_indices += 1
        self._temperatures[index] = head.config.temperatures
        if self._num_indices > len(self.counts):
            self.counts = torch.cat([self.counts, self._make_counts(len(self.counts))])
        return index

    def remove_head(self, name: str, generation: int) -> int | None:
        """Forget a head. No request that will be answered may have it.

        Returns:
            The index that it had; None where it is not there.
        """
        return self._index.pop(("head", name, generation), None)

    def has_head(self, name: str, generation: int) -> bool:
        return ("head", name, generation) in self._index

    def can_serve(self, options: Options) -> bool:
        """Whether the policy and the head of these options are here."""
        return _find_key(options) in self._index

    def count_choices(self) -> list[HeadCounts]:
        """How often each head has chosen each of its temperatures.

        Before scale and bounds: once per token, or once per answer at the sequence level. A mean
        or a fallback is none of them and is not counted. Waits for the device; for operators and
        tests, not for a step.
        """
        counts = self.counts.tolist()
        return [
            HeadCounts(
                name, generation, dict(zip(self._temperatures[index], counts[index], strict=False))
            )
            for (policy, name, generation), index in self._index.items()
            if policy == "head"
        ]

    def grow(self) -> range:
        """Double the number of slots, keeping what they hold.

        Returns:
            The new slots.
        """
        num_slots = len(self._policy_np)
        self._options_np = np.concatenate([self._options_np, np.zeros_like(self._options_np)])
        self._policy_np = np.concatenate([self._policy_np, np.full(num_slots, ORDINARY, np.int32)])
        self._seeds_np = np.concatenate([self._seeds_np, np.zeros_like(self._seeds_np)])
        self.policies = torch.cat([self.policies, torch.full_like(self.policies, ORDINARY)])
        self.options = torch.cat([self.options, torch.zeros_like(self.options)])
        self.seeds = torch.cat([self.seeds, torch.zeros_like(self.seeds)])
        self.chosen = torch.cat([self.chosen, torch.full_like(self.chosen, torch.nan)])
        self.has_abstained = torch.cat([self.has_abstained, torch.zeros_like(self.has_abstained)])
        self.lists = torch.cat([self.lists, torch.zeros_like(self.lists)])
        self.phases.grow()
        return range(num_slots, 2 * num_slots)

    def add(self, slot: int, options: Options | None, seed: int | None) -> bool:
        """Stage a request that enters a slot, whatever was there before.

        Args:
            options: None for an ordinary request.
            seed: the request's own, or None for a random one.

        Returns:
            Whether the request is adaptive.

        Raises:
            KeyError: the options name a head that is not loaded.
        """
        self._staged_lists.pop(slot, None)
        if options is None:
            # Most slots never see an adaptive request, and then cost nothing.
            if self._policy_np[slot] != ORDINARY:
                self._policy_np[slot] = ORDINARY
                self._staged.add(slot)
            return False
        policy = self._index[_find_key(options)]
        row = np.zeros(len(Column), dtype=np.float32)
        row[Column.IS_SEQUENCE] = options.level == "sequence"
        row[Column.SELECTION] = SelectionIndex[options.select.upper()]
        row[Column.SCALE] = options.scale
        row[Column.MIN] = options.min
        row[Column.MAX] = options.max
        row[Column.PARAMETER_0 : Column.PARAMETER_0 + len(options.parameters)] = options.parameters
        self._options_np[slot] = row
        self._policy_np[slot] = policy
        self._seeds_np[slot] = np.random.randint(1 << 63) if seed is None else _wrap_seed(seed)
        self._staged.add(slot)
        if policy == PolicyIndex.LIST:
            self._options_np[slot, Column.LIST_LEN] = len(options.temperatures)
            self._staged_lists[slot] = np.array(options.temperatures, dtype=np.float32)
        if policy == PolicyIndex.TWO_PHASE:
            markers = options.marker_token_ids, options.start_token_ids
            self.phases.add(slot, *markers, options.num_written)
        return True

    def flush(self) -> None:
        """Copy what was staged to the device, without waiting for it."""
        if not self._staged:
            return
        slots_np = np.fromiter(self._staged, dtype=np.int64)
        self._staged.clear()
        slots = upload(slots_np, self.device)
        self.policies.index_copy_(0, slots, upload(self._policy_np[slots_np], self.device))
        self.options.index_copy_(0, slots, upload(self._options_np[slots_np], self.device))
        self.seeds.index_copy_(0, slots, upload(self._seeds_np[slots_np], self.device))
        self.chosen.index_fill_(0, slots, torch.nan)
        self.has_abstained.index_fill_(0, slots, False)
        for slot, temperatures in self._staged_lists.items():
            copy_over(temperatures, self.lists[slot, : len(temperatures)])
        self._staged_lists.clear()
        self.phases.flush()

    def is_adaptive(self, slot: int) -> bool:
        """Whether the slot holds an adaptive request."""
        return bool(self._policy_np[slot] != ORDINARY)

    def find_present(self, slots_np: np.ndarray) -> list[int]:
        """The indices of what chooses for these slots, in order; the first is ORDINARY where one
        of them holds an ordinary request."""
        return sorted(set(self._policy_np[slots_np].tolist()))

    def can_abstain(self, slots_np: np.ndarray) -> bool:
        """Whether the head of one of these slots' requests may abstain."""
        has_threshold = self._options_np[slots_np, Column.THRESHOLD] > 0
        return bool((has_threshold & (self._policy_np[slots_np] >= PolicyIndex.FIRST_HEAD)).any())

    def start_phase(self, slot: int, token_ids: list[int], prompt_len: int) -> None:
        """Tell a two-phase request what its context already holds: is the thinking over?

        A generation prompt can carry the marker (a template that switches thinking off), and so can
        the output so far of a request that resumes. Call after `flush`.

        Args:
            token_ids: the prompt, and what a resumed request has generated.
            prompt_len: tokens in the prompt.
        """
        if self._policy_np[slot] == PolicyIndex.TWO_PHASE:
            self.phases.start_phase(slot, token_ids, prompt_len)

    def park(self, slot: int) -> ParkedChoice:
        """The sequence-level choice of a request that leaves its slot."""
        return ParkedChoice(self.chosen[slot].clone(), self.has_abstained[slot].clone())

    def restore(self, slot: int, parked: ParkedChoice) -> None:
        """Give a resumed request its earlier choice back. Call after `flush`."""
        self.chosen[slot].copy_(parked.chosen)
        self.has_abstained[slot].copy_(parked.has_abstained)

    def _make_counts(self, num_indices: int) -> torch.Tensor:
        shape = (num_indices, MAX_NUM_TEMPERATURES)
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def to_micro(temperatures: torch.Tensor) -> torch.Tensor:
    """Temperatures as int32 millionths, a half rounded up; -1 where a row is ordinary (NaN)."""
    micro = torch.floor(temperatures.double() * MILLION + 0.5)
    return torch.nan_to_num(micro, nan=float(ORDINARY)).to(torch.int32)


def _find_key(options: Options) -> tuple[PolicyName, str, int]:
    return options.policy, options.name, options.generation


def _wrap_seed(seed: int) -> int:
    """A seed as int64: vLLM gives the children of a request its seed, plus one each."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
