"""vLLM's V2 model runner on a CPU: what it takes from CUDA, replaced by nothing.

Streams and events order work on a device; on the host everything is in order already.
"""

import contextlib

import torch
import vllm.v1.worker.gpu.sample.sampler as sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.cpu_worker import CPUWorker

from adaptive_head.vllm.worker import AdaptiveWorker


class _Inert:
    device = torch.device("cpu")

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


torch.cuda.Stream = torch.cuda.Event = _Inert
torch.cuda.current_stream = lambda *args, **kwargs: _Inert()
torch.cuda.set_stream = lambda *args: None
torch.cuda.stream = lambda *args: contextlib.nullcontext()

# The one kernel of this path that the interpreter cannot run.
sampler.apply_top_k_top_p = lambda logits, k, p: apply_top_k_top_p_pytorch(logits, k, p)

StockWorker = CPUWorker

__all__ = ["AdaptiveWorker", "StockWorker"]
