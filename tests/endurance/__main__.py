"""`python -m tests.endurance`: many mixed requests to the mock server, and what they leave behind.

The front end is the real one. What its metrics count must be what the clients have seen, and the
process must hold no more at the end than at the beginning.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from adaptive_head.lpo.report import describe_machine
from loadtests.accounts import close_accounts
from loadtests.target import read_counters, read_version
from server.cli import EMBEDDED_NAME
from tests.endurance.asking import LEFT, REFUSED, WHOLE, Crowd, ask_all
from tests.endurance.plans import Plan, make_plan
from tests.fuzz.sending import Watch
from tests.server.conftest import HANG_S, Server, running

OPTIONS = (
    "--ttft=0.002",
    "--itl=0.0005",
    "--jitter=0.5",
    "--max-num-seqs=64",
    # On a busy machine a check may wait for its turn.
    "--max-grammar-seconds=60",
    "--disable-uvicorn-access-log",
)
WATCHED_SERVER = "tests.endurance.watched_server"
# The server closes connections that have idled for five seconds.
SETTLE_S = 10.0
# More is a leak: 500 bytes per request. A heap's fragments are less.
MAX_RSS_SLOPE = 5.0
MAX_SHOWN = 20


def main(
    requests: Annotated[int, typer.Option(help="How many to send.")] = 100_000,
    block: Annotated[int, typer.Option(help="How many until the accounts are closed.")] = 5000,
    clients: Annotated[int, typer.Option(help="How many at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Equal seeds ask the same.")] = 14,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("endurance.json"),
) -> None:
    """Send mixed requests. Exits with 1 if anything is not as it must be."""
    figures = run(requests, block, clients, seed, out)
    for name, value in figures["summary"].items():
        typer.echo(f"{name:26} {value}")
    faults = find_faults(figures)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)


def run(num_requests: int, block: int, num_clients: int, seed: int, out: Path) -> dict[str, Any]:
    """Send mixed requests to a server of its own; the figures, which are also written to `out`.

    They are written after each block, so that a run that is interrupted leaves those it has.
    """
    rng = Random(seed)
    plans = iter(lambda: make_plan(rng, EMBEDDED_NAME), None)
    figures: dict[str, Any] = {"machine": describe_machine(), "seed": seed, "clients": num_clients}
    blocks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tasks_file = Path(folder) / "tasks.txt"
        command = [sys.executable, "-m", WATCHED_SERVER, str(tasks_file), "mock-server", *OPTIONS]
        environment = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
        with running(command, Path(folder) / "log.txt", **environment) as server:
            server.wait_until_ready()
            figures["vllm"] = read_version(server.url)
            figures["at_start"] = at_start = measure(server, tasks_file)
            for begin in range(0, num_requests, block):
                count = min(block, num_requests - begin)
                done = run_block(server, islice(plans, count), num_clients)
                blocks.append(done | settle(server, tasks_file, at_start))
                figures |= {"summary": summarise(at_start, blocks), "blocks": blocks}
                out.write_text(json.dumps(figures, indent=1))
            figures["summary"]["exit_code"] = server.stop()
    out.write_text(json.dumps(figures, indent=1))
    return figures


def run_block(server: Server, plans: Iterator[Plan], num_clients: int) -> dict[str, Any]:
    """Send some of the requests, and close their accounts."""
    tokens, answers, prompts = read_counters(server.url), *read_requests(server)
    start = time.monotonic()
    with Watch(server.port) as watch:
        crowd = asyncio.run(ask_all(server.url, plans, num_clients))
    seconds = time.monotonic() - start
    wrong, sentence = close_accounts(crowd.accounts, server.url, tokens, HANG_S)
    answers_after, prompts_after = read_requests(server)
    wrong = crowd.wrong + wrong + compare(crowd, answers_after - answers, prompts_after - prompts)
    if watch.failure:
        wrong.append(f"/health: {watch.failure}")
    outcomes: Counter[str] = Counter()
    routes: Counter[str] = Counter()
    for (path, outcome), number in crowd.counts.items():
        outcomes[outcome] += number
        routes[path] += number
    low, high = crowd.accounts.count("vllm:generation_tokens_total")
    return {
        "requests": routes.total(),
        "seconds": round(seconds, 1),
        "longest_health_s": round(watch.longest_s, 3),
        "outcomes": dict(outcomes),
        "routes": dict(routes),
        "tokens": [low, high],
        "accounts": sentence,
        "num_wrong": len(wrong),
        "wrong": wrong[:MAX_SHOWN],
    }


def read_requests(server: Server) -> tuple[Counter[tuple[str, str]], int]:
    """What the server has counted: answers by route and class of status, and adaptive prompts."""
    answers: Counter[tuple[str, str]] = Counter()
    prompts = 0
    for sample in server.read_metrics():
        if sample.name == "http_requests_total":
            answers[sample.labels["handler"], sample.labels["status"]] += round(sample.value)
        elif sample.name == "adaptive_requests_total":
            prompts += round(sample.value)
    return answers, prompts


def compare(crowd: Crowd, answers: Counter[tuple[str, str]], num_prompts: int) -> list[str]:
    """A sentence for each count of requests in which server and clients disagree.

    A client that left does not know whether the server counted its request.
    """
    wrong = []
    for path in {path for path, _ in crowd.counts}:
        for status, outcome in (("2xx", WHOLE), ("4xx", REFUSED)):
            low = crowd.counts[path, outcome]
            high = low + crowd.counts[path, LEFT]
            if not low <= answers[path, status] <= high:
                wrong.append(f"{path}: {answers[path, status]} {status}, not {low} to {high}")
    wrong += [
        f"{path}: {number} 5xx" for (path, status), number in answers.items() if status == "5xx"
    ]
    low = crowd.num_prompts[WHOLE]
    high = low + crowd.num_prompts[LEFT]
    if not low <= num_prompts <= high:
        wrong.append(f"{num_prompts} adaptive prompts, not {low} to {high}")
    return wrong


def settle(server: Server, tasks_file: Path, at_start: dict[str, float]) -> dict[str, float]:
    """Wait until descriptors and tasks are as they were, or for a while; what it holds then."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        held = measure(server, tasks_file)
        is_back = all(held[name] <= at_start[name] for name in ("descriptors", "tasks"))
        if is_back or time.monotonic() > deadline:
            return held


