"""The ranks that sample the same rows, and so must divide them by the same temperatures.

Tensor and prefill-context parallel ranks hold the same hidden states and logits and sample for
themselves. Their temperatures may still differ: in the last bits of a reduction, or by the noise
of a request without a seed. So the first rank's count.
"""

from typing import TypeVar

import torch
from vllm.distributed import get_pcp_group, get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator

State = TypeVar("State")


def count_ranks() -> int:
    """How many ranks sample what this one samples, with this one."""
    return int(get_tp_group().world_size * get_pcp_group().world_size)


def adopt_choices(micros: torch.Tensor) -> None:
    """Overwrite temperatures with those of the first rank, on the current stream.

    Every one of these ranks must call it, for as many rows: what a step has is the same for all.

    Args:
        micros: int32 [rows], contiguous; of every rank the same rows.
    """
    # The first of each row of ranks, then of the rows: at last of all.
    for group in (get_tp_group(), get_pcp_group()):
        if group.world_size > 1:
            _broadcast(group, micros)


def gather_states(state: State) -> list[State]:
    """What each of these ranks says of itself. Waits for the slowest; not for a step."""
    states = [state]
    for group in (get_tp_group(), get_pcp_group()):
        if group.world_size > 1:
            parts: list[list[State]] = [[] for _ in range(group.world_size)]
            torch.distributed.all_gather_object(parts, states, group=group.cpu_group)
            states = [state for part in parts for state in part]
    return states


def _broadcast(group: GroupCoordinator, micros: torch.Tensor) -> None:
    # On a GPU by the communicator of vLLM's own collectives. `group.broadcast` would make torch
    # open a second one at the first adaptive request: memory that the KV cache has, and that
    # neither sleep nor a checkpoint of the process knows of.
    nccl = getattr(group.device_communicator, "pynccl_comm", None)
    if nccl is None or nccl.disabled:
        group.broadcast(micros, src=0)
    else:
        nccl.broadcast(micros, src=0)
