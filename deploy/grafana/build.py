"""Write the dashboards: python -m deploy.grafana.build"""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import text
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.text import TextMode

from deploy.grafana.alerts import read_runbooks
from deploy.grafana.panels import RUNBOOKS_URL, SOURCE
from deploy.grafana.sections import (
    MODEL,
    add_canaries,
    add_latency,
    add_now,
    add_temperatures,
    add_traffic,
)

# For a minute from a change on. A rate would miss the first, with which the series begins.
CHANGES = "sum by (action, result) (adaptive_head_changes_total{})"
HEADS_CHANGED = (
    f"{CHANGES.format('')} > ({CHANGES.format(' offset 1m')} or {CHANGES.format('')} * 0)"
)
FOLDER = Path(__file__).parent / "dashboards"


def main(folder: Path = FOLDER) -> None:
    """Write each dashboard into a file that is named like it."""
    for name, builder in (("adaptive", build_dashboard()), ("runbooks", build_runbooks())):
        dashboard = builder.build()
        for number, panel in enumerate(dashboard.panels or [], start=1):
            panel.id_val = number
        content = json.dumps(dashboard, cls=JSONEncoder, indent=2)
        (folder / f"{name}.json").write_text(content + "\n")


def build_dashboard() -> Dashboard:
    """Temperatures and servers, the most urgent first."""
    dashboard = (
        Dashboard("Adaptive temperatures")
        .uid("adaptive")
        .description("Which temperatures the heads choose, and how the servers do.")
        .tags(["adaptive"])
        .readonly()
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(DashboardLink("Run-books").type(DashboardLinkType.LINK).url(RUNBOOKS_URL).icon("doc"))
        .annotation(
            AnnotationQuery()
            .name("Heads changed")
            .datasource(SOURCE)
            .enable(True)
            .icon_color("purple")
            .expr(HEADS_CHANGED)
        )
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            choose("model", 'label_values(vllm:num_requests_running{job="adaptive"}, model_name)')
        )
        .with_variable(choose("head", f"label_values(adaptive_requests_total{{{MODEL}}}, head)"))
    )
    for add in (add_now, add_temperatures, add_traffic, add_latency, add_canaries):
        add(dashboard)
    return dashboard


def choose(name: str, query: str) -> QueryVariable:
    """A list to choose from; at first, all."""
    return (
        QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def build_runbooks() -> Dashboard:
    """The operator's handbook, a panel an alert, where no other page is at hand."""
    dashboard = (
        Dashboard("Adaptive temperatures: run-books")
        .uid(RUNBOOKS_URL.rpartition("/")[2])
        .tags(["adaptive"])
        .readonly()
    )
    for alert, content in read_runbooks().items():
        panel = text.Panel().title(alert).span(12).height(9)
        dashboard.with_panel(panel.mode(TextMode.MARKDOWN).content(content))
    return dashboard


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
