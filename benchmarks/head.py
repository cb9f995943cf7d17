"""What a head costs by itself: a model of bytes, operations and launches, against measured times.

On a GPU a head is one CUDA graph, on a CPU it computes in float32, as in the server. Prints JSON.
docs/scale.md says what the figures mean.

    python -m benchmarks.head --hidden-size 4096 --rows 1,32,256
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

import torch
import typer

from adaptive_head import AdaptiveHead, HeadConfig
from adaptive_head.vllm.head_runner import HeadRunner, HiddenRows, SideStream

# More than any cache holds. A step reads the model's weights between two uses of a head's.
FLUSH_BYTES = 1 << 28
NUM_TIMES = 30
MAX_SECONDS = 3.0


@dataclass(frozen=True)
class Cost:
    """What a network of linear layers reads, computes and launches.

    Attributes:
        num_parameters: weights and biases.
        num_bytes: of them, all of which are read in every step.
        flops_per_row: floating-point operations of the products.
        num_kernels: a product with its bias for each layer, a SiLU between two, and a cast.
    """

    num_parameters: int
    num_bytes: int
    flops_per_row: int
    num_kernels: int


@dataclass(frozen=True)
class Rates:
    """What the device does, measured here.

    Attributes:
        bytes_per_s: read from memory, by one vector times a matrix.
        flops_per_s: by a product of large square matrices.
        seconds_a_kernel: of a chain of kernels that do nothing.
    """

    bytes_per_s: float
    flops_per_s: float
    seconds_a_kernel: float


def count_cost(
    widths: tuple[int, ...], bytes_per_weight: int, bytes_per_last_weight: int | None = None
) -> Cost:
    """The cost of the layers between `widths`, from the hidden size to K.

    Args:
        bytes_per_last_weight: of the last layer, where it differs: a head's is float32.
    """
    num_weights = sum(wide * narrow for wide, narrow in pairwise(widths))
    num_parameters = num_weights + sum(widths[1:])
    num_bytes = num_parameters * bytes_per_weight
    if bytes_per_last_weight is not None:
        num_last = (widths[-2] + 1) * widths[-1]
        num_bytes += num_last * (bytes_per_last_weight - bytes_per_weight)
    return Cost(num_parameters, num_bytes, 2 * num_weights, 2 * (len(widths) - 1))


def predict(cost: Cost, num_rows: int, rates: Rates) -> float:
    """Seconds: memory or arithmetic, whichever takes longer, and the launches."""
    memory_s = cost.num_bytes / rates.bytes_per_s
    arithmetic_s = cost.flops_per_row * num_rows / rates.flops_per_s
    return max(memory_s, arithmetic_s) + cost.num_kernels * rates.seconds_a_kernel


class Clock:
    """Median seconds of something on a device, each time from a cold cache."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)

    def time(self, run: Callable[[], object]) -> float:
        """Seconds a call."""
        for _ in range(2):
            run()
        times: list[float] = []
        while len(times) < NUM_TIMES and sum(times) < MAX_SECONDS:
            times.append(self._time_once(run))
        return median(times)

    def _time_once(self, run: Callable[[], object]) -> float:
        self._flush.add_(1.0)
        if not self._is_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def measure_rates(clock: Clock, dtype: torch.dtype, device: torch.device) -> Rates:
    """What this device reads, computes and launches in a second."""
    wide = torch.zeros(8192, 8192, dtype=dtype, device=device)
    row = torch.zeros(1, 8192, dtype=dtype, device=device)
    square = wide[:2048, :2048].contiguous()
    small = torch.zeros(8, dtype=dtype, device=device)
    num_kernels = 100

    def launch() -> None:
        for _ in range(num_kernels):
            torch.nn.functional.silu(small, inplace=True)

    if device.type == "cuda":
        launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        seconds_a_kernel = clock.time(graph.replay) / num_kernels
    else:
        seconds_a_kernel = clock.time(launch) / num_kernels
    num_bytes = wide.numel() * wide.element_size()
    return Rates(
        bytes_per_s=num_bytes / clock.time(lambda: torch.nn.functional.linear(row, wide)),
        flops_per_s=2 * 2048**3 / clock.time(lambda: square @ square),
        seconds_a_kernel=seconds_a_kernel,
    )


def main(
    hidden_size: Annotated[int, typer.Option(help="d of the model.", min=1)] = 4096,
    layers: Annotated[str, typer.Option(help="Widths of the head's layers.")] = "2048,2048",
    num_temperatures: Annotated[int, typer.Option(help="K.", min=2, max=64)] = 6,
    vocab_size: Annotated[int, typer.Option(help="Of the LM head to compare.", min=1)] = 128256,
    rows: Annotated[str, typer.Option(help="Rows of a step.")] = "1,8,32,128,256",
) -> None:
    """Print predicted and measured microseconds of a head, and of the LM head beside it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    num_rows = [int(size) for size in rows.split(",")]
    temperatures = tuple(index / 32 for index in range(num_temperatures))
    config = HeadConfig(hidden_size, temperatures, tuple(map(int, layers.split(","))))
    cost = count_cost(config.widths, dtype.itemsize, 4)
    lm_head_cost = count_cost((hidden_size, vocab_size), dtype.itemsize)
    with torch.inference_mode():
        clock = Clock(device)
        rates = measure_rates(clock, dtype, device)
        stream = SideStream(device)
        buffer = HiddenRows(hidden_size, max(num_rows), dtype, device, device.type == "cuda")
        runner = HeadRunner(AdaptiveHead(config), buffer, stream)
        lm_head = torch.zeros(vocab_size, hidden_size, dtype=dtype, device=device)
        hidden = torch.zeros(max(num_rows), hidden_size, dtype=dtype, device=device)

        def time_head(size: int) -> float:
            indices = torch.arange(size, device=device)
            return clock.time(lambda: runner.run(buffer.gather(hidden, indices)))

        def time_lm_head(size: int) -> float:
            return clock.time(lambda: torch.nn.functional.linear(hidden[:size], lm_head))

        times = {
            size: {
                "head": compare(cost, size, rates, time_head(size)),
                "lm_head": compare(lm_head_cost, size, rates, time_lm_head(size)),
            }
            for size in num_rows
        }
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "num_threads": None if device.type == "cuda" else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "widths": config.widths,
        "cost": asdict(cost),
        "rates": {name: float(f"{value:.3g}") for name, value in asdict(rates).items()},
        "microseconds": times,
    }
    print(json.dumps(result, indent=1))


def compare(cost: Cost, num_rows: int, rates: Rates, measured_s: float) -> dict[str, Any]:
    """Microseconds as the model has them, and as they were."""
    predicted_s = predict(cost, num_rows, rates)
    return {
        "predicted": round(predicted_s * 1e6, 1),
        "measured": round(measured_s * 1e6, 1),
    }


if __name__ == "__main__":
    typer.run(main)
