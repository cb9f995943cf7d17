"""Two data-parallel engines, a head that is loaded into both, and requests to each.

Reads {"engine": {...}, "requests": [...], "later": request, "folder": a head} from standard input,
and writes to the file named by its argument what each engine has answered before and after.
"""

import asyncio
import json
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from server.head_control import HeadControl
from server.heads import HeadRegistry
from server.metrics import AdaptiveMetrics
from tests.engine.scenario import describe

RANKS = (0, 1)


async def run(scenario: dict) -> dict:
    client = AsyncLLM.from_engine_args(AsyncEngineArgs(**scenario["engine"]))
    folder = Path(scenario["folder"])
    registry = HeadRegistry({}, None)
    metrics = AdaptiveMetrics("tiny", {}, CollectorRegistry())
    control = HeadControl(client, registry, metrics, folder.parent, "key")

    async def ask(rank: int, number: int, request: dict) -> dict:
        params = SamplingParams.from_optional(**request["params"])
        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt, name = {"prompt_token_ids": request["prompt"]}, f"{rank}-{number}"
        async for output in client.generate(prompt, params, name, data_parallel_rank=rank):
            answer = describe(output.outputs[0])
        return answer

    async def ask_all(requests: list[dict]) -> list[list[dict]]:
        calls = [[ask(rank, i, request) for i, request in enumerate(requests)] for rank in RANKS]
        return [await asyncio.gather(*of_rank) for of_rank in calls]

    async def list_heads() -> list[list[tuple[str, int]]]:
        workers = await control._call_workers("count_choices")
        return [[(name, generation) for name, generation, _ in heads] for heads in workers]

    before = await ask_all(scenario["requests"])
    await control.load("later", folder.name, is_default=True)
    loaded = await list_heads()
    after = await ask_all([scenario["later"]])
    client.shutdown()
    return {"before": before, "loaded": loaded, "after": after}


if __name__ == "__main__":
    result = asyncio.run(run(json.load(sys.stdin)))
    Path(sys.argv[1]).write_text(json.dumps(result))
