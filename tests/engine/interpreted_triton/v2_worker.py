"""vLLM's V2 model runner on a CPU: what it takes from CUDA, replaced by nothing.

Streams and events order work on a device; on the host everything is in order already.
"""

import contextlib

import torch
import vllm.v1.worker.gpu.sample.sampler as sampler
import vllm.v1.worker.gpu.spec_decode.ngram.speculator as ngram
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



class _NgramFinalize:
    """vLLM's kernel that picks the drafts of n-gram speculation, which the interpreter cannot run:
    it stores under a mask of another type."""

    def __getitem__(self, grid):
        return self.run

    @staticmethod
    def run(
        token_ids,
        _token_ids_stride,
        idx_mapping,
        total_len,
        num_sampled,
        last_sampled,
        scratch,
        _scratch_stride,
        drafts,
        max_len,
        _num_blocks,
        num_drafts,
        *_paddings,
        **_options,
    ):
        for request, slot in enumerate(idx_mapping.tolist()):
            # Longest match first, then the latest: (length, place) in one number.
            length, place = divmod(int(scratch[request].max()) - 1, max_len + 1)
            start = place + length
            context = token_ids[slot, : int(total_len[slot])]
            drafts[request] = last_sampled[slot]
            if int(num_sampled[request]) > 0 and scratch[request].max() > 0:
                found = context[start : start + num_drafts]
                drafts[request, : len(found)] = found.long()


ngram._ngram_finalize_kernel = _NgramFinalize()

StockWorker = CPUWorker

__all__ = ["AdaptiveWorker", "StockWorker"]
