"""A head as `adaptive-head` shows it."""

import json

from rich.table import Table
from rich.text import Text

from adaptive_head.abstention import Abstention
from adaptive_head.checkpoint import LoadedHead


def make_table(head: LoadedHead) -> Table:
    """What is known of a head, for a person."""
    metadata = head.metadata
    num_weights = sum(weight.numel() for weight in head.network.parameters())
    table = Table(title=Text(str(head.path)), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "made for": metadata.base_model.name,
        "fingerprint": metadata.base_model.fingerprint or "none",
        "level": metadata.level,
        "select": metadata.select,
        "abstain": describe_abstention(metadata.abstain),
        "temperatures": ", ".join(f"{value:g}" for value in metadata.temperatures),
        "layers": " → ".join(map(str, metadata.config.widths)),
        "weights": f"{num_weights:,}",
        "trained": "yes" if metadata.trained else "no",
        "gate": metadata.gate or "not run",
        "training": json.dumps(metadata.training) if metadata.training else "none",
        "created": metadata.created,
        "git commit": metadata.git_sha or "unknown",
        "packages": ", ".join(f"{name} {version}" for name, version in metadata.packages.items()),
        "format": str(metadata.format_version),
    }
    for name, value in rows.items():
        # Plain text, so that [brackets] in a name are not read as markup.
        table.add_row(name, Text(value))
    return table


def describe_abstention(abstain: Abstention | None) -> str:
    """When a head gives its fallback, in a few words."""
    if abstain is None:
        return "never"
    return f"{abstain.fallback:g} where its {abstain.statistic} is below {abstain.threshold:g}"
