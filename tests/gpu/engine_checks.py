"""What tier 2 checks: this package in a real engine, with vLLM's V2 model runner."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from adaptive_head.vllm import LOADING
from tests.gpu.checks import ROOT
from tests.gpu.engine import (
    ENGINE,
    Engine,
    Request,
    make_adaptive,
    make_material,
    make_prompt,
    make_request,
    pick_length,
)

# Every kind of choice whose temperatures can be told afterwards.
KINDS: list[dict[str, Any]] = [
    {"head": "tok"},
    {"head": "seq"},
    {"head": "tok", "select": "sample"},
    {"head": "tok", "scale": 0.5, "min": 0.2, "max": 0.6},
    {"policy": "schedule", "schedule": {"start": 1.0, "end": 0.2, "tokens": 40}},
    {"policy": "two_phase", "two_phase": {"thinking": 9.0, "answer": 8.0}},
    {"policy": "constant", "constant": {"temperature": 0.5}},
    {"head": "seq", "select": "sample"},
]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


# Prompts that end just before a block of the KV cache is full, of which each request needs another
# one soon after. There are two for ten requests; vLLM wants eight for a request of full length.
BLOCK_SIZE, NUM_BLOCKS = int(ENGINE["block_size"]), 12


def make_batch(num_tokens: int, prompt_lens: Sequence[int | None] = (None,)) -> list[Request]:
    """A request of each kind, and two ordinary ones.

    Args:
        prompt_lens: of the prompts, in turns; None for one of its own.
    """
    lens = list(islice(cycle(prompt_lens), len(KINDS) + 2))
    prompts = [make_prompt(index, length) for index, length in enumerate(lens)]
    adaptive = [
        make_adaptive(prompt, num_tokens, seed=index, **fields)
        for index, (prompt, fields) in enumerate(zip(prompts, KINDS, strict=False))
    ]
    return adaptive + [make_request(prompt, num_tokens, seed=1) for prompt in prompts[-2:]]


def check_preemption(device: str) -> dict[str, Any]:
    """Asynchronous scheduling with too few blocks of the KV cache: temperatures stay with their
    tokens, and a sequence-level choice stays as it is."""
    from tests.gpu.expectations import Alignment, Reference

    with tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder))
        engine = Engine(material, device, num_gpu_blocks_override=NUM_BLOCKS)
        assert engine.is_async or device == "cpu", "scheduling is not asynchronous"
        num_tokens = pick_length(device, 60)
        requests = make_batch(num_tokens, range(BLOCK_SIZE - 8, BLOCK_SIZE))
        answers = engine.answer(requests)
        num_preemptions = engine.read_metric("vllm:num_preemptions")
        assert num_preemptions >= 3, f"{num_preemptions} preemptions: this check cannot fail"
        alignment = Alignment(Reference(material, device))
        for request, answer in zip(requests, answers, strict=True):
            alignment.add(request, answer)
        counted = engine.count_choices()
        assert counted["seq.0"] == 2, f"2 answers at the sequence level, counted {counted}"
        # Each token once, except that one more step of each answer may have begun before its end.
        wanted = 3 * num_tokens
        assert wanted <= counted["tok.0"] <= wanted + 10, f"{wanted} tokens, counted {counted}"
    return alignment.judge() | {"preemptions": num_preemptions, "async": engine.is_async}


def check_speculation(device: str) -> dict[str, Any]:
    """N-gram drafts, verified at the temperature of each token's own place."""
    from tests.gpu.expectations import Alignment, Reference

    with tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder))
        engine = Engine(material, device, speculative_config=NGRAM)
        # Prompts that repeat themselves, so that drafts are found.
        prompts = [[5, 9, 14, 3] * 6, [7, 7, 8] * 7, [100, 101] * 9]
        num_tokens = pick_length(device, 40)
        requests = [
            make_adaptive(prompts[index % 3], num_tokens, seed=index, **fields)
            for index, fields in enumerate(KINDS)
        ]
        requests += [make_request(prompts[0], num_tokens, seed=1)]
        alignment = Alignment(Reference(material, device))
        for request, answer in zip(requests, engine.answer(requests), strict=True):
            alignment.add(request, answer)
        figures = {
            "drafts": engine.read_metric("vllm:spec_decode_num_draft_tokens"),
            "accepted": engine.read_metric("vllm:spec_decode_num_accepted_tokens"),
        }
        assert 0 < figures["accepted"] < figures["drafts"], f"drafts decided nothing: {figures}"
        counted = engine.count_choices()
        assert counted["seq.0"] == 2, f"2 answers at the sequence level, counted {counted}"
    return alignment.judge() | figures


