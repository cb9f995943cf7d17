"""The settings of a control, among which training prompts choose, and those of the model card."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from adaptive_head.lpo.arms import (
    MICRO_DIGITS,
    Family,
    Setting,
    fix_temperature,
    format_temperature,
)
from adaptive_head.lpo.engine import Filters
from adaptive_head.lpo.records import DataError
from adaptive_head.options import AdaptiveRequest
from adaptive_head.parameters import EntropyParameters

CARD_FILE = "generation_config.json"
# In the order in which they are tried: as many of each as there are fixed temperatures.
MIN_P = (0.1, 0.05, 0.2, 0.02, 0.3, 0.15, 0.01, 0.4)
TOP_P = (0.95, 0.9, 0.8, 0.7, 0.6, 0.98, 0.5, 0.4)
_CARD_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_THETAS = (1.0, 0.1)


def list_settings(
    family: Family, temperatures: Sequence[float], head: str = ""
) -> list[tuple[Setting, str]]:
    """The settings of a control and their labels, as many as there are fixed temperatures."""
    num = len(temperatures)
    if family == "fixed":
        return [(fix_temperature(t), format_temperature(t)) for t in temperatures]
    if family == "entropy":
        return [_make_rule(t0, theta) for t0, theta in list_rules(num)]
    if family == "top_p":
        return [(Setting(1.0, Filters(top_p=p)), f"{p:g}") for p in fill(TOP_P, num)]
    temperature = AdaptiveRequest(head=head) if family == "head_min_p" else 1.0
    return [(Setting(temperature, Filters(min_p=p)), f"{p:g}") for p in fill(MIN_P, num)]


def list_rules(num: int) -> list[tuple[float, float]]:
    """Pairs of `t0`, in equal steps down from 1, and `theta`, 1 and 0.1 in turn."""
    steps = math.ceil(num / len(_THETAS))
    rules = [
        (round((steps - step) / steps, MICRO_DIGITS), theta)
        for step in range(steps)
        for theta in _THETAS
    ]
    return rules[:num]


def _make_rule(t0: float, theta: float) -> tuple[Setting, str]:
    entropy = EntropyParameters(t0=t0, theta=theta)
    return Setting(AdaptiveRequest(policy="entropy", entropy=entropy)), f"{t0:g}-{theta:g}"


def fill(values: Sequence[float], num: int) -> list[float]:
    """The first `num` of the values; where there are fewer, evenly spaced ones follow."""
    spaced = (round((i + 0.5) / num, MICRO_DIGITS) for i in range(num))
    return list(dict.fromkeys([*values, *spaced]))[:num]


def read_card(model: Path | str) -> Setting:
    """The sampling that a model's makers recommend in its `generation_config.json`.

    Without the file it is transformers' own default, temperature 1; `do_sample: false` is greedy.

    Raises:
        DataError: the file is not readable, or holds another value than a number.
    """
    path = Path(model) / CARD_FILE
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        card = {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from None
    found = {name: card[name] for name in _CARD_FIELDS if card.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{path}: {name} must be a number")
    temperature = float(found.pop("temperature", 1.0))
    if card.get("do_sample") is False:
        temperature = 0.0
    return Setting(temperature, Filters(**found))
