"""What an operator configures, on its way from the command line to every process of vLLM."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from adaptive_head.operator_policy import POLICY_FLAG, describe_error, read_policy
from adaptive_head.options import AdaptiveRequest, OptionError, PolicyName
from adaptive_head.parameters import Temperature
from adaptive_head.vllm.limits import Limits

# The key in vLLM's `--additional-config`, a JSON object that reaches every process.
CONFIG_KEY = "adaptive"
CPU_KV_CACHE_BYTES = 2 << 30
# In the environment, where no list of processes shows it.
ADMIN_KEY_VARIABLE = "ADAPTIVE_ADMIN_KEY"
# Of characters. Guesses are slowed down, but it is the length that makes them hopeless.
MIN_ADMIN_KEY_LEN = 16


def _read_policy(value: Any) -> AdaptiveRequest | None:
    try:
        return None if value is None else read_policy(value)
    except OptionError as error:
        raise ValueError(describe_error(error)) from None


class AdaptiveSettings(BaseModel):
    """The `adaptive` entry of vLLM's additional config.

    Attributes:
        heads: folders of the heads, by the name under which requests pick them.
        default_head: the head of requests that name none; if null the first that has not failed the
            gate.
        adaptive_by_default: whether requests that name no temperature are adaptive. Not beam
            search, nor LoRA adapters where the server's policy is a head.
        verify_base: whether a head must have been made for exactly the served weights. Off for
            a quantised copy of the head's base model.
        request_log: a file, or "-" for the standard output, that gets a line of JSON for every
            request; null for none.
        playground: whether `/playground` shows its page.
        metrics_without_key: whether `/metrics` is open on a server with an API key.
        heads_dir: where heads may be loaded from while the server runs; null: they are not.
        adaptive_policy: what adaptive requests get that choose neither a policy nor a head: a
            policy's name, or an object like the `adaptive` of a request. Null: the default head.
        adaptive_max: no adaptive temperature is above it; null for no such bound.
        limits: how much one request may ask for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: dict[str, Path] = {}
    default_head: str | None = None
    adaptive_by_default: bool = False
    verify_base: bool = True
    request_log: str | None = None
    playground: bool = True
    metrics_without_key: bool = False
    heads_dir: Path | None = None
    adaptive_policy: Annotated[AdaptiveRequest | None, BeforeValidator(_read_policy)] = None
    adaptive_max: Temperature | None = None
    limits: Limits = Limits()

    def check(self) -> None:
        """Raise ValueError where entries contradict each other, or a head's name is taken."""
        for name in self.heads:
            check_head_name(name)
        policy = self.adaptive_policy or AdaptiveRequest()
        if self.adaptive_by_default and policy.policy == "head" and not self.heads:
            raise ValueError(
                "--adaptive-default needs a --head, or an --adaptive-policy that needs none"
            )
        low, high = policy.min or 0.0, self.adaptive_max
        if high is not None and low > high:
            raise ValueError(
                f"{POLICY_FLAG}: min: must be at most {high:g}, the --adaptive-max, got {low:g}"
            )
        if self.default_head is not None and self.default_head not in self.heads:
            raise ValueError(
                f"--default-head {self.default_head}: not one of the heads "
                f"({', '.join(self.heads) or 'none'})"
            )


def read_settings(additional_config: Any) -> AdaptiveSettings:
    """The settings in a vLLM config's `additional_config`; defaults where there are none.

    Raises:
        ValueError: a field is wrong, a head's name is taken, or `default_head` is not a head.
    """
    value = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
    try:
        settings = AdaptiveSettings.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in (CONFIG_KEY, *first["loc"]))
        message = first.get("ctx", {}).get("error", first["msg"])
        raise ValueError(f"--additional-config: {field}: {message}") from None
    settings.check()
    return settings


def check_head_name(name: str) -> None:
    """Raise ValueError for a head named like a policy: both label answers and metrics."""
    if name in get_args(PolicyName):
        raise ValueError(f"a head cannot be named {name!r}, which is a policy")


def read_admin_key(heads_dir: Path | None, num_api_processes: int, is_elastic: bool) -> str | None:
    """The key that changes heads must show, from the environment; None where that is off.

    Args:
        is_elastic: whether engines may join while the server runs.

    Raises:
        ValueError: the key, the folder or `--api-server-count 1` is missing, the key is short, or
            elastic EP is on.
    """
    key = os.environ.get(ADMIN_KEY_VARIABLE) or None
    if (key is None) != (heads_dir is None):
        raise ValueError(
            f"changing heads while the server runs needs both {ADMIN_KEY_VARIABLE} in the "
            "environment and --heads-dir"
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ValueError(f"{ADMIN_KEY_VARIABLE} must be printable ASCII, as headers are")
    if key is not None and len(key) < MIN_ADMIN_KEY_LEN:
        raise ValueError(
            f"{ADMIN_KEY_VARIABLE} must have at least {MIN_ADMIN_KEY_LEN} characters, and has "
            f"{len(key)}: `openssl rand -hex 16` makes one"
        )
    if heads_dir is not None and not heads_dir.is_dir():
        raise ValueError(f"--heads-dir {heads_dir}: not a folder")
    if key is not None and num_api_processes > 1:
        raise ValueError(
            "changing heads while the server runs works with --api-server-count 1 only: the "
            "other API processes would not hear of it"
        )
    if key is not None and is_elastic:
        raise ValueError(
            "changing heads while the server runs does not work with --enable-elastic-ep: an "
            "engine that joins would have the heads of the command line only"
        )
    return key