def check_sleep(device: str) -> dict[str, Any]:
    """Heads survive sleep: answers are the same before and after, at both levels."""
    with tempfile.TemporaryDirectory() as folder:
        options = {} if device == "cpu" else {"enable_sleep_mode": True}
        engine = Engine(make_material(Path(folder)), device, **options)
        requests = make_batch(pick_length(device, 20))
        before = engine.answer(requests)
        assert engine.answer(requests) == before, "the engine does not repeat itself"
        counted = engine.count_choices()
        engine.llm.sleep(level=1)
        engine.llm.wake_up()
        assert engine.count_choices() == counted, "sleep has changed the counts"
        assert engine.answer(requests) == before, "answers differ after sleep of level 1"
        # Its weights are gone then; the heads' are not.
        engine.llm.sleep(level=2)
        engine.llm.wake_up(tags=["weights"])
        engine.llm.collective_rpc("reload_weights")
        engine.llm.wake_up(tags=["kv_cache"])
        assert engine.answer(requests) == before, "answers differ after sleep of level 2"
        engine.load("tok", 1, "seq")
        later = [make_adaptive(make_prompt(2), 5, seed=3, generation=1, head="tok")]
        assert len(engine.answer(later)[0]["micros"]) == 5
    return {"answers": len(before), "async": engine.is_async}


def make_ordinary(num_tokens: int) -> list[Request]:
    """The fixed batch of ordinary requests; one without a seed."""
    plain: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 1.0, "logprobs": 3},
        {"top_p": 0.9, "top_k": 40, "min_p": 0.05, "logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {9: 4.0}},
        {"seed": None},
        {"temperature": 1.5, "top_p": 0.8},
        {"frequency_penalty": 0.5, "logprobs": 0},
    ]
    return [
        make_request(make_prompt(index), num_tokens, **({"seed": index} | params))
        for index, params in enumerate(plain)
    ]


def check_ordinary(device: str) -> dict[str, Any]:
    """Tokens and log-probabilities of ordinary requests are stock vLLM's, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder))
        result = Path(folder) / "stock.json"
        arguments = [str(material.model), device, str(result)]
        # At the same time, in a process of its own.
        stock = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.stock_engine", *arguments], cwd=ROOT
        )
        try:
            ours = answer_twice(Engine(material, device), device)
            assert stock.wait() == 0, "the stock engine failed; see the log"
        finally:
            stock.kill()
            stock.wait()
        # Through JSON, as the others: it keeps floats, and makes text of keys.
        ours, theirs = json.loads(json.dumps(ours)), json.loads(result.read_text())
    for index, request in enumerate(make_ordinary(1)):
        is_repeated = theirs[0][index] == theirs[1][index]
        assert is_repeated or request.params["seed"] is None, "stock vLLM does not repeat itself"
    for batch, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for index, (one, another) in enumerate(zip(mine, other, strict=True)):
            assert one == another, f"batch {batch}, request {index} differs from stock vLLM's"
    return {"requests": len(ours[0]), "tokens": sum(len(one["token_ids"]) for one in ours[0])}


def answer_twice(engine: Engine, device: str) -> list[list[dict[str, Any]]]:
    """The fixed batch of ordinary requests, twice."""
    requests = make_ordinary(pick_length(device, 30))
    return [engine.answer(requests) for _ in range(2)]


def check_hot_load(device: str) -> dict[str, Any]:
    """A head is loaded while requests are answered, whose answers do not change; then all heads
    are removed, and another one is loaded."""
    from tests.gpu.expectations import Alignment, Reference

    with tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder))
        engine = Engine(material, device)
        requests = make_batch(pick_length(device, 40))
        undisturbed = engine.answer(requests)
        poll = engine.begin_load("tok", 1, "seq")
        states: list[str | None] = []

        def load_meanwhile(num_steps: int) -> None:
            if num_steps >= 5 and (not states or states[-1] == LOADING):
                states.append(poll())

        numbers = [engine.add(request) for request in requests]
        answers = engine.run(load_meanwhile)
        assert states and states[-1] is None, f"the head did not load: {states[-1:]}"
        disturbed = [answers[number] for number in numbers]
        assert disturbed == undisturbed, "a load has changed answers under way"
        reference = Reference(material, device)
        later = {"tok.1": reference.networks["seq"], "tok.2": reference.networks["seq"]}
        alignment = Alignment(reference, later)
        _answer_later(engine, alignment, generation=1)
        for name, generation in (("tok", 0), ("seq", 0), ("tok", 1)):
            engine.llm.collective_rpc("remove_head", args=(name, generation))
        assert engine.count_choices() == {}
        engine.load("tok", 2, "seq")
        _answer_later(engine, alignment, generation=2)
    return alignment.judge() | {"polls": len(states)}


def _answer_later(engine: Engine, alignment: Any, generation: int) -> None:
    requests = [
        make_adaptive(make_prompt(index), 16, seed=index, generation=generation, head="tok")
        for index in range(4)
    ]
    for request, answer in zip(requests, engine.answer(requests), strict=True):
        alignment.add(request, answer)
