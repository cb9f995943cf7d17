"""Servers that a benchmark starts and ends: ours and stock vLLM's."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from adaptive_head.embedded_model import prepare
from adaptive_head.options import Level
from benchmarks.models import PRESETS, write_heads

Engine = Literal["mock", "tiny"]

OURS = [sys.executable, "-m", "server.cli"]
# What `vllm serve` starts. Its console script does not start with the CPU wheel.
STOCK = [
    sys.executable,
    "-c",
    "from vllm.entrypoints.launchers.api_server.entry import main; main()",
]
MOCK = [sys.executable, "-m", "loadtests", "mock-server", "--ttft", "0", "--itl", "0"]
_COMMON = ["--max-num-seqs", "1024", "--disable-uvicorn-access-log"]
# Both servers' own defaults for a CPU differ.
_TINY = ["--load-format", "dummy", "--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 30)]
_TINY += ["--no-enable-prefix-caching", "--enforce-eager"]
_TEMPERATURES = (0.0, 0.3, 0.7, 1.0)


@dataclass(frozen=True)
class Server:
    """A server that runs, and its API process."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            SystemExit: it has ended.
        """
        while self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            time.sleep(1)
        raise SystemExit(f"the server ended with {self.process.returncode} before it was ready")

    def pin(self, core: int) -> None:
        """Keep all threads of the API process, and those that they start, on one core."""
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})

    def cpu_seconds(self) -> float:
        """Processor time of the API process so far."""
        # A process's clock, by the number that Linux gives it. /proc counts in hundredths of a
        # second.
        return time.clock_gettime((~self.process.pid << 3) | 2)


@contextlib.contextmanager
def start(command: list[str]) -> Iterator[Server]:
    """A server on a free port, until the block ends."""
    port = find_port()
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    # Requests are sent without a key.
    environment = os.environ | {"VLLM_API_KEY": ""}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        yield Server(port, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def find_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_commands(engine: Engine, folder: Path) -> tuple[list[str], list[str]]:
    """The commands of our server and of stock vLLM's.

    Args:
        engine: `tiny` is a real one, with a model of two layers whose weights are drawn, in another
            process; `mock` has no model and lives in the API process.
        folder: where files for them may be written.
    """
    if engine == "mock":
        return [*MOCK, *_COMMON], [*MOCK, *_COMMON, "--stock"]
    model = folder / "model"
    write_tiny_model(model)
    heads = ["--no-verify-base"]
    levels: tuple[Level, ...] = "sequence", "token"
    for level in levels:
        hidden_size = PRESETS["tiny"]["hidden_size"]
        write_heads({level: folder / level}, hidden_size, (16,), _TEMPERATURES, level)
        heads += ["--head", f"{level}={folder / level}"]
    return (
        [*OURS, str(model), *_COMMON, *_TINY, *heads],
        [*STOCK, "--model", str(model), *_COMMON, *_TINY],
    )


def write_tiny_model(folder: Path) -> None:
    """A model without weights that can be served: of the tiny shape, with a real tokenizer."""
    shutil.copytree(prepare(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    embedded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: embedded[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = PRESETS["tiny"] | kept
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
