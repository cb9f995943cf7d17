"""What the dashboards take from elsewhere: thresholds from the alerts, run-books from the docs."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules/alerts.yml"
OPERATIONS = ROOT / "docs/operations.md"


def read_thresholds() -> dict[str, float]:
    """The threshold of each alert: the number that ends its expression's first line."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    found = {
        name: re.match(r".* [<>] ([\d.]+)\n", expression) for name, expression in rules.items()
    }
    return {name: float(match[1]) for name, match in found.items() if match}


def read_runbooks() -> dict[str, str]:
    """The Markdown below each heading in the section `Alerts`, in the order of the page."""
    section = OPERATIONS.read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    _, *parts = re.split(r"^### (\w+)\n", section, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}
