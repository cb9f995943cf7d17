"""Steps of the device's selector over `Texts`: batches as vLLM's V2 runner describes them."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from adaptive_head.slots import ORDINARY
from adaptive_head.vllm.head_runner import HiddenRows
from adaptive_head.vllm.kernels import Batch, scale_logits
from adaptive_head.vllm.selector_v2 import DeviceSelector
from tests.gpu.texts import MARKER, PROMPT_LEN, Texts


def can_capture(device: torch.device) -> bool:
    """Whether heads run as CUDA graphs there."""
    return device.type == "cuda"


def make_selector(
    texts: Texts, has_graphs: bool, max_rows: int, names: Iterable[str] | None = None
) -> DeviceSelector:
    """A selector with room for every request twice.

    Args:
        names: of the heads that it has at first; None for all.
    """
    width, dtype = texts.hidden.shape[-1], texts.hidden.dtype
    rows = HiddenRows(width, max_rows, dtype, texts.device, has_graphs)
    heads = {name: texts.networks[name] for name in (texts.networks if names is None else names)}
    selector = DeviceSelector(heads, 2 * texts.num_requests, rows)
    selector.warm_up(texts.logits.shape[-1])
    return selector


@dataclass(frozen=True)
class Place:
    """Where a request is: it is fed the token at `position`, then `num_right` drafts that are its
    next ones, then `num_wrong` that are not. Nothing is sampled before the prefill is over."""

    request: int
    slot: int
    position: int
    num_right: int = 0
    num_wrong: int = 0
    is_sampled: bool = True


@dataclass(frozen=True)
class PreparedStep:
    """Everything that a step takes, on the device, so that to run it needs nothing of the host."""

    batch: Batch
    hidden_states: torch.Tensor
    logits: torch.Tensor
    num_sampled: torch.Tensor
    # Row, request and position of each row that becomes a token.
    sampled: np.ndarray


class Walk:
    """Leads requests through their texts on the device, and through its slots.

    Attributes:
        positions: by request, where its next token is fed.
    """

    def __init__(self, texts: Texts, selector: DeviceSelector, seed: int = 0) -> None:
        self.texts, self.selector = texts, selector
        self.rng = random.Random(seed)
        self.positions = [PROMPT_LEN - 1] * texts.num_requests
        num_slots = 2 * texts.num_requests
        self._prefill_lens = np.full(num_slots, PROMPT_LEN, dtype=np.int32)
        self._free = list(range(num_slots))
        self.rng.shuffle(self._free)
        self.slots: dict[int, int] = {}

    @property
    def unfinished(self) -> list[int]:
        """The admitted requests whose texts go on."""
        return [r for r in self.slots if self.positions[r] < self.texts.num_tokens]

    def admit(self, requests: Iterable[int]) -> None:
        """Put requests into free slots."""
        new = {request: self._free.pop() for request in requests}
        self.slots |= new
        self._enter(new)

    def restart(self) -> None:
        """Let every request begin its text again, in the slot that it has."""
        self.positions = [PROMPT_LEN - 1] * len(self.positions)
        self._enter(self.slots)

    def _enter(self, requests: Iterable[int]) -> None:
        for request in requests:
            options, seed = self.texts.options[request], self.texts.seeds[request]
            self.selector.add(self.slots[request], options, seed)
        self.selector.flush()
        for request in requests:
            num_fed = self.positions[request] + 1
            slot = self.slots[request]
            self._prefill_lens[slot] = num_fed
            tokens = self.texts.tokens[request, :num_fed].tolist()
            self.selector.start_phase(slot, tokens, PROMPT_LEN)

    def move(self, request: int, slot: int | None = None) -> None:
        """Preempt a request, and let it resume in another slot.

        Args:
            slot: which one; None for any.
        """
        old = self.slots[request]
        chosen = self.selector.park(old)
        self.selector.add(old, None, None)
        self.slots[request] = self._free.pop(-1 if slot is None else self._free.index(slot))
        self._free.insert(0, old)
        self._enter([request])
        self.selector.restore(self.slots[request], chosen)

    def place(self, request: int, has_drafts: bool = False) -> Place:
        """The request's next place, drafts drawn at random, and go past it."""
        position, slot = self.positions[request], self.slots[request]
        num_right = num_wrong = 0
        if has_drafts and position >= PROMPT_LEN:
            num_right = min(self.rng.randrange(4), self.texts.num_tokens - 1 - position)
            num_wrong = self.rng.randrange(3)
        self.positions[request] += num_right + 1
        return Place(request, slot, position, num_right, num_wrong)

    def prepare(self, places: list[Place], has_drafts: bool = False) -> PreparedStep:
        """Describe a step, with NaN wherever nothing may be read."""
        texts, device = self.texts, self.texts.device
        counts = np.array([1 + one.num_right + one.num_wrong for one in places])
        starts_np = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        num_rows = int(starts_np[-1])
        requests = np.repeat([one.request for one in places], counts)
        offsets = np.arange(num_rows) - np.repeat(starts_np[:-1], counts)
        positions = np.repeat([one.position for one in places], counts) + offsets
        is_right = offsets <= np.repeat([one.num_right for one in places], counts)
        shown = np.minimum(positions, texts.num_tokens - 1)
        # Rows lie among tokens from which nothing is sampled.
        indices = 2 * np.arange(num_rows) + 1
        input_ids = np.full(2 * num_rows + 3, MARKER, dtype=np.int32)
        input_ids[indices] = np.where(is_right, texts.tokens[requests, shown], MARKER)
        all_positions = np.full(2 * num_rows + 3, 1 << 40)
        all_positions[indices] = positions
        slots_np = np.array([one.slot for one in places])
        num_sampled = [(1 + one.num_right) * one.is_sampled for one in places]

        def upload(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        hidden = texts.hidden[requests, shown].clone()
        is_shown = is_right & np.repeat([one.is_sampled for one in places], counts)
        hidden[upload(~is_shown)] = torch.nan
        hidden_states = hidden.new_full((len(input_ids), hidden.shape[-1]), torch.nan)
        hidden_states[upload(indices)] = hidden
        batch = Batch(
            slots=upload(slots_np),
            slots_np=slots_np,
            row_slots=upload(np.repeat(slots_np, counts)),
            starts=upload(starts_np),
            starts_np=starts_np if has_drafts else None,
            logits_indices=upload(indices),
            input_ids=upload(input_ids),
            positions=upload(all_positions),
            prompt_lens=upload(np.full_like(self._prefill_lens, PROMPT_LEN)),
            prefill_lens=upload(self._prefill_lens.copy()),
        )
        rows = np.flatnonzero(is_shown)
        return PreparedStep(
            batch=batch,
            hidden_states=hidden_states,
            logits=texts.logits[requests, shown].clone(),
            num_sampled=upload(np.array(num_sampled, dtype=np.int32)),
            sampled=np.stack([rows, requests[rows], positions[rows]], axis=1),
        )


def run_step(selector: DeviceSelector, step: PreparedStep) -> torch.Tensor | None:
    """Run a step as the V2 runner does, the logits in two parts where there are drafts.

    Returns:
        int32 [rows], millionths; None for a step of ordinary requests.
    """
    found = selector.begin(step.hidden_states, step.batch)
    if found is None:
        return None
    num_rows = step.batch.num_rows
    starts = step.batch.starts_np
    middle = 0 if starts is None else int(starts[len(starts) // 2])
    for first, end in ((0, middle), (middle, num_rows)):
        if first < end:
            logits = step.logits[first:end]
            found.join()
            found.choose_by_logits(logits, first)
            scale_logits(logits, found.micros, first)
    found.end(step.num_sampled)
    return found.micros


class Record:
    """Collects what was chosen, and compares it with what should have been.

    Args:
        expected: int32 [requests, tokens], of `run_plain`.
        tolerances: of `find_tolerances`.
    """

    def __init__(self, expected: np.ndarray, tolerances: np.ndarray) -> None:
        self._expected, self._tolerances = expected, tolerances
        self._steps: list[tuple[np.ndarray, torch.Tensor | None]] = []

    def add(self, step: PreparedStep, micros: torch.Tensor | None) -> None:
        self._steps.append((step.sampled, micros))

    def compare(self) -> dict[str, float]:
        """Wait for the device.

        Returns:
            How many rows were compared, and by how many millionths the continuous ones differ.

        Raises:
            AssertionError: a temperature differs by more than it may.
        """
        num_rows, largest = 0, 0.0
        for sampled, micros in self._steps:
            rows, requests, positions = sampled.T
            expected = self._expected[requests, positions].astype(np.int64)
            if micros is None:
                assert (expected == ORDINARY).all(), "a step with adaptive requests chose nothing"
                continue
            found = micros.cpu().numpy()[rows].astype(np.int64)
            absolute, relative = self._tolerances[requests].T
            difference = np.abs(found - expected)
            wrong = np.flatnonzero(difference > absolute + relative * np.abs(expected))
            if len(wrong):
                first = wrong[0]
                raise AssertionError(
                    f"{len(wrong)} of {len(rows)} rows: request {requests[first]} at position "
                    f"{positions[first]} has {found[first]}, not {expected[first]} millionths"
                )
            num_rows += len(rows)
            largest = max(largest, float(difference.max(initial=0)))
        assert num_rows > 0, "nothing was compared"
        return {"rows": num_rows, "largest_difference": largest}
