"""The rules: Prometheus's own tool tests them, and what they speak of exists."""

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import metrics as http_metrics

from server.metrics import AdaptiveMetrics
from tests.programs import HANG_S, require
from tests.server.fakes import HEADS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
TESTS = sorted((FOLDER / "tests").glob("*.yml"))
RULES = [
    rule
    for file in sorted((FOLDER / "rules").glob("*.yml"))
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
OPERATIONS = (ROOT / "docs/operations.md").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/adaptive.json").read_text())
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
    "summary": ("_count", "_sum"),
}


def run(command: str) -> None:
    require("promtool", "prometheus")
    done = subprocess.run(
        ["bash", "-euc", command], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_valid(tmp_path):
    text = (FOLDER / "prometheus.yml").read_text()
    configuration = yaml.safe_load(text)
    # In the container, `start.sh` writes it.
    key_file = configuration["scrape_configs"][0]["authorization"]["credentials_file"]
    (tmp_path / "key").touch()
    text = text.replace(key_file, str(tmp_path / "key"))
    (tmp_path / "prometheus.yml").write_text(text.replace("rules/*", f"{FOLDER}/rules/*"))
    run(f"promtool check config --lint=all --lint-fatal {tmp_path}/prometheus.yml")


def test_the_commands_of_the_document_find_the_rules_valid_and_their_tests_passed():
    (commands,) = re.findall(r"^```bash\n(promtool .+?)^```", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert "promtool test rules deploy/prometheus/tests/*.yml" in commands
    run(commands)


def test_every_alert_is_tested_to_fire_and_to_be_silent():
    cases = [
        (case["alertname"], bool(case["exp_alerts"]))
        for file in TESTS
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert set(cases) == {(name, fires) for name in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(name):
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"].endswith(".")
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert page == "docs/operations.md"
    assert anchor == name.lower()


def test_every_alert_has_its_heading_in_the_document():
    section = OPERATIONS.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.+)$", section, re.MULTILINE) == list(ALERTS)


def find_metrics(expression: str) -> set[str]:
    """The names of metrics in an expression."""
    grouping = r"\b(by|without|on|ignoring|group_left|group_right) *\([^)]*\)"
    for noise in (r'"[^"]*"', r"\{[^}]*\}", r"\[[^]]*\]", grouping):
        expression = re.sub(noise, " ", expression)
    names = re.findall(r"(?<!\$)\b[a-zA-Z_:][\w:]*\b(?! *\()", expression)
    return set(names) - {"and", "or", "unless", "offset"}


def test_metrics_are_found_in_expressions():
    expression = (
        'sum by (model, le) (rate(a_b{x="y"}[5m])) / on (z) group_left () (c:d:e offset 1h) '
        "and absent(up) unless histogram_quantile(0.9, h_bucket) > 0.5"
    )
    assert find_metrics(expression) == {"a_b", "c:d:e", "up", "h_bucket"}


def list_served() -> Iterator[str]:
    """What stands on /metrics: ours, the HTTP instrumentation's, vLLM's."""
    registry = CollectorRegistry()
    AdaptiveMetrics("smol", HEADS, registry)
    http_metrics.default(registry=registry)
    families = [(family.name, family.type) for family in registry.collect()]
    package = find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "v1/metrics/loggers.py").read_text()
    declared = re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    for name, kind in families + [(name, kind) for kind, name in declared]:
        for suffix in SUFFIXES[kind]:
            yield name + suffix


def list_expressions() -> Iterator[str]:
    for rule in RULES:
        yield rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"].replace("label_values(", "(").rpartition(",")[0]


def test_whatever_rules_and_dashboard_ask_for_is_served_or_recorded():
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    known = {*list_served(), *recorded, "up", "ALERTS"}
    asked = set().union(*map(find_metrics, list_expressions()))
    assert asked <= known
    assert recorded <= asked, "a rule whose result nobody reads"
    assert {name for name in known if name.startswith("adaptive_head")} <= asked
