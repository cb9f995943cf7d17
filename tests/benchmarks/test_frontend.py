"""The comparison of front ends: arithmetic, client against a small server, one short run."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.frontend import (
    ADAPTIVE,
    ORDINARY,
    STOCK,
    Block,
    average,
    compare,
    read_answer,
    run_block,
)

ROOT = Path(__file__).parents[2]
BODY = b'{"model": "m"}'


def test_blocks_are_averaged_as_ratios_are():
    assert average([Block(100.0, 0.2, 0.001), Block(400.0, 0.8, 0.004)]) == Block(
        pytest.approx(200.0), pytest.approx(0.4), pytest.approx(0.002)
    )


def test_a_measure_is_compared_with_stocks_of_the_same_start():
    """In the second start the machine was half as fast."""
    blocks = [
        {STOCK: Block(200.0, 0.1, 0.004), "ours": Block(100.0, 0.3, 0.005)},
        {STOCK: Block(100.0, 0.2, 0.008), "ours": Block(50.0, 0.6, 0.010)},
    ]
    assert compare(blocks, "ours", "requests_per_s") == {
        "ratio": 0.5,
        "interval_95": [0.5, 0.5],
        "median_difference": -75.0,
    }
    assert compare(blocks, "ours", "latency_s")["ratio"] == pytest.approx(3.0)
    assert compare(blocks, "ours", "cpu_s")["ratio"] == 1.25


async def read(*pieces: bytes) -> tuple[bytes, bytes]:
    """What is read of one answer, and what is left of the connection."""
    reader = asyncio.StreamReader()
    answer = asyncio.create_task(read_answer(reader))
    for piece in pieces:
        reader.feed_data(piece)
        await asyncio.sleep(0)
    reader.feed_eof()
    return await answer, await reader.read()


async def test_a_sized_answer_is_read_to_its_length():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nCONTENT-LENGTH: 5\r\n\r\n"
    assert await read(head, b"ab", b"cdeHTTP") == (b"abcde", b"HTTP")


async def test_a_chunked_answer_is_read_to_its_last_chunk():
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    body, rest = await read(head, b"5\r\nab", b"cde\r\n0\r\n", b"\r\nHTTP")
    assert body == b"5\r\nabcde\r\n0\r\n\r\n" and rest == b"HTTP"


async def test_an_answer_that_is_no_success_ends_the_benchmark():
    reader = asyncio.StreamReader()
    reader.feed_data(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(SystemExit, match="503"):
        await read_answer(reader)


async def test_a_block_asks_so_often_at_so_many_at_once_and_accounts_for_it():
    asked, at_once, most_at_once = [], 0, 0

    async def answer(reader, writer):
        nonlocal at_once, most_at_once
        while head := await reader.read(len(BODY) + 200):
            asked.append(head)
            at_once += 1
            most_at_once = max(most_at_once, at_once)
            await asyncio.sleep(0.01)
            at_once -= 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    clock = iter([5.0, 5.8])
    async with await asyncio.start_server(answer, "127.0.0.1") as listener:
        port = listener.sockets[0].getsockname()[1]
        server = SimpleNamespace(port=port, cpu_seconds=lambda: next(clock))
        block = await run_block(server, BODY, concurrency=3, num_requests=8)
    assert len(asked) == 8 and most_at_once == 3
    assert all(head.startswith(b"POST /v1/chat/completions ") for head in asked)
    assert all(head.endswith(b"\r\n\r\n" + BODY) for head in asked)
    assert block.cpu_s == pytest.approx(0.1)
    assert 0.01 <= block.latency_s <= 8 / block.requests_per_s


@pytest.mark.slow
def test_a_short_run_compares_every_kind(tmp_path):
    out = tmp_path / "blocks.json"
    options = (
        "--num-starts 1 --num-pairs 2 --concurrency 4 --num-requests 8 --max-tokens 4 --stream"
    )
    command = [sys.executable, "-m", "benchmarks.frontend", *options.split(), "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result, written = json.loads(run.stdout), json.loads(out.read_text())
    starts = written.pop("starts")
    assert written == result
    assert result["ratios"].keys() == ADAPTIVE.keys()
    for ratios in result["ratios"].values():
        assert ratios.keys() == {"requests_per_s", "latency_s", "cpu_s"}
        for ratio in ratios.values():
            low, high = ratio["interval_95"]
            assert 0 < low <= ratio["ratio"] <= high
    assert [one.keys() for one in starts] == [{STOCK, *ADAPTIVE}]
    assert all(block["cpu_s"] > 0 for one in starts for block in one.values())
    assert result["ratios_to_ordinary"].keys() == ADAPTIVE.keys() - {ORDINARY}
