"""Triton kernels that choose temperatures and apply them, for vLLM's V2 runner.

The device's side of `adaptive_head.selector`: nothing returns to the host. A request has one row of
logits in a step, or with speculative decoding one for each draft and one more. `choose_by_*` only
read what the slots remember and write a temperature a row; `commit` moves the slots on, by as many
rows as became tokens. So a rejected draft leaves no trace.
"""

from adaptive_head.vllm.kernels.batch import FALLBACK_PICK, Batch, Choices
from adaptive_head.vllm.kernels.commit import commit
from adaptive_head.vllm.kernels.entropy import choose_by_entropy
from adaptive_head.vllm.kernels.heads import choose_by_head
from adaptive_head.vllm.kernels.policies import choose_by_policy
from adaptive_head.vllm.kernels.scale import scale_logits

__all__ = [
    "FALLBACK_PICK",
    "Batch",
    "Choices",
    "choose_by_entropy",
    "choose_by_head",
    "choose_by_policy",
    "commit",
    "scale_logits",
]
