"""Verifies drafts for thousands of requests with vLLM's own rejection sampler and our stage in it.

In a process of its own, under Triton's interpreter. The model is a Markov chain of few words: what
follows depends on the last token alone, its hidden state is that token's, and a head that is a
table gives each token a temperature. Reads a list of {"kind", "num_requests", ...} from standard
input, and writes the tokens of each request, for all of them, to the file named by its argument.
`v2_worker` replaces what the interpreter cannot run.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import v2_worker  # noqa: F401
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.states import RequestState

from adaptive_head import AdaptiveHead, AdaptiveRequest, HeadConfig, resolve_options
from adaptive_head.vllm import processor_v2
from adaptive_head.vllm.head_runner import HiddenRows
from adaptive_head.vllm.selector_v2 import DeviceSelector

NUM_DRAFTS = 2
PROMPT_LEN = 3
CPU = torch.device("cpu")


def make_head(temperatures: list[float], picks: list[int]) -> AdaptiveHead:
    """A head that picks temperature `picks[token]` after `token`."""
    head = AdaptiveHead(HeadConfig(len(picks), tuple(temperatures), ()))
    with torch.no_grad():
        head.layers[0].weight.zero_()
        head.layers[0].weight[picks, range(len(picks))] = 50.0
    return head


def verify(
    kind: str,
    method: str,
    num_requests: int,
    num_plain: int,
    first_token: int,
    target: list[list[float]],
    draft: list[list[float]],
    temperatures: list[float],
    picks: list[int],
    max_chunk_rows: int,
) -> dict[str, list[list[int]]]:
    """The tokens of every request and their temperatures (millionths), for one step.

    Args:
        kind: "likely" drafts, as n-gram's, or "drawn" ones, whose probabilities count.
        method: of rejection: "standard" or "block".
        num_plain: the first requests are ordinary, and ask for nothing that vLLM would have to do
            to their logits.
        target, draft: logits after each token, for the model and for what drafts.
    """
    vocab_size = len(target)
    states = RequestState(num_requests, 16, 64, NUM_DRAFTS, vocab_size, CPU)
    config = SimpleNamespace(reasoning_config=None)
    sampler = Sampler(config, num_requests, vocab_size, CPU, states)
    verifier = rejection_sampler.RejectionSampler(
        sampler,
        SimpleNamespace(
            num_speculative_tokens=NUM_DRAFTS,
            enable_adaptive_verification=False,
            rejection_sample_method=method,
        ),
        CPU,
    )
    rows = HiddenRows(vocab_size, num_requests, torch.float32, CPU, False)
    selector = DeviceSelector({"h": make_head(temperatures, picks)}, num_requests, rows)
    stage = processor_v2.AdaptiveTemperature(states, sampler.sampling_states.seeds, selector)
    sampler.logits_processors.append(stage)
    head = SimpleNamespace(level="token", select="argmax", abstain=None)
    options = resolve_options(AdaptiveRequest(), {"h": head}, "h")
    for request in range(num_requests):
        states.add_request(str(request), PROMPT_LEN, [0] * PROMPT_LEN, PROMPT_LEN, 8)
        slot = states.req_id_to_index[str(request)]
        params = SamplingParams(seed=request, extra_args=options.to_extra_args())
        sampler.add_request(slot, SamplingParams() if request < num_plain else params)
    states.apply_staged_writes()
    sampler.apply_staged_writes()

    # What the draft model has drawn, by its own noise.
    generator = torch.Generator().manual_seed(0)
    draft_logits = torch.tensor(draft)
    inputs = torch.full((num_requests, NUM_DRAFTS + 1), first_token)
    for position in range(NUM_DRAFTS):
        odds = draft_logits[inputs[:, position]].softmax(-1)
        drawn = torch.multinomial(odds, 1, generator=generator)[:, 0]
        inputs[:, position + 1] = drawn if kind == "drawn" else odds.argmax(-1)

    slots_np = np.array([states.req_id_to_index[str(i)] for i in range(num_requests)])
    slots, num_rows = torch.from_numpy(slots_np), num_requests * (NUM_DRAFTS + 1)
    starts_np = np.arange(0, num_rows + 1, NUM_DRAFTS + 1, dtype=np.int32)
    batch = SimpleNamespace(
        num_reqs=num_requests,
        num_draft_tokens=num_requests * NUM_DRAFTS,
        idx_mapping=slots,
        idx_mapping_np=slots_np,
        expanded_idx_mapping=slots.repeat_interleave(NUM_DRAFTS + 1),
        expanded_local_pos=torch.arange(NUM_DRAFTS + 1, dtype=torch.int32).repeat(num_requests),
        cu_num_logits=torch.from_numpy(starts_np),
        cu_num_logits_np=starts_np,
        logits_indices=torch.arange(num_rows),
        input_ids=inputs.flatten().int(),
        positions=torch.arange(PROMPT_LEN, PROMPT_LEN + NUM_DRAFTS + 1).repeat(num_requests),
        seq_lens=torch.full((num_requests,), PROMPT_LEN + NUM_DRAFTS + 1, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.full((num_requests,), PROMPT_LEN + NUM_DRAFTS + 1),
    )
    cached = None
    if kind == "drawn":
        cached = torch.empty(num_requests, NUM_DRAFTS, vocab_size)
        cached[slots] = draft_logits[inputs[:, :NUM_DRAFTS]]
    hidden = torch.nn.functional.one_hot(inputs.flatten(), vocab_size).float()
    with (
        stage.sampling(hidden, batch),
        mock.patch.object(rejection_sampler, "get_max_chunk_logits", lambda _: max_chunk_rows),
        mock.patch.object(processor_v2, "adopt_choices", lambda micros: None),
    ):
        output = verifier(torch.tensor(target)[inputs.flatten()], batch, cached)
        choices = stage.take_decisions(output.num_sampled)
    lists = choices.to_cpu_nonblocking().tolists()
    num_sampled = output.num_sampled.tolist()
    tokens = output.sampled_token_ids.tolist()
    rows = [lists.get(i, count) for i, count in enumerate(num_sampled)]
    micros = [kept and [temperature for temperature, *_ in kept] for kept in rows]
    assert micros[:num_plain] == [None] * num_plain
    (counts,) = selector.count_choices()
    return {
        "tokens": [row[:count] for row, count in zip(tokens, num_sampled, strict=True)][num_plain:],
        "micros": micros[num_plain:],
        "counts": list(counts.counts.values()),
    }


if __name__ == "__main__":
    with torch.inference_mode():
        results = [verify(**case) for case in json.load(sys.stdin)]
    Path(sys.argv[1]).write_text(json.dumps(results))
