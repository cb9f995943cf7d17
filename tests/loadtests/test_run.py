"""Whole runs against the mock server: the document's, and some with mistakes that must be found."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest
import yaml

from loadtests.scenario import list_scenarios, load_scenario
from tests.loadtests.document import ADJUSTED, COMPARE, DOCUMENT, LOCUST, SMOKE, WEB
from tests.programs import HANG_S
from tests.server.conftest import BIN, find_free_port

LOADTESTS = [sys.executable, "-m", "loadtests"]


def run(*arguments) -> subprocess.CompletedProcess[str]:
    command = [*LOADTESTS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def count_tokens(finished: subprocess.CompletedProcess[str]) -> int:
    """How many tokens the clients of a run have counted; 0 where it does not say."""
    counted = re.search(r"rose by \d+, the clients counted (\d+)", finished.stderr)
    return int(counted[1]) if counted else 0


def split(command: str) -> list[str]:
    """The arguments of one of the document's commands."""
    python, dash_m, loadtests, *arguments = shlex.split(command)
    assert (python, dash_m, loadtests) == ("python", "-m", "loadtests")
    return arguments


@pytest.fixture
def write(tmp_path):
    """A scenario's file: smoke's, with changes."""

    def run(**changes) -> str:
        path = tmp_path / "scenario.yaml"
        content = load_scenario("smoke").model_dump(mode="json") | changes
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return run