def measure(server: Server, tasks_file: Path) -> dict[str, float]:
    """Memory (MB), open descriptors and asyncio tasks of an idle server."""
    # For the last connection to close, and the tasks to be counted again.
    time.sleep(1)
    process = psutil.Process(server.process.pid)
    return {
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "descriptors": process.num_fds(),
        "tasks": int(tasks_file.read_text()),
    }


def summarise(at_start: dict[str, float], blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all blocks together."""
    outcomes: Counter[str] = Counter()
    for done in blocks:
        outcomes.update(done["outcomes"])
    num_requests = np.cumsum([done["requests"] for done in blocks])
    # The first half fills caches: tokenizer, grammars, the allocator's.
    rest = slice(len(blocks) // 2, None)
    rss = [done["rss_mb"] for done in blocks]
    slope = None
    if len(blocks) > 3:
        slope = round(float(np.polyfit(num_requests[rest] / 10_000, rss[rest], 1)[0]), 2)
    return {
        "requests": int(num_requests[-1]),
        "seconds": round(sum(done["seconds"] for done in blocks), 1),
        **outcomes,
        "tokens": [
            sum(counts) for counts in zip(*(done["tokens"] for done in blocks), strict=True)
        ],
        "longest_health_s": max(done["longest_health_s"] for done in blocks),
        "rss_mb": [at_start["rss_mb"], rss[rest][0], rss[-1]],
        "rss_mb_per_10000_requests": slope,
        "descriptors": [at_start["descriptors"], blocks[-1]["descriptors"]],
        "tasks": [at_start["tasks"], blocks[-1]["tasks"]],
        "wrong": sum(done["num_wrong"] for done in blocks),
    }


def find_faults(figures: dict[str, Any]) -> list[str]:
    """A sentence for each thing that is not as it must be."""
    summary = figures["summary"]
    faults = [sentence for done in figures["blocks"] for sentence in done["wrong"]]
    for name in ("descriptors", "tasks"):
        before, after = summary[name]
        if after > before:
            faults.append(f"{name}: {before} before, {after} after")
    slope = summary["rss_mb_per_10000_requests"]
    if slope is not None and slope > MAX_RSS_SLOPE:
        faults.append(f"memory grew by {slope} MB per 10,000 requests")
    if summary["exit_code"] != 0:
        faults.append(f"the server ended with {summary['exit_code']}")
    return faults


if __name__ == "__main__":
    typer.run(main)
