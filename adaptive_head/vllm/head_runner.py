"""A head on the device: beside the LM head on a stream of its own, as CUDA graphs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adaptive_head.head import AdaptiveHead

# Beyond it a head's products are no longer a matter of launches, and run without a graph.
MAX_GRAPH_ROWS = 512


class SideStream:
    """A stream beside the current one. On a CPU there is one order only, and nothing to wait for.

    What is queued inside `fork` begins after what the current stream has been given; `join` lets
    the current stream wait for it. Its priority is high: a head is a few small products, which
    would otherwise queue behind every block of the LM head's.

    Attributes:
        pool: the memory of this stream's CUDA graphs, all heads'. They run one after the other, and
            what one has chosen is read before the next begins.
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device, priority=-1) if is_cuda else None
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None
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
        # Zeros, because a graph's padding reads rows that no step has written.
        num_rows = min(round_up(max_rows), MAX_GRAPH_ROWS) if has_graphs else 0
        self.buffer = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)

    def gather(self, hidden_states: torch.Tensor, logits_indices: torch.Tensor) -> torch.Tensor:
        """Some rows of [tokens, d]; in the buffer where they fit."""
        num_rows = logits_indices.shape[0]
        if num_rows > len(self.buffer) or hidden_states.dtype != self.buffer.dtype:
            return hidden_states[logits_indices]
        rows = self.buffer[:num_rows]
        return torch.index_select(hidden_states, 0, logits_indices, out=rows)


class HeadRunner:
    """Runs one head.

    Args:
        network: is copied.
        rows: shared by all heads. Its buffer's size is that of the largest graph, its dtype the
            one in which the head computes on a GPU (see `convert`); on a CPU it is float32.
        stream: where it will run.

    Attributes:
        temperatures: float32 [K].
    """

    def __init__(self, network: AdaptiveHead, rows: HiddenRows, stream: SideStream) -> None:
        buffer = rows.buffer
        dtype = torch.float32 if buffer.device.type == "cpu" else buffer.dtype
        # A graph keeps the address of the weights, which are its own.
        self._network = convert(copy.deepcopy(network), dtype).to(buffer.device).eval()
        self.temperatures = torch.tensor(network.config.temperatures, device=buffer.device)
        self._address = buffer.data_ptr()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        with torch.inference_mode(), stream.fork():
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
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which would collect garbage and wait for the device each time;
        # and of this thread only: another one of vLLM's waits for the outputs of earlier steps.
        graph.capture_begin(stream.pool, capture_error_mode="thread_local")
        try:
            scores = self._network(hidden)
        finally:
            graph.capture_end()
        self._graphs[len(hidden)] = graph, scores


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
