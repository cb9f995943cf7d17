"""Our front end against stock vLLM's: requests per second and latency at saturation.

Two servers run the same engine, the one with our plugin, the other stock vLLM's. Blocks of the same
requests go to them in turns, so that whatever else the machine does meets both alike. Both start
several times, because one start of a server can be some percent faster than the next: intervals are
over starts.

The `mock` engine has no model, and its tokens come at once (`python -m loadtests mock-server`), so
that the front end is what limits the server. The servers share one core, of which only one has work
at a time; the client has another. It lives in the API process, and encodes and decodes each step's
outputs as the message between a real engine and that process is. The decoding belongs there. The
mock's own work does not, and is in both servers' figures; to choose and encode a temperature comes
on top of ours. That is next to nothing where temperatures last, and most in "adaptive,
token-level", where one is drawn for every token.

The `tiny` engine is a real one in another process. Where that keeps up with the front end, on a GPU
beside several cores, the figures are the front end's; elsewhere the engine's.
"""

import asyncio
import json
import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.servers import Engine, Server, make_commands, start
from loadtests.ratios import bootstrap_ratio

PROMPT = "Write a short story about a lighthouse keeper who finds a letter."
STOCK, ORDINARY = "stock", "ordinary"
# What is asked of our server; stock answers the first to each.
ADAPTIVE: dict[str, dict[str, Any]] = {
    ORDINARY: {"temperature": 0.7},
    "adaptive, no report": {"temperature": "adaptive", "adaptive": {"report": "none"}},
    "adaptive, summary": {"temperature": "adaptive"},
    "adaptive, tokens": {"temperature": "adaptive", "adaptive": {"report": "tokens"}},
    "adaptive, token-level": {"temperature": "adaptive", "adaptive": {"head": "token"}},
}


@dataclass(frozen=True)
class Block:
    """Requests of one kind to one server.

    Attributes:
        requests_per_s: of all connections together.
        latency_s: median, from a request's first byte to its answer's last.
        cpu_s: processor seconds of the server's API process, a request.
    """

    requests_per_s: float
    latency_s: float
    cpu_s: float


