"""Runs requests through engines in a process of its own, whose environment is its own too.

Reads a list of {"engine": {...}, "batches": [[{"prompt": [ids], "params": {...}}]]} from standard
input, runs one engine after the other, and writes to the file named by its argument, for each of
them, each request's answers, a batch at a time, or the error that ended it. Instead of a batch
{"load": [name, generation, head]} loads one of the engine's heads again, as `name`, and
{"call": [method, arguments]} calls a method of all workers.
"""

import gc
import json
import sys
import time
import traceback
from pathlib import Path

from vllm import LLM, SamplingParams, __version__
from vllm.distributed import cleanup_dist_env_and_memory

from adaptive_head import load_head
from adaptive_head.vllm import LOADING
from adaptive_head.vllm.wire import take_decisions


def run(scenarios: list[dict]) -> list[dict]:
    results = []
    for scenario in scenarios:
        try:
            llm = LLM(**scenario["engine"])
            results.append(ask(llm, scenario))
            llm.llm_engine.engine_core.shutdown()
            del llm
        except Exception:
            results.append({"error": traceback.format_exc()})
        gc.collect()
        cleanup_dist_env_and_memory()
    return results


def ask(llm: LLM, scenario: dict) -> dict:
    answers = []
    for batch in scenario["batches"]:
        if isinstance(batch, dict) and "call" in batch:
            method, *arguments = batch["call"]
            answers.append(llm.collective_rpc(method, args=arguments))
            continue
        if isinstance(batch, dict):
            answers.append(load(llm, *batch["load"], scenario["engine"]["additional_config"]))
            continue
        prompts = [{"prompt_token_ids": request["prompt"]} for request in batch]
        params = [SamplingParams.from_optional(**request["params"]) for request in batch]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append([[describe(answer) for answer in output.outputs] for output in outputs])
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    is_adaptive = "adaptive" in (scenario["engine"].get("additional_config") or {})
    return {
        "version": __version__,
        "answers": answers,
        "num_preemptions": metrics["vllm:num_preemptions"],
        "num_accepted": metrics.get("vllm:spec_decode_num_accepted_tokens"),
        "num_drafts": metrics.get("vllm:spec_decode_num_draft_tokens"),
        "choices": llm.collective_rpc("count_choices")[0] if is_adaptive else None,
    }


def load(llm: LLM, name: str, generation: int, head: str, config: dict) -> list[str | None]:
    folder = config["adaptive"]["heads"][head]
    right, wrong = load_head(Path(folder)).digest, "0" * 64
    results = []
    for digest in (wrong, right):
        call = name, generation, folder, digest
        while LOADING in (states := llm.collective_rpc("add_head", args=call)):
            time.sleep(0.01)
        results.append(next(filter(None, states), None))
    return results


def describe(answer) -> dict:
    decisions = take_decisions(answer)
    return {
        "token_ids": list(answer.token_ids),
        "micros": decisions and [decision.temperature for decision in decisions],
        "finish_reason": answer.finish_reason,
        "logprobs": answer.logprobs
        and [
            {token: value.logprob for token, value in position.items()}
            for position in answer.logprobs
        ],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
