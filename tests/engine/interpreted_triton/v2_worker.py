"""vLLM's V2 model runner on a CPU: what it takes from CUDA, replaced by nothing.

Streams and events order work on a device; on the host everything is in order already.
"""

import contextlib
from types import SimpleNamespace

import quick_patching  # noqa: F401
import torch
import triton.language as tl
import vllm.v1.worker.gpu.sample.sampler as sampler
import vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils as rejection
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
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
sampler.apply_top_k_top_p = lambda logits, k, p, **hints: apply_top_k_top_p_pytorch(logits, k, p)


def _to_boolean(mask):
    # Put together from scalars by a kernel: the interpreter makes an integer of it.
    return TensorHandle(mask.data.astype(bool), tl.int1)


_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
InterpreterBuilder.create_masked_load = lambda builder, pointers, mask, *args: _load(
    builder, pointers, _to_boolean(mask), *args
)
InterpreterBuilder.create_masked_store = lambda builder, pointers, value, mask, *args: _store(
    builder, pointers, value, _to_boolean(mask), *args
)

# A function of CUDA's own library, which is not Python's to call.
rejection.tldevice = SimpleNamespace(log1p=lambda x: tl.log(x + 1.0))

StockWorker = CPUWorker

__all__ = ["AdaptiveWorker", "StockWorker"]
