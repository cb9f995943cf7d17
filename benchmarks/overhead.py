"""Tokens per second with `temperature: "adaptive"` against `temperature: 0.7`.

Runs in turns against one server, so that whatever else the machine does meets both alike. Starts
`adaptive-serve` with the embedded model unless it is given the address of a running server.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.servers import OURS, start
from loadtests.ratios import bootstrap_ratio

PROMPT = "Write a short story about a lighthouse keeper who finds a letter."


def main(
    url: Annotated[str | None, typer.Option(help="A running server's address.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    num_pairs: Annotated[int, typer.Option(help="Pairs of runs.")] = 20,
    stream: Annotated[bool, typer.Option(help="Stream the answers.")] = False,
    report: Annotated[Literal["none", "summary", "tokens"], typer.Option()] = "summary",
) -> None:
    """Print the ratio of tokens per second, adaptive to fixed, as JSON: a geometric mean."""
    with contextlib.nullcontext(url) if url else start_server() as address:
        models = httpx.get(f"{address}/v1/models").raise_for_status()
        model = models.json()["data"][0]["id"]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": stream,
        }
        adaptive = {**body, "temperature": "adaptive", "adaptive": {"report": report}}
        fixed = {**body, "temperature": 0.7}
        ratios = asyncio.run(
            measure(f"{address}/v1/chat/completions", adaptive, fixed, concurrency, num_pairs)
        )
    ratio = bootstrap_ratio(ratios, seed=0)
    result = {
        "adaptive_to_fixed": round(ratio.mean, 4),
        "interval_95": [round(ratio.low, 4), round(ratio.high, 4)],
        "num_pairs": num_pairs,
        "concurrency": concurrency,
        "max_tokens": max_tokens,
        "stream": stream,
        "report": report,
        "model": model,
    }
    print(json.dumps(result))


@contextlib.contextmanager
def start_server() -> Iterator[str]:
    """The address of an `adaptive-serve` that runs until the block ends."""
    with start([*OURS, "--no-enable-prefix-caching"]) as server:
        server.wait_until_ready()
        yield server.url


async def measure(
    endpoint: str,
    adaptive: dict[str, Any],
    fixed: dict[str, Any],
    concurrency: int,
    num_pairs: int,
) -> list[float]:
    """Ratios of tokens per second, a pair of runs each; who goes first alternates."""
    ratios = []
    async with httpx.AsyncClient(timeout=None) as client:
        for body in (adaptive, fixed):
            await run(client, endpoint, body, concurrency)
        for pair in track(range(num_pairs), "pairs", console=Console(stderr=True)):
            order = (adaptive, fixed) if pair % 2 else (fixed, adaptive)
            rates = {id(body): await run(client, endpoint, body, concurrency) for body in order}
            ratios.append(rates[id(adaptive)] / rates[id(fixed)])
    return ratios


async def run(
    client: httpx.AsyncClient, endpoint: str, body: dict[str, Any], concurrency: int
) -> float:
    """Tokens per second of `concurrency` requests at once. Every answer has all its tokens."""

    async def ask(seed: int) -> None:
        async with client.stream("POST", endpoint, json={**body, "seed": seed}) as response:
            response.raise_for_status()
            if b'"error":' in await response.aread():
                raise SystemExit("the server answered with an error in the middle of a stream")

    start = time.perf_counter()
    await asyncio.gather(*(ask(seed) for seed in range(concurrency)))
    return concurrency * int(body["max_tokens"]) / (time.perf_counter() - start)


if __name__ == "__main__":
    typer.run(main)
