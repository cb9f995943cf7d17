"""A head as CUDA graphs against the same head run eagerly."""

import copy
from typing import Any

import torch

from adaptive_head.vllm.head_runner import (
    MAX_GRAPH_ROWS,
    HeadRunner,
    HiddenRows,
    SideStream,
    convert,
    round_up,
)
from tests.gpu.texts import make_heads, pick_sizes

NUM_ROWS = (1, 2, 3, 5, 8, 31, 64, 65, 100, 256, 300, 512, 600)
# Of the largest score. A graph runs the kernels that eager execution runs for as many rows.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def compare_replay(device: str) -> dict[str, Any]:
    """Two heads in turns, on rows that change, for many numbers of rows.

    Returns:
        How many runs were equal bit for bit, and the largest difference as a share of the largest
        score.
    """
    where = torch.device(device)
    sizes = pick_sizes(where)
    generator = torch.Generator(where).manual_seed(2)
    num_runs = num_equal = 0
    largest = 0.0
    for dtype, tolerance in TOLERANCES.items():
        rows = HiddenRows(sizes.hidden_size, MAX_GRAPH_ROWS, dtype, where, True)
        stream = SideStream(where)
        heads = list(make_heads(sizes).values())
        runners = [HeadRunner(head, rows, stream) for head in heads]
        computed = torch.float32 if where.type == "cpu" else dtype
        networks = [convert(copy.deepcopy(head), computed).to(where).eval() for head in heads]
        for num_rows in NUM_ROWS:
            shape = 2 * num_rows, sizes.hidden_size
            tokens = torch.randn(shape, generator=generator, device=where).to(dtype)
            indices = torch.randperm(2 * num_rows, generator=generator, device=where)[:num_rows]
            with torch.inference_mode(), stream.fork():
                hidden = rows.gather(tokens, indices)
                # Twice: what the second run of a head finds is what the other one has left.
                replayed = [runner.run(hidden)[:num_rows].clone() for runner in runners * 2]
            stream.join()
            is_graph = num_rows <= MAX_GRAPH_ROWS
            padded = rows.buffer[: round_up(num_rows)] if is_graph else tokens[indices]
            with torch.inference_mode():
                eager = [network(padded)[:num_rows] for network in networks * 2]
            for found, expected in zip(replayed, eager, strict=True):
                difference = ((found - expected).abs().max() / expected.abs().max()).item()
                assert difference <= tolerance, f"{dtype}, {num_rows} rows: off by {difference:.1e}"
                largest = max(largest, difference)
                num_equal += torch.equal(found, expected)
                num_runs += 1
    return {"runs": num_runs, "equal_bit_for_bit": num_equal, "largest_difference": largest}
