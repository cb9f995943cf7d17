"""Runs requests through an engine in a process of its own, whose environment is its own too.

Reads {"engine": {...}, "batches": [[{"prompt": [ids], "params": {...}}]]} from standard input and
writes to the file named by its argument, a batch at a time, each request's answers.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def run(scenario: dict) -> dict:
    llm = LLM(**scenario["engine"])
    answers = []
    for batch in scenario["batches"]:
        prompts = [{"prompt_token_ids": request["prompt"]} for request in batch]
        params = [SamplingParams.from_optional(**request["params"]) for request in batch]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append([[describe(answer) for answer in output.outputs] for output in outputs])
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {"answers": answers, "num_preemptions": metrics["vllm:num_preemptions"]}


def describe(answer) -> dict:
    mask = answer.sampling_mask
    return {
        "token_ids": list(answer.token_ids),
        "micros": None if mask is None else [micro for (micro,) in mask.token_ids],
        "finish_reason": answer.finish_reason,
        "logprobs": answer.logprobs
        and [
            {token: value.logprob for token, value in position.items()}
            for position in answer.logprobs
        ],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
