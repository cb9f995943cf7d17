"""Decisions on their way from the sampler to the API process.

They travel as vLLM's sampling masks, its one channel that carries a payload of varying length per
token and that vLLM itself slices by accepted tokens, trims at stop strings and merges over skipped
stream outputs. `DecisionTensors` stands where V2 expects its `SamplingMaskTensors`, and
`DecisionSender` where the scheduler expects `SamplingMaskLists`.

Decoding a mask costs the API process more than a token without one does, so a decision is sent
only where it differs from the one before. The mask of such a token is one record of int32: its
position in the answer, then the first fields of its `Decision`; those left out have their default.
`DecisionReader` gives the tokens without a mask the decision before theirs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from vllm.outputs import CompletionOutput
from vllm.v1.outputs import SamplingMaskLists

from adaptive_head.decision import NOT_SET, Decision, DecisionFlag
from adaptive_head.slots import ORDINARY
from adaptive_head.vllm.compat import check_parameters

# `DecisionSender` stands in for this one.
check_parameters(SamplingMaskLists.slice_request, "self", "req_idx", "num_positions")

# A decision before it is worth an object: most are equal to the one before.
Row = tuple[int, ...]
_NO_DECISION = Decision(ORDINARY)
# Of all fields but the temperature, which has none.
_DEFAULTS = Decision(0)[1:]
_MAX_RECORD_LEN = 1 + len(Decision._fields)


@dataclass(frozen=True)
class DecisionLists:
    """The decisions of one step's rows, in the order of the batch.

    Attributes:
        decisions: int32 [rows, num_fields], the first fields of a `Decision` as far as any row of
            the step needs them; the temperature of an ordinary request is ORDINARY. Rows of
            rejected drafts are included, and nobody asks for them. See `pack_decisions`.
        starts: int [num_requests + 1], each request's first row; None where all have one row.
    """

    decisions: np.ndarray
    starts: np.ndarray | None = None

    @cached_property
    def _rows(self) -> list[Row]:
        rows: list[Row] = [*map(tuple, self.decisions.tolist())]
        if (num_others := self.decisions.shape[1] - 1) == 0:
            return rows
        # The same decision is the same row, whatever else is in its step: it is not sent again.
        defaults = _DEFAULTS[:num_others]
        return [row[:1] if row[1:] == defaults else row for row in rows]

    def get(self, req_idx: int, num_positions: int) -> list[Row] | None:
        """The decisions of one request's new tokens; None for an ordinary request.

        Args:
            num_positions: how many of the step's tokens were kept.
        """
        start = req_idx if self.starts is None else int(self.starts[req_idx])
        rows = self._rows[start : start + num_positions]
        return None if rows[0][0] == ORDINARY else rows


def pack_decisions(micros: torch.Tensor, is_abstained: torch.Tensor | None) -> torch.Tensor:
    """A step's decisions, with as many fields as it needs.

    Args:
        micros: int32 [rows], temperatures in millionths.
        is_abstained: bool [rows]; None where none has, and temperatures are enough.

    Returns:
        int32 [rows, num_fields], where the arguments are.
    """
    if is_abstained is None:
        return micros.unsqueeze(1)
    decisions = micros.new_full((len(micros), len(Decision._fields)), NOT_SET)
    decisions[:, 0] = micros
    # Straight into its column: each tensor in between would be a launch of its own.
    torch.mul(is_abstained, int(DecisionFlag.ABSTAINED), out=decisions[:, -1])
    return decisions


@dataclass(frozen=True)
class DecisionTensors:
    """A step's decisions on the device, for vLLM to copy on its own output stream.

    Attributes:
        decisions: int32 [rows, num_fields], as in `DecisionLists`.
        starts: on the host.
    """

    decisions: torch.Tensor
    starts: np.ndarray | None = None

    def to_cpu_nonblocking(self) -> "DecisionTensors":
        """Start the copy to the host; vLLM waits for its event before `tolists`."""
        return DecisionTensors(self.decisions.to("cpu", non_blocking=True), self.starts)

    def tolists(self, _num_sampled: np.ndarray | None = None) -> DecisionLists:
        """The copied decisions."""
        return DecisionLists(self.decisions.numpy(), self.starts)


class DecisionSender:
    """Makes the masks that leave the engine, one for each change of a request's decision."""

    def __init__(self) -> None:
        # By request: how many tokens have been sent, and the last one's decision.
        self._sent: dict[str, tuple[int, Row]] = {}
        self._lists = DecisionLists(np.empty((0, 1), np.int32))
        self._request_ids: Sequence[str] = ()

    def begin_step(self, lists: DecisionLists, request_ids: Sequence[str]) -> "DecisionSender":
        """Send a step's decisions next.

        Args:
            request_ids: in the order of the batch.
        """
        self._lists, self._request_ids = lists, request_ids
        return self

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is known of requests that have ended, or were aborted."""
        for request_id in request_ids:
            self._sent.pop(request_id, None)

    def slice_request(self, req_idx: int, num_positions: int) -> SamplingMaskLists | None:
        """What the scheduler sends with one request's new tokens; see `DecisionLists.get`."""
        rows = self._lists.get(req_idx, num_positions)
        return None if rows is None else self.send(self._request_ids[req_idx], rows)

    def send(self, request_id: str, rows: list[Row]) -> SamplingMaskLists | None:
        """The masks of a request's next tokens; None where nothing has changed.

        Args:
            rows: one decision per token.
        """
        num_sent, last = self._sent.get(request_id, (0, _NO_DECISION))
        end = num_sent + len(rows)
        if rows.count(last) == len(rows):
            self._sent[request_id] = end, last
            return None
        self._sent[request_id] = end, rows[-1]
        records: list[int] = []
        offsets = [0]
        for position, row in enumerate(rows, num_sent):
            if row != last:
                records += position, *row
                last = row
            offsets.append(len(records))
        # vLLM slices by offsets where a step has made several tokens, and only there.
        is_single = len(rows) == 1
        return SamplingMaskLists(
            np.array(records, np.int32), None if is_single else np.array(offsets)
        )