def test_a_run_shows_latencies_and_temperatures_and_ends_well(mock, tmp_path):
    finished = run(*split(SMOKE), "--url", mock.url, "--duration", 4, "--out", tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with (tmp_path / "locust_stats.csv").open() as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    for kind in ("chat", "long_prompt", "leaving"):
        for measured in ("TTFT, ms", "ITL, ms"):
            assert any((measured, f"{kind}, {arm}") in rows for arm in ("adaptive", "fixed"))
    assert any(measured == "tokens/s" and "batch" in name for measured, name in rows)
    assert ("temperature, 1/1000", "mean of an answer, sequence") in rows
    assert all(row["Failure Count"] == "0" for row in rows.values())
    assert (tmp_path / "locust.html").is_file()
    assert count_tokens(finished) > 0


FAULTS = [
    ("misaligned", "chat", r"WrongAnswerError\(.*temperatures for \d+ tokens"),
    (
        "uncounted",
        "chat",
        r"FAILED: the clients counted .* tokens, but the server's adaptive_temp",
    ),
    ("deaf", "leaving", r"FAILED: \d+ requests still ran or waited 0.5 s after the last user"),
]


@pytest.mark.parametrize(("fault", "kind", "sentence"), FAULTS)
def test_a_server_with_a_fault_does_not_pass(mock, fault_file, write, fault, kind, sentence):
    fault_file.write_text(fault)
    scenario = write(
        mix={kind: 1},
        styles=[{"temperature": "adaptive", "adaptive": {"report": "tokens"}}],
        work={"leave_max_tokens": 800, "think_time": [0, 0.1]},
        limits={"max_failed": 1, "max_idle_wait": 0.5},
    )
    finished = run("run", "--url", mock.url, "--scenario", scenario, "--duration", 2)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert re.search(sentence, finished.stdout + finished.stderr)


def test_a_run_lasts_as_long_as_asked_for_on_a_server_that_hesitates(mock, fault_file, write):
    fault_file.write_text("hesitant")
    finished = run("run", "--url", mock.url, "--scenario", write(), "--duration", 1)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert count_tokens(finished) > 0


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_its_summary(mock, tmp_path):
    # Too long to end by itself, and with the signal that a shell's background jobs ignore.
    arguments = [*split(ADJUSTED), "--url", mock.url, "--out", str(tmp_path), "--duration", "600"]
    running = subprocess.Popen(
        [*LOADTESTS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in running.stderr:
            if "All users spawned" in line:
                break
        time.sleep(2)
        running.send_signal(signal.SIGINT)
        _, log = running.communicate(timeout=HANG_S)
    finally:
        running.kill()
    assert running.returncode == 0, log
    assert "Tokens: adaptive_temperature_count rose by" in log
    assert "Aggregated" in log


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--url", "http://127.0.0.1:1"], "nobody answers at 'http://127.0.0.1:1'"),
        (["run", "--url", "nonsense"], "nobody answers at 'nonsense'"),
        (["run", "--scenario", "storm"], "there is no scenario 'storm'"),
        (["compare", "--scenario", "storm"], "there is no scenario 'storm'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    finished = run(*arguments)
    assert finished.returncode == 2
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("loadtests: ")
    assert sentence in last
    assert "Traceback" not in finished.stderr


def test_a_server_that_does_not_serve_a_style_is_refused(mock, write):
    styles = [{"temperature": 0.7}, {"temperature": "adaptive", "adaptive": {"head": "lost"}}]
    finished = run("run", "--url", mock.url, "--scenario", write(styles=styles))
    assert finished.returncode == 2
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("loadtests: the server does not serve styles.1: ")
    assert "adaptive.head" in last


def test_a_wrong_path_is_refused(mock):
    finished = run("run", "--url", f"{mock.url}/elsewhere")
    assert finished.returncode == 2
    assert "is this the address of an adaptive-head-server?" in finished.stderr


def test_workers_are_refused():
    command = [str(BIN / "locust"), "-f", "loadtests/locustfile.py", "--headless", "--master"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert finished.returncode == 2
    assert "run one locust process" in finished.stderr


@contextmanager
def serving(make_command: Callable[[int], list[str]], **environment: str) -> Iterator[httpx.Client]:
    """A browser at locust's page."""
    for _ in range(3):
        # Another process may take the port before locust does.
        port = find_free_port()
        page = subprocess.Popen(
            make_command(port), stderr=subprocess.DEVNULL, env=os.environ | environment
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as browser:
                if opens(page, browser):
                    yield browser
                    return
        finally:
            page.terminate()
            page.wait(HANG_S)
    raise AssertionError("locust does not serve its page")


def opens(page: subprocess.Popen, browser: httpx.Client) -> bool:
    """Wait for a page; whether it came before its process ended or hung."""
    deadline = time.monotonic() + HANG_S / 3
    while page.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if browser.get("/").is_success:
                return True
        time.sleep(0.1)
    return False


def test_the_command_serves_locusts_page(mock):
    def make_command(port: int) -> list[str]:
        return [*LOADTESTS, *split(WEB), "--url", mock.url, "--web-port", str(port)]

    with serving(make_command) as browser:
        assert read_state(browser) == "ready"


@pytest.mark.slow
def test_locust_alone_runs_what_the_environment_names(mock):
    scenario, locust, *options = shlex.split(LOCUST.replace("http://127.0.0.1:8000", mock.url))

    def make_command(port: int) -> list[str]:
        return [str(BIN / locust), *options, f"--web-port={port}", "--web-host=127.0.0.1"]

    environment = dict([scenario.split("=")], LOADTEST_DURATION="3")
    with serving(make_command, **environment) as browser:
        assert browser.post("/swarm", data={"host": mock.url}).json()["success"]
        wait_until(lambda: read_state(browser) == "running")
        wait_until(lambda: read_state(browser) == "stopped")
        stats = browser.get("/stats/requests").json()["stats"]
    measured = {row["method"] for row in stats}
    assert {"request", "TTFT, ms", "ITL, ms", "tokens/s", "temperature, 1/1000"} <= measured
    assert sum(row["num_failures"] for row in stats) == 0, json.dumps(stats, indent=1)


def read_state(browser: httpx.Client) -> str:
    return browser.get("/stats/requests").json()["state"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_comparison_writes_its_report(mock, tmp_path):
    finished = run(
        *split(COMPARE), *("--url", mock.url, "--pairs", 2, "--requests", 1, "--out", tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    assert "adaptive ÷ fixed, 2 pairs" in finished.stdout
    saved = json.loads((tmp_path / "measurements.json").read_text())
    blocks = {(block["arm"], block["pair"]): block for block in saved["blocks"]}
    assert len(blocks) == 6
    for pair in (0, 1):
        adaptive, fixed = blocks["adaptive", pair], blocks["fixed", pair]
        assert adaptive["num_tokens"] == fixed["num_tokens"] > 0
        assert sum(adaptive["temperatures"]["sequence"].values()) == adaptive["num_tokens"]
        assert not fixed["temperatures"]
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_a_comparison_with_wrong_answers_fails(mock, fault_file, write, tmp_path):
    fault_file.write_text("misaligned")
    styles = [{"temperature": "adaptive", "adaptive": {"report": "tokens"}}, {"temperature": 0.7}]
    scenario = write(mix={"chat": 1}, styles=styles)
    finished = run(
        *("compare", "--url", mock.url, "--scenario", scenario, "--pairs", 1, "--requests", 1),
        *("--out", tmp_path),
    )
    assert finished.returncode == 1
    assert "no pair of blocks came to its end without a failure" in finished.stderr


def test_the_document_lists_the_scenarios():
    listed = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", DOCUMENT, re.MULTILINE))
    found = {name: f"{load_scenario(name).duration:,.0f}" for name in list_scenarios()}
    assert listed == found
