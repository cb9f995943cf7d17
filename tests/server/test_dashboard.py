"""A real Prometheus reads the server under load: every query of ours has an answer."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from adaptive_head.checkpoint import read_metadata
from adaptive_head.heads import SHIPPED_HEADS
from deploy.grafana.queries import PrometheusAPI, read_panels
from server.admin_key import ADMIN_KEY_HEADER
from server.head_routes import HEADS_PATH
from tests.deploy.test_prometheus import ALERTS, RULES
from tests.programs import HANG_S, require
from tests.server.conftest import ADMIN_KEY, MODEL, find_free_port, wait_until

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "deploy/prometheus/prometheus.yml"
# A head with shares of training, which will be the canary of `tok`.
CANARY = "shipped"
# A head that abstains.
UNSURE = "unsure"
HEADS = ("tok", "seq", CANARY, UNSURE, "entropy")
# Without an alert the table of alerts is empty.
EMPTY = {"Alerts"}


@dataclass
class Load:
    """What clients have been told, and by how much the server's counters have risen."""

    choices: dict[str, Counter[float]] = field(default_factory=dict)
    num_fixed_tokens: int = 0
    tokens_by_head: dict[str, float] = field(default_factory=dict)
    num_generated: float = 0.0

    def count(self, answer: dict, num_tokens: int) -> None:
        adaptive = answer.get("adaptive")
        if adaptive is None:
            self.num_fixed_tokens += num_tokens
        else:
            self.choices.setdefault(adaptive["head"] or adaptive["policy"], Counter()).update(
                adaptive["temperatures"]
            )


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory) -> Iterator[httpx.Client]:
    """Prometheus with our rules; it looks every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(CONFIGURATION.parent / "rules/*.yml")]
    (folder / "key").touch()  # This server has none.
    configuration["scrape_configs"][0] |= {
        "authorization": {"credentials_file": str(folder / "key")},
        "static_configs": [{"targets": [server.url.removeprefix("http://")]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{find_free_port()}"
    command = [
        require("prometheus", "prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as connection:
            wait_until(lambda: is_up(connection))
            yield connection
    finally:
        process.kill()
        process.wait()


def is_up(connection: httpx.Client) -> bool:
    try:
        answer = connection.get("/api/v1/query", params={"query": 'up{job="adaptive"} == 1'})
    except httpx.TransportError:
        return False
    return answer.is_success and len(answer.json()["data"]["result"]) == 1


@pytest.fixture(scope="module")
def canary(server, heads, prometheus) -> Iterator[str]:
    """A head that ships, which answers half of what is asked of `tok`; another one abstains."""

    def change(method: str, path: str = "", **body: object) -> None:
        headers = {ADMIN_KEY_HEADER: ADMIN_KEY}
        response = server.http.request(method, HEADS_PATH + path, json=body, headers=headers)
        assert response.is_success, response.text

    for name, shipped in ((CANARY, "token"), (UNSURE, "sequence")):
        shutil.copytree(SHIPPED_HEADS[shipped], heads["tok"].parent / name)
        change("POST", name=name)
    change("PATCH", "/tok", canary={"head": CANARY, "percent": 50})
    yield CANARY
    change("PATCH", "/tok", canary=None)
    for name in (CANARY, UNSURE):
        change("DELETE", f"/{name}")


@pytest.fixture(scope="module")
def load(server, canary, prometheus) -> Load:
    """A minute's work or less: heads, a policy, fixed temperatures, streams and a mistake."""
    load = Load()
    before = read_counters(server)
    bodies = [
        {"temperature": "adaptive", "adaptive": {"head": "tok"}, "max_tokens": 12},
        {"temperature": "adaptive", "adaptive": {"head": "tok"}, "max_tokens": 9},
        {"temperature": "adaptive", "adaptive": {"head": "seq"}, "max_tokens": 8},
        {"temperature": "adaptive", "adaptive": {"head": UNSURE}, "max_tokens": 8},
        {"temperature": "adaptive", "adaptive": {"policy": "entropy"}, "max_tokens": 8},
        {"temperature": 0.7, "max_tokens": 8},
        {"temperature": "adaptive", "adaptive": {"head": "tok"}, "max_tokens": 8, "stream": True},
        {"temperature": 0.7, "max_tokens": 6, "stream": True},
    ]
    # In two waves: the first observation of a series is no rise yet.
    for wave in range(2):
        prompts = [f"{wave}, {number}: once upon" for number in range(5)]
        with ThreadPoolExecutor(8) as pool:
            asked = [
                pool.submit(ask, server, prompt, body) for prompt in prompts for body in bodies
            ]
            for answered in asked:
                load.count(*answered.result())
        assert server.post("/v1/completions", {"model": MODEL, "prompt": 1.5}).status_code == 400
        total = server.sum_metric("adaptive_temperature_count")
        wait_until(
            lambda total=total: query(prometheus, "sum(adaptive_temperature_count)") == total
        )
        time.sleep(2)  # for the rules, and for one more look
    rises = {name: value - before[name] for name, value in read_counters(server).items()}
    load.num_generated = rises.pop("generated")
    load.tokens_by_head = rises
    return load


def read_counters(server) -> dict[str, float]:
    tokens = {head: server.sum_metric("adaptive_temperature_count", head=head) for head in HEADS}
    return tokens | {"generated": server.sum_metric("vllm:generation_tokens_total")}


