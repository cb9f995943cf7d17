"""The values of `--adaptive-policy` and `--adaptive-max`."""

import json
import math

from adaptive_head.head import MAX_TEMPERATURE
from adaptive_head.operator_policy import POLICY_FLAG, describe_error, read_policy
from adaptive_head.options import AdaptiveRequest, OptionError


def parse_policy(text: str | None) -> AdaptiveRequest | None:
    """Parse a policy's name, or a JSON object; None where the flag is not given.

    Raises:
        ValueError: names the flag and the wrong field.
    """
    if text is None:
        return None
    try:
        return read_policy(json.loads(text) if text.lstrip().startswith("{") else text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{POLICY_FLAG}: not a JSON object: {error}") from None
    except OptionError as error:
        raise ValueError(f"{POLICY_FLAG}: {describe_error(error)}") from None


def parse_max(text: str | None) -> float | None:
    """Parse a temperature; None where the flag is not given.

    Raises:
        ValueError: names the flag, and says what would be valid.
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_TEMPERATURE:
        raise ValueError(
            f"--adaptive-max {text}: must be a temperature, from 0 to {MAX_TEMPERATURE:g}"
        )
    return value