class DecisionReader:
    """Reads the decisions of one answer's tokens, output by output."""

    __slots__ = ("_begin", "_decision", "_num_tokens")

    def __init__(self) -> None:
        self._num_tokens = self._begin = 0
        self._decision = _NO_DECISION

    def restart(self) -> None:
        """Continue with another answer, whose positions begin at 0."""
        self._begin, self._decision = self._num_tokens, _NO_DECISION

    def repeat(self, num_tokens: int) -> Decision:
        """The decision of an output's new tokens that came without a mask: the one before theirs.

        Raises:
            AssertionError: there is none.
        """
        assert self._decision is not _NO_DECISION, "a token came without a decision"
        self._num_tokens += num_tokens
        return self._decision

    def read(self, output: CompletionOutput) -> list[tuple[Decision, int]]:
        """Remove the decisions of an output's new tokens from it.

        Removed, because other readers of the field would take them for sampling masks.

        Returns:
            The decisions in order, and for how many tokens each holds.

        Raises:
            AssertionError: a token came without a decision, or a record without its token.
        """
        begin, runs = self._num_tokens, []
        self._num_tokens = end = begin + len(output.token_ids)
        if (mask := output.sampling_mask) is not None:
            output.sampling_mask = None
            for record in filter(None, mask.token_ids):
                assert 1 < len(record) <= _MAX_RECORD_LEN, "a mask is no record of a decision"
                position, *fields = record
                # Counted over all answers.
                place = self._begin + position
                assert begin <= place < end, "a decision came without its token"
                if begin < place:
                    runs.append((self._decision, place - begin))
                self._decision, begin = Decision(*fields), place
        if begin < end:
            runs.append((self._decision, end - begin))
        assert not runs or runs[0][0] is not _NO_DECISION, "a token came without a decision"
        return runs


def take_decisions(output: CompletionOutput) -> list[Decision] | None:
    """Remove and return the decisions of a whole answer's tokens.

    Returns:
        One per token of `output.token_ids`, or None where the output carries none.
    """
    if output.sampling_mask is None:
        return None
    runs = DecisionReader().read(output)
    return [decision for decision, count in runs for _ in range(count)]