def ask(server, prompt: str, body: dict) -> tuple[dict, int]:
    """A choice, with its temperatures if it has any, and how many tokens it has."""
    body = {"model": MODEL, "prompt": prompt, "ignore_eos": True} | body
    if "adaptive" in body:
        body["adaptive"] = body["adaptive"] | {"report": "tokens"}
    with server.connect() as connection:
        response = connection.post("/v1/completions", json=body)
    assert response.is_success, response.text
    if not body.get("stream"):
        return response.json()["choices"][0], body["max_tokens"]
    lines = re.findall(r"^data: (\{.*)$", response.text, re.MULTILINE)
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    reports = [choice["adaptive"] for choice in choices if choice.get("adaptive")]
    if not reports:
        return {}, body["max_tokens"]
    temperatures = [value for report in reports for value in report.get("temperatures", [])]
    return {"adaptive": reports[-1] | {"temperatures": temperatures}}, body["max_tokens"]


def query(prometheus: httpx.Client, expression: str) -> float:
    found = prometheus.get("/api/v1/query", params={"query": expression}).json()["data"]["result"]
    return float(found[0]["value"][1]) if found else 0.0


@pytest.fixture(scope="module")
def api(load, prometheus) -> PrometheusAPI:
    return PrometheusAPI(str(prometheus.base_url), time.time(), 60)


def has_numbers(found: list) -> bool:
    return any(np.isfinite(series.values).any() for series in found)


def test_histograms_count_what_the_clients_count(load, prometheus):
    told = {head: counts.total() for head, counts in load.choices.items()}
    assert load.tokens_by_head == told
    assert load.num_generated - sum(told.values()) == load.num_fixed_tokens == 140
    for bound, share in (("0.0", (0.0,)), ("0.2", (0.0, 0.2))):
        selector = f'adaptive_temperature_bucket{{head="{CANARY}", le="{bound}"}}'
        assert query(prometheus, selector) == sum(load.choices[CANARY][value] for value in share)


def list_targets() -> list:
    return [
        pytest.param(panel, target, id=f"{panel['title']}, {target['refId']}")
        for panel in read_panels(list(HEADS), "1m")
        for target in panel.get("targets", [])
    ]


@pytest.mark.parametrize(("panel", "target"), list_targets())
def test_every_panel_has_data(api, panel, target):
    ask = api.query if target.get("instant") else api.query_range
    found = ask(target["expr"])
    assert has_numbers(found) == (panel["title"] not in EMPTY)


def test_legends_name_labels_that_are_there(api):
    for panel in read_panels(list(HEADS), "1m"):
        for target in panel.get("targets", []):
            for series in api.query_range(target["expr"]):
                labels = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
                assert labels <= series.labels.keys(), panel["title"]


def test_variables_and_marks_have_data(api):
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/adaptive.json").read_text())
    (mark,) = dashboard["annotations"]["list"]
    assert {"load", "canary"} <= {
        series.labels["action"] for series in api.query_range(mark["expr"])
    }
    found = {}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(
                r"label_values\((.+), (\w+)\)", variable["query"]["query"]
            ).groups()
            series = api.query(selector.replace("$model", ".*"))
            found[variable["name"]] = {one.labels[label] for one in series}
    assert found["model"] == {MODEL}
    assert found["head"] >= set(HEADS)


@pytest.mark.parametrize("name", [rule["record"] for rule in RULES if "record" in rule])
def test_every_recording_rule_has_a_result(api, name):
    # So little traffic is not judged.
    assert has_numbers(api.query_range(name)) == ("judged" not in name)


def test_the_drift_is_the_distance_between_what_clients_saw_and_training(api, load):
    metadata = read_metadata(SHIPPED_HEADS["token"])
    counts = np.array([load.choices[CANARY][value] for value in metadata.temperatures])
    assert counts.sum() == load.choices[CANARY].total()
    served, trained = np.cumsum(counts) / counts.sum(), np.cumsum(metadata.training_shares)
    (drift,) = api.query(f'head:adaptive_drift:ks1h{{head="{CANARY}"}}')
    assert drift.values[-1] == pytest.approx(np.abs(served - trained).max(), abs=1e-4)


def test_rules_are_evaluated_and_no_alert_is_active(load, prometheus):
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= ALERTS.keys()
    assert [rule.get("lastError") for rule in rules if rule["health"] != "ok"] == []
    assert prometheus.get("/api/v1/alerts").json()["data"]["alerts"] == []


def test_routes_are_counted_under_their_handlers(load, prometheus):
    handlers = 'count by (handler, status) (http_requests_total{job="adaptive"})'
    found = prometheus.get("/api/v1/query", params={"query": handlers}).json()["data"]["result"]
    pairs = {(one["metric"]["handler"], one["metric"]["status"]) for one in found}
    assert {("/v1/completions", "2xx"), ("/v1/completions", "4xx")} <= pairs
    assert (HEADS_PATH + "/{name}", "2xx") in pairs
    assert not {"/metrics", "/health"} & {handler for handler, _ in pairs}


def test_the_page_is_drawn_by_the_command_that_the_document_shows(load, prometheus, tmp_path):
    document = (ROOT / "docs/operations.md").read_text()
    (line,) = re.findall(r"^python (-m deploy\.grafana\.render .+)$", document, re.MULTILINE)
    command = line.replace("http://127.0.0.1:9090", str(prometheus.base_url))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=HANG_S,
    )
    assert (tmp_path / "dashboard.png").stat().st_size > 50_000
