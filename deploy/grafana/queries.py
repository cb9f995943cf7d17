"""The dashboard's queries, put to Prometheus as Grafana would."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

DASHBOARD = Path(__file__).parent / "dashboards/adaptive.json"
NUM_COLUMNS = 24  # of the grid
MAX_POINTS = 300

Labels = dict[str, str]


@dataclass(frozen=True)
class Series:
    """A series as Prometheus answers: times in seconds since 1970, and values, of one length."""

    labels: Labels
    times: np.ndarray
    values: np.ndarray


class PrometheusAPI:
    """Queries over a span of time that ends now, or at its end.

    Args:
        url: where Prometheus listens.
        end: seconds since 1970.
        seconds: how long the span is.
    """

    def __init__(self, url: str, end: float, seconds: float) -> None:
        self._url = url.rstrip("/")
        self.start, self.end = end - seconds, end
        self._step = max(seconds / MAX_POINTS, 1)

    def query(self, expression: str) -> list[Series]:
        """The values at the end.

        Raises:
            RuntimeError: Prometheus refuses the expression; says why.
        """
        return self._ask("query", {"query": expression, "time": self.end})

    def query_range(self, expression: str) -> list[Series]:
        """The values over the span. Raises as `query` does."""
        span = {"start": self.start, "end": self.end, "step": self._step}
        return self._ask("query_range", {"query": expression, **span})

    def find_curves(self, panel: dict[str, Any]) -> list[tuple[str, Series]]:
        """A panel's curves, with their legends."""
        return [
            (write_legend(target["legendFormat"], series.labels), series)
            for target in panel["targets"]
            for series in self.query_range(target["expr"])
        ]

    def _ask(self, endpoint: str, form: dict[str, Any]) -> list[Series]:
        answer = httpx.post(f"{self._url}/api/v1/{endpoint}", data=form, timeout=30).json()
        if answer["status"] != "success":
            raise RuntimeError(f"Prometheus: {answer['error']} in {form['query']}")
        return [_read_series(found) for found in answer["data"]["result"]]


def _read_series(found: dict[str, Any]) -> Series:
    points = np.array(found.get("values") or [found["value"]], dtype=float)
    return Series(found["metric"], points[:, 0], points[:, 1])


def write_legend(template: str, labels: Labels) -> str:
    """A template such as `{{head}} p50`, with the labels put in."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template)


def read_panels(heads: list[str], rate: str, dashboard: Path = DASHBOARD) -> list[dict[str, Any]]:
    """The panels as Grafana would lay them out: variables put in, repetitions made.

    Args:
        heads: the values of the variable `head`.
        rate: the range that Grafana would choose for rates, such as `1m`.
    """
    panels, lower_by = [], 0
    for panel in json.loads(dashboard.read_text())["panels"]:
        place = panel["gridPos"]
        place["y"] += lower_by
        if "repeat" not in panel:
            panels.append(_substitute(panel, ".*", rate))
            continue
        per_row = int(panel["maxPerRow"])
        width = place["w"] // per_row
        for number, head in enumerate(heads):
            row, column = divmod(number, per_row)
            moved = {"x": column * width, "w": width, "y": place["y"] + row * place["h"]}
            panels.append(_substitute(panel | {"gridPos": place | moved}, head, rate))
        lower_by += (max(len(heads) - 1, 0) // per_row) * place["h"]
    return panels


def _substitute(panel: dict[str, Any], head: str, rate: str) -> dict[str, Any]:
    text = json.dumps(panel).replace("$__rate_interval", rate)
    return json.loads(text.replace("$model", ".*").replace("$head", head))
