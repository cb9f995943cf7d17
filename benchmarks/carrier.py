"""What a token's temperature costs on its way from the worker to the API and the metrics.

Times vLLM's own messages and this project's readers, with and without temperatures, in turns in
one process, and prints the difference a token. Needs no model and no engine.
"""

import gc
import json
import time
from typing import Annotated, Literal

import numpy as np
import typer
from prometheus_client import CollectorRegistry
from vllm.outputs import CompletionOutput, RequestOutput, SamplingMask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from adaptive_head.options import AdaptiveRequest, ReportDetail, resolve_options
from adaptive_head.vllm.wire import DecisionLists, DecisionSender
from server.metrics import AdaptiveMetrics
from server.report import PromptReport, Report

OPTIONS = resolve_options(AdaptiveRequest(policy="constant"), {}, None)


def main(
    num_requests: Annotated[int, typer.Option(help="Requests in a step.", max=1024)] = 256,
    num_steps: Annotated[int, typer.Option(help="Steps of a run.")] = 100,
    num_pairs: Annotated[int, typer.Option(help="Runs with and without, in turns.")] = 15,
    detail: Annotated[Literal["summary", "tokens"], typer.Option(help="`report`.")] = "tokens",
    run_len: Annotated[int, typer.Option(help="Tokens in a row of one temperature.", min=1)] = 1,
) -> None:
    """Print microseconds a token as JSON: the median of paired runs, and their spread."""
    extra = []
    for _ in range(num_pairs):
        plain = time_steps(num_steps, num_requests, None, run_len)
        reports = make_reports(num_requests, detail)
        adaptive = time_steps(num_steps, num_requests, reports, run_len)
        extra.append((adaptive - plain) / (num_requests * num_steps) * 1e6)
    low, median, high = np.quantile(extra, [0.25, 0.5, 0.75]).tolist()
    result = {
        "microseconds_a_token": round(median, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "num_requests": num_requests,
        "num_pairs": num_pairs,
        "report": detail,
        "run_len": run_len,
    }
    print(json.dumps(result))


def make_reports(num_requests: int, detail: ReportDetail) -> list[PromptReport]:
    metrics = AdaptiveMetrics("model", {}, CollectorRegistry())
    return [Report(OPTIONS, detail, 1, metrics).begin_prompt() for _ in range(num_requests)]


def time_steps(
    num_steps: int, num_requests: int, reports: list[PromptReport] | None, run_len: int
) -> float:
    """Seconds for a run."""
    sender = DecisionSender()
    request_ids = [f"{index}-8865643c" for index in range(num_requests)]
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for step in range(num_steps):
        micro = 700_000 + 100_000 * (step // run_len % 2)
        lists = DecisionLists(np.full((num_requests, 1), micro, np.int32))
        masks = sender.begin_step(lists, request_ids) if reports else None
        run_step(masks, request_ids, reports)
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed


_ENCODER = MsgpackEncoder()
_DECODER = MsgpackDecoder(EngineCoreOutputs)


def run_step(
    sender: DecisionSender | None, request_ids: list[str], reports: list[PromptReport] | None
) -> None:
    """One decode step: scheduler -> ZeroMQ's bytes -> API process -> report and metrics."""
    outputs = [
        EngineCoreOutput(
            request_id=request_id,
            new_token_ids=[7],
            new_sampling_mask=sender and sender.slice_request(index, 1),
        )
        for index, request_id in enumerate(request_ids)
    ]
    received = _DECODER.decode(_ENCODER.encode(EngineCoreOutputs(outputs=outputs)))
    for index, output in enumerate(received.outputs):
        mask = output.new_sampling_mask
        completion = CompletionOutput(
            index=0,
            text="",
            token_ids=output.new_token_ids,
            cumulative_logprob=None,
            logprobs=None,
            sampling_mask=mask and SamplingMask(mask.to_nested_list()),
        )
        answer = RequestOutput("0", None, [], None, [completion], finished=False)
        if reports:
            reports[index].read(answer)
        for _ in answer.outputs:
            pass


if __name__ == "__main__":
    typer.run(main)
