"""The kinds of panels that the dashboards have."""

from collections.abc import Sequence
from string import ascii_uppercase

from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig,
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import DashboardLink, FieldColor, ThresholdsConfig
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    AxisPlacement,
    BigValueGraphMode,
    GraphThresholdsStyleMode,
    HeatmapCellLayout,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.alerts import read_runbooks, read_thresholds

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUNBOOKS_URL = "/d/adaptive-runbooks"
THRESHOLDS = read_thresholds()
RUNBOOKS = list(read_runbooks())


def draw_lines(
    title: str,
    description: str,
    *queries: tuple[str, str],
    unit: str = "short",
    maximum: float | None = None,
    alerts: Sequence[str] = (),
    threshold: bool = True,
    width: int = 6,
) -> timeseries.Panel:
    """Curves over time.

    Args:
        queries: an expression and a legend each.
        alerts: those whose run-books the panel leads to.
        threshold: draw that of the first alert as a dashed line.
        width: of 24 columns.
    """
    panel = timeseries.Panel().title(title).description(description).datasource(SOURCE)
    panel.span(width).height(7).unit(unit).min(0).links(link_runbooks(alerts))
    for letter, (expression, legend) in zip(ascii_uppercase, queries, strict=False):
        panel.with_target(query(expression).legend_format(legend).ref_id(letter))
    if maximum is not None:
        panel.max(maximum)
    if threshold and alerts and alerts[0] in THRESHOLDS:
        panel.thresholds(color_from(THRESHOLDS[alerts[0]], "red"))
        panel.thresholds_style(GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    # The same name has the same colour in every panel.
    panel.color_scheme(FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel.fill_opacity(8).line_width(1.5).show_points(VisibilityMode.NEVER)
    panel.tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    return panel.legend(
        VizLegendOptions()
        .show_legend(True)
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
    )


def stack(panel: timeseries.Panel) -> timeseries.Panel:
    """Curves on top of each other, whose sum is what matters."""
    return panel.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)


def draw_number(
    title: str,
    description: str,
    expression: str,
    unit: str = "short",
    alert: str | None = None,
    bad_from: float | None = None,
    good_from: float | None = None,
) -> stat.Panel:
    """The last value, red from `bad_from` (or the alert's threshold) on, or below `good_from`."""
    panel = stat.Panel().title(title).description(description).datasource(SOURCE)
    panel.span(3).height(4).unit(unit).graph_mode(BigValueGraphMode.AREA)
    panel.with_target(query(expression).legend_format(title))
    panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    if alert:
        panel.links(link_runbooks([alert]))
        bad_from = THRESHOLDS.get(alert)
    if good_from is not None:
        return panel.thresholds(color_from(good_from, "green", below="red"))
    if bad_from is not None:
        return panel.thresholds(color_from(bad_from, "red"))
    return panel.thresholds(ThresholdsConfig().steps([Threshold(color="text", value=None)]))


def draw_heatmap(
    title: str, description: str, expression: str, alerts: Sequence[str] = ()
) -> heatmap.Panel:
    """The buckets of a histogram over time; `expression` sums by `le` alone."""
    target = query(expression).legend_format("{{le}}").format(PromQueryFormat.HEATMAP)
    colors = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges")
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(24)  # shared by its repetitions
        .height(8)
        .links(link_runbooks(alerts))
        .with_target(target)
        .calculate(False)
        .color(colors.steps(64))
        .cell_gap(1)
        .cell_values(heatmap.CellValues().unit("tokens/s"))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.LE))
        .y_axis(heatmap.YAxisConfig().axis_placement(AxisPlacement.LEFT))
        .show_legend()
    )


def list_series(
    title: str,
    description: str,
    expression: str,
    columns: dict[str, str],
    empty: str,
    width: int,
    unit: str = "short",
    alerts: Sequence[str] = (),
) -> table.Panel:
    """A table with a line a series.

    Args:
        columns: the labels to show, in this order, with their headings; `Value` is the value.
        empty: what stands there without any series.
    """
    organize = {
        "includeByName": dict.fromkeys(columns, True),
        "indexByName": {label: index for index, label in enumerate(columns)},
        "renameByName": columns,
    }
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(5)
        .unit(unit)
        .no_value(empty)
        .links(link_runbooks(alerts))
        .with_target(query(expression).instant().format(PromQueryFormat.TABLE))
        .with_transformation(DataTransformerConfig(id_val="organize", options=organize))
    )


def link_cells(panel: table.Panel, heading: str, title: str, url: str) -> table.Panel:
    """Let the cells of a column lead elsewhere."""
    link = DynamicConfigValue(id_val="links", value=[{"title": title, "url": url}])
    return panel.override_by_name(heading, [link])


def query(expression: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).datasource(SOURCE).range().ref_id("A")


def color_from(bound: float, color: str, below: str = "green") -> ThresholdsConfig:
    steps = [Threshold(color=below, value=None), Threshold(color=color, value=bound)]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def link_runbooks(alerts: Sequence[str]) -> list[Builder[models.DashboardLink]]:
    return [
        DashboardLink(f"Run-book: {alert}")
        .type(DashboardLinkType.LINK)
        .url(f"{RUNBOOKS_URL}?viewPanel=panel-{RUNBOOKS.index(alert) + 1}")
        for alert in alerts
    ]
