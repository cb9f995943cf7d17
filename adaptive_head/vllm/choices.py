"""The chosen temperatures on their way to the API process.

They ride in the place of vLLM's sampling masks, its one channel that carries a varying payload
a token and that vLLM itself slices by accepted tokens, trims at stop strings and merges over
skipped stream outputs. `ChoiceTensors` stands where V2 expects its `SamplingMaskTensors`, and
`ChoiceSender` where the scheduler expects `SamplingMaskLists`.

To decode a mask costs the API process more than a token without one, so a choice is sent only where
it differs from the one before: the mask of such a token is its choice and its position in the
answer, and `ChoiceReader` gives the tokens without a mask the choice before theirs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.outputs import CompletionOutput
from vllm.v1.outputs import SamplingMaskLists

from adaptive_head.slots import ORDINARY
from adaptive_head.vllm.compat import check_parameters

# `ChoiceSender` stands in for this one.
check_parameters(SamplingMaskLists.slice_request, "self", "req_idx", "num_positions")


class ChoiceLists:
    """The temperatures of one step's tokens, in the order of the batch.

    Args:
        micros: int32 [rows], millionths; -1 for an ordinary request. Rows of drafts that were
            rejected are among them, and are never asked for.
        starts: int [num_requests + 1], each request's first row; None where all have one.
    """

    __slots__ = ("_micros", "_starts")

    def __init__(self, micros: np.ndarray, starts: np.ndarray | None = None) -> None:
        self._micros: list[int] = micros.tolist()
        self._starts: list[int] | None = None if starts is None else starts.tolist()

    def get(self, req_idx: int, num_positions: int) -> list[int] | None:
        """The choices of one request's new tokens; None for an ordinary request.

        Args:
            num_positions: how many of the step's tokens were kept.
        """
        start = req_idx if self._starts is None else self._starts[req_idx]
        micros = self._micros[start : start + num_positions]
        return None if micros[0] == ORDINARY else micros

    def __reduce__(self) -> tuple[type["ChoiceLists"], tuple[np.ndarray, np.ndarray | None]]:
        starts = None if self._starts is None else np.array(self._starts)
        return ChoiceLists, (np.array(self._micros, np.int32), starts)


@dataclass(frozen=True)
class ChoiceTensors:
    """A step's temperatures on the device, for vLLM to copy on its own output stream.

    Attributes:
        micros: int32 [rows], as in `ChoiceLists`.
        starts: on the host, as in `ChoiceLists`.
    """

    micros: torch.Tensor
    starts: np.ndarray | None = None

    def to_cpu_nonblocking(self) -> "ChoiceTensors":
        """Start the copy to the host; vLLM waits for its event before `tolists`."""
        return ChoiceTensors(self.micros.to("cpu", non_blocking=True), self.starts)

    def tolists(self, _num_sampled: np.ndarray | None = None) -> ChoiceLists:
        """The copied choices."""
        return ChoiceLists(self.micros.numpy(), self.starts)


class ChoiceSender:
    """Makes the masks that leave the engine, one for each change of a request's choice."""

    def __init__(self) -> None:
        # How many tokens of a request have been sent, and the last one's choice.
        self._sent: dict[str, list[int]] = {}
        self._choices = ChoiceLists(np.empty(0, np.int32))
        self._request_ids: Sequence[str] = ()

    def begin_step(self, choices: ChoiceLists, request_ids: Sequence[str]) -> "ChoiceSender":
        """Send the choices of a step, whose requests these are in the order of the batch."""
        self._choices, self._request_ids = choices, request_ids
        return self

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended, or were aborted."""
        for request_id in request_ids:
            self._sent.pop(request_id, None)

    def slice_request(self, req_idx: int, num_positions: int) -> SamplingMaskLists | None:
        """What the scheduler sends with one request's new tokens; see `ChoiceLists.get`."""
        micros = self._choices.get(req_idx, num_positions)
        return None if micros is None else self.send(self._request_ids[req_idx], micros)

    def send(self, request_id: str, micros: list[int]) -> SamplingMaskLists | None:
        """The masks of a request's next tokens; None where nothing has changed.

        Args:
            micros: one choice a token.
        """
        sent = self._sent.setdefault(request_id, [0, ORDINARY])
        num_sent, last = sent
        sent[0] += len(micros)
        if micros.count(last) == len(micros):
            return None
        sent[1] = micros[-1]
        changes: list[int] = []
        offsets = [0]
        for position, micro in enumerate(micros, num_sent):
            if micro != last:
                changes += micro, position
                last = micro
            offsets.append(len(changes))
        # vLLM slices by offsets where a step has made several tokens, and only there.
        is_single = len(micros) == 1
        return SamplingMaskLists(
            np.array(changes, np.int32), None if is_single else np.array(offsets)
        )


class ChoiceReader:
    """Reads the choices of one answer's tokens, output by output.

    Attributes:
        num_tokens: how many there are so far.
    """

    __slots__ = ("_begin", "_changes", "_micro", "_num_taken", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0
        self._begin = 0
        self._num_taken = 0
        self._micro = ORDINARY
        # (choice, position of its first token), since the last call of `take`.
        self._changes: list[list[int]] = []

    def read(self, output: CompletionOutput) -> int:
        """Remove the choices of an output's new tokens from it.

        Removed, because other readers of the field would take them for sampling masks.

        Returns:
            How many new tokens there are.
        """
        num_new = len(output.token_ids)
        self.num_tokens += num_new
        if output.sampling_mask is not None:
            self._changes += filter(None, output.sampling_mask.token_ids)
            output.sampling_mask = None
        return num_new

    @property
    def unchanged(self) -> int | None:
        """The choice (millionths) of all tokens since the last call of `take`, if they have one."""
        return None if self._changes or self._micro == ORDINARY else self._micro

    def restart(self) -> None:
        """The answer goes on with another one, whose positions begin at 0; all has been taken."""
        self._begin, self._micro = self.num_tokens, ORDINARY

    def take(self) -> list[tuple[int, int]]:
        """The choices since the last call: millionths, in order, and for how many tokens each.

        Raises:
            AssertionError: a token came without a choice, or a choice without its token.
        """
        begin, runs = self._num_taken, []
        # At once, so that what is wrong is told once.
        changes, self._changes, self._num_taken = self._changes, [], self.num_tokens
        for micro, position in changes:
            place = self._begin + position
            assert begin <= place < self.num_tokens, "a temperature came without its token"
            if begin < place:
                runs.append((self._micro, place - begin))
            self._micro, begin = micro, place
        if begin < self.num_tokens:
            runs.append((self._micro, self.num_tokens - begin))
        assert not runs or runs[0][0] != ORDINARY, "a token came without temperature"
        return runs


def take_choices(output: CompletionOutput) -> list[int] | None:
    """Remove and return the temperatures of a whole answer's tokens, in millionths.

    Returns:
        One a token of `output.token_ids`, or None where the output carries none.
    """
    if output.sampling_mask is None:
        return None
    reader = ChoiceReader()
    reader.read(output)
    return [micro for micro, count in reader.take() for _ in range(count)]