def main(
    num_starts: Annotated[int, typer.Option(help="Starts of the two servers.", min=1)] = 8,
    num_pairs: Annotated[int, typer.Option(help="Pairs of blocks a start.", min=1)] = 16,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    # Short blocks: processors of shared machines change their speed within seconds.
    num_requests: Annotated[int, typer.Option(help="Of a block.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    stream: Annotated[bool, typer.Option(help="Stream the answers.")] = False,
    engine: Annotated[Engine, typer.Option(help="None, or a model of two layers.")] = "mock",
    out: Annotated[Path | None, typer.Option(help="Write all starts to this JSON file.")] = None,
) -> None:
    """Print the ratios of our front end to stock's as JSON, with 95 % intervals."""
    cores, is_mock = os.sched_getaffinity(0), engine == "mock"
    blocks = []
    with tempfile.TemporaryDirectory() as folder:
        commands = make_commands(engine, Path(folder))
        for seed in track(range(num_starts), "starts", console=Console(stderr=True)):
            os.sched_setaffinity(0, cores)
            with start(commands[0]) as ours, start(commands[1]) as stock:
                for server in (ours, stock):
                    server.wait_until_ready()
                if is_mock:
                    share_cores(ours, stock)
                measuring = measure(
                    ours,
                    stock,
                    num_pairs,
                    concurrency,
                    num_requests,
                    max_tokens,
                    stream,
                    is_mock,
                    seed,
                )
                blocks.append(asyncio.run(measuring))
    result: dict[str, Any] = {
        "engine": engine,
        "num_starts": num_starts,
        "num_pairs": num_pairs,
        "concurrency": concurrency,
        "max_tokens": max_tokens,
        "stream": stream,
        "ratios": compare_all(blocks, STOCK),
        "ratios_to_ordinary": compare_all(blocks, ORDINARY),
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        raw = [{kind: asdict(block) for kind, block in one.items()} for one in blocks]
        out.write_text(json.dumps({**result, "starts": raw}, indent=1))


def share_cores(ours: Server, stock: Server) -> None:
    """One core for the servers, and another for the client, which is this process."""
    cores = sorted(os.sched_getaffinity(0))
    for server in (ours, stock):
        server.pin(cores[-1])
    os.sched_setaffinity(0, {cores[0]})


def compare_all(blocks: list[dict[str, Block]], base: str) -> dict[str, Any]:
    """Every measure of every kind of request to our server, against another kind's."""
    return {
        kind: {name: compare(blocks, kind, name, base) for name in asdict(blocks[0][kind])}
        for kind in ADAPTIVE
        if kind != base
    }


def compare(
    blocks: list[dict[str, Block]], kind: str, measure: str, base: str = STOCK
) -> dict[str, Any]:
    """Ratio of a measure to stock's over the starts, its interval, the median of the difference."""
    pairs = [(getattr(one[kind], measure), getattr(one[base], measure)) for one in blocks]
    ratio = bootstrap_ratio([a / b for a, b in pairs], seed=0)
    return {
        "ratio": round(ratio.mean, 4),
        "interval_95": [round(ratio.low, 4), round(ratio.high, 4)],
        "median_difference": float(f"{np.median([a - b for a, b in pairs]):.3g}"),
    }


async def measure(
    ours: Server,
    stock: Server,
    num_pairs: int,
    concurrency: int,
    num_requests: int,
    max_tokens: int,
    stream: bool,
    is_polling: bool,
    seed: int,
) -> dict[str, Block]:
    """The mean of every kind's blocks, whose order is drawn anew for each pair."""
    awake = asyncio.create_task(stay_awake()) if is_polling else None
    body = {
        "model": await find_model(ours.port),
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    kinds = {STOCK: (stock, body | {"temperature": 0.7})}
    kinds |= {kind: (ours, body | fields) for kind, fields in ADAPTIVE.items()}

    async def run(kind: str) -> Block:
        server, content = kinds[kind]
        return await run_block(server, json.dumps(content).encode(), concurrency, num_requests)

    for kind in kinds:
        await run(kind)
    rng = random.Random(seed)
    blocks: dict[str, list[Block]] = {kind: [] for kind in kinds}
    for _ in range(num_pairs):
        order = rng.sample(list(kinds), len(kinds))
        # There and back: a drift within a pair meets every kind alike.
        for kind in (*order, *reversed(order)):
            blocks[kind].append(await run(kind))
    if awake is not None:
        awake.cancel()
    return {kind: average(done) for kind, done in blocks.items()}


def average(blocks: list[Block]) -> Block:
    """The geometric mean of blocks."""
    return Block(
        **{
            name: float(np.exp(np.mean([np.log(getattr(block, name)) for block in blocks])))
            for name in asdict(blocks[0])
        }
    )


async def run_block(server: Server, body: bytes, concurrency: int, num_requests: int) -> Block:
    """Every connection asks again as soon as it has its answer."""
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body
    latencies: list[float] = []
    num_left = num_requests

    async def ask() -> None:
        nonlocal num_left
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while num_left > 0:
            num_left -= 1
            begin = time.perf_counter()
            writer.write(request)
            await read_answer(reader)
            latencies.append(time.perf_counter() - begin)
        writer.close()

    cpu, start = server.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    cpu = server.cpu_seconds() - cpu
    return Block(num_requests / seconds, float(np.median(latencies)), cpu / num_requests)


async def stay_awake() -> None:
    """Poll the connections without a pause.

    Where the client has a core of its own. To wake a client that sleeps is the kernel's work in the
    server's name, and a slower server's client would sleep more often.
    """
    while True:
        await asyncio.sleep(0)


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """The body of a response; cheaper than a client library, which would be the bottleneck."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise SystemExit(f"the server answered {head.splitlines()[0].decode()}")
    _, is_sized, rest = head.partition(b"content-length:")
    if is_sized:
        return await reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
    return await reader.readuntil(b"\r\n0\r\n\r\n")


async def find_model(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    models = json.loads(await read_answer(reader))
    writer.close()
    return str(models["data"][0]["id"])


if __name__ == "__main__":
    typer.run(main)
