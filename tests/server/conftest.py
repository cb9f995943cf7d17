import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from adaptive_head import AdaptiveHead, HeadConfig, load_head
from adaptive_head.embedded_model import prepare
from adaptive_head.vllm.settings import ADMIN_KEY_VARIABLE
from server.report import set_current_report
from tests.background import Background
from tests.heads import save_strong_head
from tests.leftovers import of_session

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
MODEL = "smol"
HIDDEN_SIZE = 576
TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.3)
ADMIN_KEY = "open-sesame-please"
START_TIMEOUT_S = 500
# What a server or a test does at once and has not done after so long hangs.
HANG_S = 300
ENGINE_OPTIONS = (
    f"--served-model-name={MODEL}",
    "--dtype=float32",
    "--enforce-eager",
    "--max-num-batched-tokens=256",
    "--max-model-len=2048",
    "--max-num-seqs=16",
    f"--kv-cache-memory-bytes={1 << 29}",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--disable-uvicorn-access-log",
)


class Server:
    """A server in a process of its own, with the processes that it starts."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # With a new connection for each request: of a pool that several threads share, one may
        # close a connection that another has just taken, and a server closes what idles.
        self.http = self.connect(limits=httpx.Limits(max_keepalive_connections=0))
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--host=127.0.0.1", f"--port={self.port}"],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Away from the terminal's Ctrl-C, so that only `stop` ends it.
                start_new_session=True,
            )
        self.children: list[psutil.Process] = []

    def connect(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self.process.poll() is None, self.read_log()
            assert time.monotonic() < deadline, self.read_log()
            try:
                if self.get("/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it as a user would. Returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=HANG_S)

    def wait_until_idle(self, seconds: float = HANG_S) -> None:
        """Wait until the engine has no request, for some seconds at most."""
        states = [f"vllm:num_requests_{state}" for state in ("running", "waiting")]
        wait_until(lambda: not any(map(self.sum_metric, states)), seconds)

    @contextmanager
    def beginning(self, num_prompts: int) -> Iterator[None]:
        """Wait at the end until the engine has been handed so many adaptive prompts in between.

        A count, unlike the gauge of running requests, cannot miss a short one.
        """
        wanted = self.sum_metric("adaptive_requests_total") + num_prompts
        yield
        wait_until(lambda: self.sum_metric("adaptive_requests_total") >= wanted)

    def kill(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
        for child in self.children:
            if child.is_running():
                child.kill()

    def read_log(self) -> str:
        return self.log.read_text()[-6000:]

    def post(self, path: str, body: object) -> httpx.Response:
        """Send a body: an object to send as JSON, or the bytes themselves."""
        content = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"content-type": "application/json"}
        return self.http.post(path, content=content, headers=headers)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def sum_metric(self, sample_name: str, **labels: str) -> float:
        """The sum of a metric's samples, over all labels that are not given."""
        return sum(
            sample.value
            for sample in self.read_metrics()
            if sample.name == sample_name and labels.items() <= sample.labels.items()
        )

    def read_metrics(self) -> Iterator[Sample]:
        for family in text_string_to_metric_families(self.get("/metrics").text):
            yield from family.samples


def wait_until(condition: Callable[[], object], seconds: float = HANG_S) -> None:
    """Ask until it is so, for some seconds at most."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_environment(**changes: str) -> dict[str, str]:
    return os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"} | changes


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Server]:
    server = Server(command, make_environment(**environment), log)
    try:
        yield server
    finally:
        server.kill()


def begin_server(background: Background, name: str, command: list[str], **environment: str) -> None:
    """Begin to start a server while other tests run; once for each name."""
    environment = of_session(make_environment(**environment))
    log = background.folder / f"{name}.txt"
    background.begin(f"server {name}", start, command, environment, log)


def start(command: list[str], environment: dict[str, str], log: Path) -> Server:
    server = Server(command, environment, log)
    try:
        server.wait_until_ready()
    except BaseException:
        server.kill()
        raise
    return server


@contextmanager
def begun(background: Background, name: str) -> Iterator[Server]:
    """The server of that name, once it is ready, until the block ends."""
    server = background.wait(f"server {name}")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def _no_current_report() -> None:
    """Each test begins as a request does; one without a loop shares its context with the others."""
    set_current_report(None)


@pytest.fixture(scope="session")
def model() -> Path:
    """The embedded model's folder."""
    return prepare()


@cache
def make_heads(background: Background) -> dict[str, Path]:
    """A head of each level, with seeds for which all temperatures come up."""
    folder, model = background.folder / "server heads", prepare()
    config = HeadConfig(HIDDEN_SIZE, TEMPERATURES, (64, 64))
    return {
        name: save_strong_head(folder / name, model, config, level, seed)
        for name, level, seed in [("tok", "token", 9), ("seq", "sequence", 6)]
    }


@pytest.fixture(scope="session")
def heads(background) -> dict[str, Path]:
    return make_heads(background)


@pytest.fixture(scope="session")
def networks(heads) -> dict[str, AdaptiveHead]:
    return {name: load_head(folder).network for name, folder in heads.items()}


@pytest.fixture(scope="session")
def server(background) -> Iterator[Server]:
    """`adaptive-serve` as a user starts it; one for all tests."""
    begin_main_server(background)
    with begun(background, "main") as server:
        yield server


def begin_main_server(background: Background) -> None:
    heads = make_heads(background)
    options = [f"--head={name}={folder}" for name, folder in heads.items()]
    command = [str(BIN / "adaptive-serve"), str(prepare()), *options, *ENGINE_OPTIONS]
    command.append(f"--heads-dir={heads['tok'].parent}")
    environment = {"VLLM_ENABLE_RESPONSES_API_STORE": "1", ADMIN_KEY_VARIABLE: ADMIN_KEY}
    begin_server(background, "main", command, **environment)


# A reasoning model's, which thinks unless it is told not to.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}
"""


@pytest.fixture(scope="session")
def mock_server(background, heads) -> Iterator[Server]:
    """The mock engine behind the whole front end; it starts in seconds."""
    template = background.folder / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    options = [f"--head={name}={folder}" for name, folder in heads.items()]
    options += [f"--chat-template={template}", "--disable-uvicorn-access-log"]
    options += [f"--served-model-name={MODEL}", "--max-model-len=2048"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
    command = [sys.executable, "-m", "loadtests", "mock-server", "--ttft=0", "--itl=0", *options]
    log = background.folder / "mock.txt"
    with running(command, log, VLLM_ENABLE_RESPONSES_API_STORE="1") as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def ending_server(server) -> Server:
    """The same, for a test that ends it."""
    return server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "ending_server" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def client(server) -> Iterator[OpenAI]:
    url = f"{server.url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        yield client
