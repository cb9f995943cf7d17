"""One temperature a row, for a batch that mixes policies, heads, levels and bounds.

The engine's side of the layer, in plain torch: vLLM's samplers feed it and apply what it returns.
Requests live in slots. The host stages a request's options (`add`), the device chooses
(`select`); nothing in between waits for the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from adaptive_head import policies
from adaptive_head.head import AdaptiveHead, gumbel_noise, select_argmax, select_sample
from adaptive_head.options import Options, PolicyName
from adaptive_head.phases import PhaseTracker
from adaptive_head.transfer import upload

# Temperatures travel to the API process as integers: exact in decimal, and small on the wire.
MICRO = 1_000_000
ORDINARY = -1


class Column(IntEnum):
    """Columns of the table of options, one row a slot."""

    IS_SEQUENCE = 0
    IS_SAMPLED = 1
    SCALE = 2
    MIN = 3
    MAX = 4
    PARAMETER_0 = 5
    PARAMETER_1 = 6
    PARAMETER_2 = 7


@dataclass(frozen=True)
class Step:
    """What the policies may look at, for the rows of one sampling step.

    Attributes:
        slots: int64 [rows], the slot of each row's request; `slots_np` the same on the host.
        hidden: [rows, d], the tensor that enters the LM head, in the model's dtype.
        logits: float32 [rows, vocabulary], after masks, bias and penalties; not modified.
        input_ids: int64 [rows], the token that was fed at each row's position.
        positions: int64 [rows], its position in the sequence.
        prompt_lens: int64 [rows], tokens in the prompt.
        is_ready: bool [rows], False for a row whose prefill is unfinished: it samples nothing.
    """

    slots: torch.Tensor
    slots_np: np.ndarray
    hidden: torch.Tensor
    logits: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    prompt_lens: torch.Tensor
    is_ready: torch.Tensor


# Temperatures float32 [rows], from a step and its rows of the table of options.
Policy = Callable[[Step, torch.Tensor], torch.Tensor]


class TemperatureSelector:
    """Chooses temperatures for the requests in its slots.

    Args:
        heads: loaded heads by name, of generation 0; moved to `device`.
        num_slots: how many requests can be tracked at once.
        device: where the sampler's tensors live.
    """

    def __init__(
        self, heads: Mapping[str, AdaptiveHead], num_slots: int, device: torch.device
    ) -> None:
        self.device = device
        self._policies: list[Policy] = []
        # By policy, name and generation; see `Options`.
        self._policy_index: dict[tuple[PolicyName, str, int], int] = {}
        self._add_policy("entropy", "entropy", 0, self._entropy)
        self._add_policy("schedule", "schedule", 0, self._schedule)
        self._two_phase_index = self._add_policy("two_phase", "two_phase", 0, self._two_phase)
        self._add_policy("constant", "constant", 0, self._constant)
        for name, head in heads.items():
            self.add_head(name, 0, head)

        self._options_np = np.zeros((num_slots, len(Column)), dtype=np.float32)
        self._policy_np = np.full(num_slots, ORDINARY, dtype=np.int32)
        self._seeds_np = np.zeros(num_slots, dtype=np.int64)
        self._staged: set[int] = set()

        self._options = torch.zeros((num_slots, len(Column)), device=device)
        self._seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # What a sequence-level request has chosen, NaN until it has.
        self._chosen = torch.full((num_slots,), torch.nan, device=device)
        self._phases = PhaseTracker(num_slots, device)

    def add_head(self, name: str, generation: int, head: AdaptiveHead) -> None:
        """Serve a head from now on, beside earlier generations of its name."""
        self._add_policy("head", name, generation, self._make_head_policy(head))

    def remove_head(self, name: str, generation: int) -> None:
        """Forget a head, if it is there. No request that will be answered may have it."""
        index = self._policy_index.pop(("head", name, generation), None)
        if index is not None:
            # Never given out again: a step of an aborted request may still be under way.
            self._policies[index] = self._forgotten

    def has_head(self, name: str, generation: int) -> bool:
        return ("head", name, generation) in self._policy_index

    def can_serve(self, options: Options) -> bool:
        """Whether the policy and the head of these options are here."""
        return self._find_key(options) in self._policy_index

    def grow(self) -> range:
        """Double the number of slots, keeping what they hold.

        Returns:
            The new slots.
        """
        num_slots = len(self._policy_np)
        self._options_np = np.concatenate([self._options_np, np.zeros_like(self._options_np)])
        self._policy_np = np.concatenate([self._policy_np, np.full(num_slots, ORDINARY, np.int32)])
        self._seeds_np = np.concatenate([self._seeds_np, np.zeros_like(self._seeds_np)])
        self._options = torch.cat([self._options, torch.zeros_like(self._options)])
        self._seeds = torch.cat([self._seeds, torch.zeros_like(self._seeds)])
        self._chosen = torch.cat([self._chosen, torch.full_like(self._chosen, torch.nan)])
        self._phases.grow()
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
        if options is None:
            self._policy_np[slot] = ORDINARY
            return False
        policy = self._policy_index[self._find_key(options)]
        row = np.zeros(len(Column), dtype=np.float32)
        row[Column.IS_SEQUENCE] = options.level == "sequence"
        row[Column.IS_SAMPLED] = options.select == "sample"
        row[Column.SCALE] = options.scale
        row[Column.MIN] = options.min
        row[Column.MAX] = options.max
        row[Column.PARAMETER_0 : Column.PARAMETER_0 + len(options.parameters)] = options.parameters
        self._options_np[slot] = row
        self._policy_np[slot] = policy
        self._seeds_np[slot] = np.random.randint(1 << 63) if seed is None else _wrap_seed(seed)
        self._staged.add(slot)
        if options.policy == "two_phase":
            self._phases.add(slot, options.marker_token_ids, options.start_token_ids)
        return True

    def flush(self) -> None:
        """Copy what was staged to the device, without waiting for it."""
        if not self._staged:
            return
        slots_np = np.fromiter(self._staged, dtype=np.int64)
        self._staged.clear()
        slots = upload(slots_np, self.device)
        options = upload(self._options_np[slots_np], self.device)
        self._options.index_copy_(0, slots, options)
        self._seeds.index_copy_(0, slots, upload(self._seeds_np[slots_np], self.device))
        self._chosen.index_fill_(0, slots, torch.nan)
        self._phases.flush()

    def is_adaptive(self, slot: int) -> bool:
        """Whether the slot holds an adaptive request."""
        return bool(self._policy_np[slot] != ORDINARY)

    def has_adaptive(self, slots_np: np.ndarray) -> bool:
        """Whether any of these slots holds an adaptive request."""
        return bool((self._policy_np[slots_np] != ORDINARY).any())

    def start_phase(self, slot: int, token_ids: list[int]) -> None:
        """Tell a two-phase request what its context already holds: is the thinking over?

        A prompt can carry the marker (a template that switches thinking off), and so can the
        output so far of a request that resumes. Call after `flush`.
        """
        if self._policy_np[slot] == self._two_phase_index:
            self._phases.start_phase(slot, token_ids)

    def park(self, slot: int) -> torch.Tensor:
        """The sequence-level choice of a request that leaves its slot; float32, 0-d, on device."""
        return self._chosen[slot].clone()

    def restore(self, slot: int, chosen: torch.Tensor) -> None:
        """Give a resumed request its earlier choice back. Call after `flush`."""
        self._chosen[slot].copy_(chosen)

    def select(self, step: Step) -> torch.Tensor | None:
        """Choose a temperature for every row.

        Returns:
            float32 [rows] on the device, NaN for rows of ordinary requests, or None where all
            rows are ordinary. Values are whole multiples of 1e-6.
        """
        present = np.unique(self._policy_np[step.slots_np])
        present = present[present != ORDINARY]
        if not len(present):
            return None
        options = self._options[step.slots]
        temperatures = self._run_policies(step, options, present)
        temperatures = (temperatures * options[:, Column.SCALE]).clamp(
            options[:, Column.MIN], options[:, Column.MAX]
        )
        temperatures = torch.round(temperatures * MICRO) / MICRO
        if self._options_np[step.slots_np, Column.IS_SEQUENCE].any():
            temperatures = self._keep_sequence_choice(step, options, temperatures)
        return temperatures

    def _run_policies(self, step: Step, options: torch.Tensor, present: np.ndarray) -> torch.Tensor:
        is_pure = len(present) == 1 and (self._policy_np[step.slots_np] != ORDINARY).all()
        if is_pure:
            return self._policies[present[0]](step, options)
        temperatures = torch.full((len(options),), torch.nan, device=self.device)
        # A slot that now holds an ordinary request may still have an adaptive one's options.
        policy = upload(self._policy_np[step.slots_np], self.device)
        for index in present:
            chosen = self._policies[index](step, options)
            temperatures = torch.where(policy == int(index), chosen, temperatures)
        return temperatures

    def _keep_sequence_choice(
        self, step: Step, options: torch.Tensor, temperatures: torch.Tensor
    ) -> torch.Tensor:
        """Eq. 8 of arXiv 2411.09661: the choice at the last prompt token holds for the answer."""
        is_sequence = (options[:, Column.IS_SEQUENCE] != 0) & ~temperatures.isnan()
        earlier = self._chosen[step.slots]
        temperatures = torch.where(is_sequence & ~earlier.isnan(), earlier, temperatures)
        self._chosen[step.slots] = torch.where(is_sequence & step.is_ready, temperatures, earlier)
        return temperatures

    @staticmethod
    def _find_key(options: Options) -> tuple[PolicyName, str, int]:
        return options.policy, options.name, options.generation

    def _add_policy(self, kind: PolicyName, name: str, generation: int, policy: Policy) -> int:
        index = self._policy_index[kind, name, generation] = len(self._policies)
        self._policies.append(policy)
        return index

    def _make_head_policy(self, head: AdaptiveHead) -> Policy:
        head = head.to(self.device).eval()
        table = torch.tensor(head.config.temperatures, device=self.device)

        def choose(step: Step, options: torch.Tensor) -> torch.Tensor:
            logits = head(step.hidden)
            choice = select_argmax(logits)
            if self._options_np[step.slots_np, Column.IS_SAMPLED].any():
                noise = gumbel_noise(self._seeds[step.slots], step.positions, len(table))
                is_sampled = options[:, Column.IS_SAMPLED] != 0
                choice = torch.where(is_sampled, select_sample(logits, noise), choice)
            return table[choice]

        return choose

    @staticmethod
    def _entropy(step: Step, options: torch.Tensor) -> torch.Tensor:
        return policies.entropy_temperature(
            step.logits, options[:, Column.PARAMETER_0], options[:, Column.PARAMETER_1]
        )

    @staticmethod
    def _schedule(step: Step, options: torch.Tensor) -> torch.Tensor:
        num_generated = step.positions + 1 - step.prompt_lens
        return policies.schedule_temperature(
            num_generated,
            options[:, Column.PARAMETER_0],
            options[:, Column.PARAMETER_1],
            options[:, Column.PARAMETER_2],
        )

    def _two_phase(self, step: Step, options: torch.Tensor) -> torch.Tensor:
        is_answer = self._phases.step(step.slots, step.input_ids, step.is_ready)
        return policies.two_phase_temperature(
            is_answer, options[:, Column.PARAMETER_0], options[:, Column.PARAMETER_1]
        )

    @staticmethod
    def _forgotten(_step: Step, options: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(options[:, 0])

    @staticmethod
    def _constant(_step: Step, options: torch.Tensor) -> torch.Tensor:
        return options[:, Column.PARAMETER_0]


def _wrap_seed(seed: int) -> int:
    """A seed as int64: vLLM gives the children of a request its seed, plus one each."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def to_micro(temperatures: torch.Tensor) -> torch.Tensor:
    """Temperatures as int32 millionths, -1 where a row is ordinary (NaN)."""
    micro = torch.round(temperatures.double() * MICRO)
    return torch.nan_to_num(micro, nan=float(ORDINARY)).to(torch.int32)
