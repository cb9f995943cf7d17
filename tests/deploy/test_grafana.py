"""The dashboards are what the script writes, hang together, and can be drawn without data."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import httpx
import numpy as np
import pytest
import typer
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana import queries
from deploy.grafana.alerts import read_thresholds
from deploy.grafana.queries import PrometheusAPI, read_panels
from deploy.grafana.render import Page, format_value
from deploy.grafana.render import main as draw
from tests.deploy.test_prometheus import ALERTS
from tests.programs import HANG_S

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy/grafana"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in GRAFANA.glob("dashboards/*.json")}
PANELS = [panel for panel in DASHBOARDS["adaptive"]["panels"] if panel["type"] != "row"]
RUNBOOKS = DASHBOARDS["runbooks"]["panels"]


def test_the_command_of_the_document_writes_the_dashboards_as_they_are(tmp_path):
    document = (ROOT / "docs/operations.md").read_text()
    (command,) = re.findall(r"^python (-m deploy\.grafana\.build)$", document, re.MULTILINE)
    subprocess.run(
        [sys.executable, *command.split(), str(tmp_path)], cwd=ROOT, check=True, timeout=HANG_S
    )
    for name in DASHBOARDS:
        written = (tmp_path / f"{name}.json").read_bytes()
        assert written == (GRAFANA / f"dashboards/{name}.json").read_bytes(), f"run {command}"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_schema_knows_every_field(name):
    """Its types drop what they do not know, and refuse what lacks."""
    read = Dashboard.from_json(DASHBOARDS[name])
    assert json.loads(json.dumps(read, cls=JSONEncoder)) == DASHBOARDS[name]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_are_on_the_page_and_do_not_overlap(name):
    panels = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= queries.NUM_COLUMNS for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] >= other["x"] + other["w"] or other["x"] >= one["x"] + one["w"]
        below = one["y"] >= other["y"] + other["h"] or other["y"] >= one["y"] + one["h"]
        assert beside or below


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_asks_the_chosen_source(panel):
    assert panel["description"].endswith(".")
    assert panel["type"] == "heatmap" or panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        variables = set(re.findall(r"\$([a-z_]\w*)", target["expr"]))
        assert variables <= {"model", "head", "__rate_interval"}


def list_links() -> Iterator[dict]:
    for panel in PANELS:
        yield from panel.get("links", [])


def test_links_lead_to_the_run_book_that_they_name():
    for link in list_links():
        alert = link["title"].removeprefix("Run-book: ")
        uid, number = re.fullmatch(r"/d/([\w-]+)\?viewPanel=panel-(\d+)", link["url"]).groups()
        assert uid == DASHBOARDS["runbooks"]["uid"]
        assert [panel["title"] for panel in RUNBOOKS if panel["id"] == int(number)] == [alert]


def test_every_alert_has_its_run_book_and_a_panel_that_leads_there():
    assert [panel["title"] for panel in RUNBOOKS] == list(ALERTS)
    assert all(panel["options"]["content"] for panel in RUNBOOKS)
    linked = {link["title"].removeprefix("Run-book: ") for link in list_links()}
    assert linked == ALERTS.keys()


def test_thresholds_are_those_of_the_alerts():
    thresholds = read_thresholds()
    # These ask whether something is there.
    yes_or_no = {name for name in ALERTS if re.search("Missing|Disagree|NoHead|Down|Stuck", name)}
    assert thresholds.keys() == ALERTS.keys() - yes_or_no
    assert thresholds["AdaptiveDrift"] == 0.5
    (panel,) = [panel for panel in PANELS if panel["title"] == "Drift from training"]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"] == 0.5


def test_provisioning_names_the_source_and_the_folder():
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraped["scrape_interval"]
    dashboards = yaml.safe_load((GRAFANA / "provisioning/dashboards/adaptive.yml").read_text())
    (provider,) = dashboards["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def test_repetitions_push_down_what_is_below():
    def find(heads: int, title: str) -> dict:
        panels = read_panels([f"h{number}" for number in range(heads)], "1m")
        return next(panel for panel in panels if panel["title"] == title)

    first, fifth = find(5, "h0: tokens"), find(5, "h4: tokens")
    assert first["gridPos"] == fifth["gridPos"] | {"y": first["gridPos"]["y"]}
    assert fifth["gridPos"]["y"] == first["gridPos"]["y"] + first["gridPos"]["h"]
    assert 'head=~"h4"' in fifth["targets"][0]["expr"]
    assert "[1m]" in fifth["targets"][0]["expr"]
    below = find(5, "Drift from training")["gridPos"]["y"]
    assert below - find(4, "Drift from training")["gridPos"]["y"] == 8 + 7
    assert find(1, "Drift from training") == find(4, "Drift from training")


@pytest.fixture
def answer(monkeypatch):
    """Lets Prometheus give one answer to everything."""

    def give(body: dict) -> PrometheusAPI:
        monkeypatch.setattr(httpx, "post", lambda *_, **__: httpx.Response(200, json=body))
        return PrometheusAPI("http://nowhere", end=1e9, seconds=300)

    return give


def test_the_page_can_be_drawn_without_any_data(answer, tmp_path):
    api = answer({"status": "success", "data": {"result": []}})
    page = Page(api, read_panels(["h"], "1m"), "Nothing")
    words = {text.get_text() for axes in page.figure.axes for text in axes.texts}
    assert words == {"No data", "none", "no canary"}
    page.figure.savefig(tmp_path / "page.png")


def test_a_refused_query_is_an_error_that_names_it(answer):
    api = answer({"status": "error", "error": "parse error"})
    with pytest.raises(RuntimeError, match=r"parse error in sum\("):
        api.query("sum(")


def test_a_prometheus_that_is_not_there_is_named():
    with pytest.raises(typer.BadParameter, match=r"no answer from http://127\.0\.0\.1:1: "):
        draw("http://127.0.0.1:1", Path("unused.png"))


def test_an_answer_of_prometheus_is_read(answer):
    values = [[1.0, "0.5"], [2.0, "NaN"]]
    result = [{"metric": {"head": "tok"}, "values": values}]
    api = answer({"status": "success", "data": {"result": result}})
    panel = {"targets": [{"expr": "x", "legendFormat": "{{head}} of {{model}}"}]}
    ((name, series),) = api.find_curves(panel)
    assert name == "tok of "
    np.testing.assert_equal(series.values, [0.5, np.nan])
    np.testing.assert_equal(series.times, [1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.125, "percentunit", "12%"),
        (0.0125, "percentunit", "1.2%"),
        (0.25, "s", "250 ms"),
        (2.5, "s", "2.5 s"),
        (12345.6, "tokens/s", "12,346"),
        (0.5, None, "0.5"),
    ],
)
def test_numbers_are_written_with_their_units(value, unit, text):
    assert format_value(value, unit) == text
