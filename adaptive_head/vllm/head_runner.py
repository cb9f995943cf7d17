"""A head on the device: alongside the LM head on a stream of its own, as CUDA graphs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from adaptive_head.head import AdaptiveHead

# Larger batches are no longer launch-bound, so they run without a graph.
MAX_GRAPH_ROWS = 512


class SideStream:
    """A stream beside the current one. On a CPU there is one order only, and nothing to wait for.

    What is queued inside `fork` begins after what the current stream has been given; `join` lets
    the current stream wait for it. Its priority is high: a head is a few small products, which
    would otherwise queue behind every block of the LM head's.
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device, priority=-1) if is_cuda else None
        # One pool for the graphs of all heads: they run one after the other, and what one head has
        # chosen is read before the next begins.
        self._pool = torch.cuda.graph_pool_handle() if is_cuda else None
        # Never destroyed. A pool without graphs is dead, and destroying a graph frees the cuBLAS
        # workspace of its stream, which all graphs captured on that stream keep writing to
        # (pytorch/pytorch#193402). A removed head's outputs and weights are freed nevertheless.
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._is_forked = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Queue on the side stream."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        self._is_forked = True
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for what has been forked since the last time."""
        if self._is_forked:
            assert self.stream is not None
            torch.cuda.current_stream().wait_stream(self.stream)
            self._is_forked = False

    def capture(
        self, compute: Callable[[], torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Record as a graph what `compute` queues. Call inside `fork`.

        Returns:
            The graph, and the tensor that `compute` returned, which each replay overwrites.

        Raises:
            Whatever `compute` raises. Other graphs can be captured afterwards.
        """
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        try:
            # Not `torch.cuda.graph`, which would collect garbage and wait for the device each time;
            # and of this thread only: another of vLLM's threads waits for outputs of earlier steps.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            result = compute()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        return graph, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that has failed, and begin a new pool.

        Ending it raises what CUDA says of a broken capture, which would hide the first error. Some
        releases of PyTorch then leave the allocator recording into the pool.
        """
        with suppress(RuntimeError):
            graph.capture_end()
        if self._pool is not None:
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            self._pool = torch.cuda.graph_pool_handle()


class HiddenRows:
    """The hidden states that a step samples from, gathered where the graphs read them.

    Args:
        hidden_size: d.
        max_rows: rows of the largest step.
        dtype: of the model's hidden states.
        has_graphs: without, nothing is kept.
    """

    def __init__(
        self,
        hidden_size: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        has_graphs: bool,
    ) -> None:
        self.max_rows = max_rows
        # Zeros, because a graph's padding reads rows that no step has written.
        num_rows = min(round_up(max_rows), MAX_GRAPH_ROWS) if has_graphs else 0
        self.buffer = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)

    @property
    def has_room(self) -> bool:
        """Whether the buffer holds the largest step, so that no step runs without a graph."""
        return self.max_rows <= len(self.buffer)

    def gather(self, hidden_states: torch.Tensor, logits_indices: torch.Tensor) -> torch.Tensor:
        """Some rows of [tokens, d]; in the buffer where they fit."""
        num_rows = logits_indices.shape[0]
        if num_rows > len(self.buffer) or hidden_states.dtype != self.buffer.dtype:
            return hidden_states[logits_indices]
        rows = self.buffer[:num_rows]
        return torch.index_select(hidden_states, 0, logits_indices, out=rows)


class HeadRunner:
    """Runs one head. It has run its largest step once it is made.

    Args:
        network: is copied.
        rows: shared by all heads. Its buffer's size is that of the largest graph, its dtype the
            one in which the head computes on a GPU (see `convert`); on a CPU it is float32.
        stream: where it will run.

    Attributes:
        temperatures: float32 [K].
        reserve_bytes: what a step without a graph allocates on top of the weights, at most.
    """

    def __init__(self, network: AdaptiveHead, rows: HiddenRows, stream: SideStream) -> None:
        buffer = rows.buffer
        dtype = torch.float32 if buffer.device.type == "cpu" else buffer.dtype
        # A graph keeps the address of the weights, which are its own.
        self._network = convert(copy.deepcopy(network), dtype).to(buffer.device).eval()
        self.temperatures = torch.tensor(network.config.temperatures, device=buffer.device)
        # Each width twice, before and after its SiLU or cast, in float32.
        self.reserve_bytes = 0 if rows.has_room else rows.max_rows * 8 * sum(network.config.widths)
        self._address = buffer.data_ptr()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        with torch.inference_mode(), stream.fork():
            # PyTorch makes a workspace for cuBLAS at a stream's first product, and keeps it: it
            # must exist before vLLM sizes its KV cache.
            if not rows.has_room:
                self._network(buffer.new_zeros(rows.max_rows, buffer.shape[1]))
            # The largest first: the smaller ones find room in its pool.
            for num_rows in reversed(graph_sizes(len(buffer))):
                self._capture(buffer[:num_rows], stream)
        stream.join()

    @torch.inference_mode()
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the temperatures.

        Args:
            hidden: [rows, d], what `HiddenRows.gather` has returned in this step.

        Returns:
            float32 [at least rows, K]; with a graph it is overwritten by the next run.
        """
        if not self._graphs or hidden.data_ptr() != self._address:
            scores: torch.Tensor = self._network(hidden)
            return scores
        graph, scores = self._graphs[round_up(len(hidden))]
        graph.replay()
        return scores

    def _capture(self, hidden: torch.Tensor, stream: SideStream) -> None:
        # Kernels are chosen and workspaces made before, not while, a graph is recorded.
        self._network(hidden)
        self._graphs[len(hidden)] = stream.capture(lambda: self._network(hidden))


def convert(network: AdaptiveHead, dtype: torch.dtype) -> AdaptiveHead:
    """Let a network compute in 16 bits, so that reading its weights does not delay the LM head.

    All but its small last layer: rounded to 16 bits, logits of neighbouring temperatures would
    often be equal, and of equals the lower one wins.
    """
    for layer in network.layers[:-1]:
        layer.to(dtype)
    return network


def round_up(num_rows: int) -> int:
    """The next power of two."""
    return 1 << (num_rows - 1).bit_length()


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that have a graph: the powers of two up to `max_rows`."""
    return [1 << exponent for exponent in range(max_rows.bit_length())]
