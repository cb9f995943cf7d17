"""What a head costs next to an LM head: steps with and without it in turns."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from adaptive_head.vllm.head_runner import HiddenRows
from adaptive_head.vllm.kernels import Batch, scale_logits
from adaptive_head.vllm.selector_v2 import DeviceSelector
from tests.gpu.steps import can_capture
from tests.gpu.texts import Sizes, make_head, make_options

BATCHES = (1, 32, 256)
# The LM head of an 8B Llama, and the paper's layers.
LARGE = Sizes(0, 128_256, 4096, (2048, 2048), ())
SMALL = Sizes(0, 512, 64, (32, 32), ())
NUM_PAIRS = 40
# Steps of a run.
NUM_STEPS = 10
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Clock:
    """Seconds of device time.

    The device first waits for as long as the host takes to queue a run, so that the host's time
    does not count: in a server a step's launches are queued while the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._wait_cycles = 0
        # What the host takes to queue a run, and runs in which it was behind nevertheless.
        self.host_s = 0.0
        self.num_late = 0

    def calibrate(self, run: Callable[[], None]) -> None:
        """Let the device wait twice as long as the host takes for a run."""
        run()
        self._synchronise()
        begin = time.perf_counter()
        run()
        self.host_s = time.perf_counter() - begin
        self._synchronise()
        # No clock is above 3 GHz.
        self._wait_cycles = int(2 * self.host_s * 3e9) + 1_000_000

    def measure(self, run: Callable[[], None]) -> float:
        """Seconds that a run takes."""
        if not self._is_cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._wait_cycles)
        first.record()
        run()
        self.num_late += first.query()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def _synchronise(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


def measure(device: str) -> dict[str, Any]:
    """Time the LM head, and the division of its logits by temperatures, without a head and with.

    Returns:
        By batch size: microseconds of a step without a head, how many more it takes with one
        (median, quartiles), the ratio (median), the host's microseconds of a step with a head, and
        runs in which the host was too slow for a figure of the device.
    """
    where = torch.device(device)
    sizes = LARGE if where.type == "cuda" else SMALL
    generator = torch.Generator(where).manual_seed(0)
    weight = torch.randn(sizes.vocab_size, sizes.hidden_size, generator=generator, device=where)
    weight = (weight / sizes.hidden_size**0.5).bfloat16()
    return {str(batch): _measure_batch(batch, weight, sizes) for batch in BATCHES}


def _measure_batch(batch: int, weight: torch.Tensor, sizes: Sizes) -> dict[str, Any]:
    where = weight.device
    hidden = torch.randn(batch, sizes.hidden_size, device=where).bfloat16()
    selector, described = _make_selector(batch, hidden, sizes)
    temperatures = torch.full((batch, 1), 0.7, device=where)

    def run_fixed() -> None:
        for _ in range(NUM_STEPS):
            logits = torch.nn.functional.linear(hidden, weight).float()
            logits.div_(temperatures)

    def run_adaptive() -> None:
        for _ in range(NUM_STEPS):
            step = selector.begin(hidden, described)
            assert step is not None
            logits = torch.nn.functional.linear(hidden, weight).float()
            step.join()
            step.choose_by_logits(logits, 0)
            scale_logits(logits, step.micros, 0)
            step.end(described.prefill_lens)

    runs = {"fixed": run_fixed, "adaptive": run_adaptive}
    clock, rng = Clock(where), random.Random(batch)
    pairs: list[dict[str, float]] = []
    with torch.inference_mode():
        for run in runs.values():
            run()
        clock.calibrate(run_adaptive)
        for _ in range(NUM_PAIRS):
            order = rng.sample(sorted(runs), 2)
            # There and back, so that a drift meets both alike.
            times = [(name, clock.measure(runs[name])) for name in order + order[::-1]]
            pairs.append({name: sum(s for n, s in times if n == name) / 2 for name in runs})
    extra = [(pair["adaptive"] - pair["fixed"]) * 1e6 / NUM_STEPS for pair in pairs]
    low, middle, high = statistics.quantiles(extra, n=4)
    return {
        "fixed_us": _round(statistics.median(pair["fixed"] for pair in pairs) * 1e6 / NUM_STEPS),
        "extra_us": _round(middle),
        "extra_us_quartiles": [_round(low), _round(high)],
        "ratio": round(statistics.median(p["adaptive"] / p["fixed"] for p in pairs), 4),
        "host_us": _round(clock.host_s * 1e6 / NUM_STEPS),
        "late_runs": clock.num_late,
    }


def _make_selector(batch: int, hidden: torch.Tensor, sizes: Sizes) -> tuple[DeviceSelector, Batch]:
    """A selector whose slots all have one head, and a step that has one row per slot."""
    where = hidden.device
    rows = HiddenRows(sizes.hidden_size, batch, hidden.dtype, where, can_capture(where))
    selector = DeviceSelector({"h": make_head(sizes, TEMPERATURES, 0)}, batch, rows)
    selector.warm_up(sizes.vocab_size)
    for slot in range(batch):
        selector.add(slot, make_options("head", name="h"), seed=slot)
    selector.flush()
    slots = torch.arange(batch, device=where)
    ones = torch.ones(batch, dtype=torch.int32, device=where)
    described = Batch(
        slots=slots,
        slots_np=slots.cpu().numpy(),
        row_slots=slots,
        starts=torch.arange(batch + 1, dtype=torch.int32, device=where),
        starts_np=None,
        logits_indices=slots,
        input_ids=ones,
        positions=slots + 1,
        prompt_lens=ones,
        prefill_lens=ones,
    )
    return selector, described


def _round(value: float) -> float:
    return float(f"{value:.4g}")
