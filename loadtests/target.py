"""The server that is loaded: what it serves, and what it has counted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests.scenario import Style
from loadtests.settings import API_KEY, make_headers

ADAPTIVE_TOKENS = "adaptive_temperature_count"
ALL_TOKENS = "vllm:generation_tokens_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
# Of the API process; a server with several of them does not say.
CPU_SECONDS = "process_cpu_seconds_total"
_TIMEOUT_S = 60.0


class TargetError(Exception):
    """A server that cannot be load-tested; the message is one sentence."""


@dataclass(frozen=True)
class Head:
    """What answers of a head are checked against.

    Attributes:
        fallback: the temperature where it abstains; empty for a head that always chooses.
    """

    level: str
    temperatures: tuple[float, ...]
    select: str = "argmax"
    fallback: tuple[float, ...] = ()


@dataclass(frozen=True)
class Target:
    """A running server, as it describes itself."""

    url: str
    model: str
    heads: Mapping[str, Head]


def find_target(url: str, styles: Iterable[Style]) -> Target:
    """Ask a server what it serves, and whether it serves these.

    Raises:
        TargetError: nobody answers there, it is another kind of server, or it refuses a style.
    """
    url = url.rstrip("/").removesuffix("/v1")
    styles = list(styles)
    models = _ask(url, "/v1/models")
    # vLLM's own server will do where nothing adaptive is asked of it.
    is_adaptive = any(style.is_adaptive for style in styles)
    described = _ask(url, "/v1/adaptive/heads") if is_adaptive else {"data": []}
    read_counters(url)
    try:
        model = models["data"][0]["id"]
        heads = {head["id"]: _read_head(head) for head in described["data"]}
    except (KeyError, IndexError, TypeError):
        raise TargetError(f"{url} does not answer as an adaptive-head-server does") from None
    for number, style in enumerate(styles):
        body = {"model": model, "prompt": "Hello", "max_tokens": 1} | style.fields
        try:
            _ask(url, "/v1/completions", body)
        except TargetError as error:
            raise TargetError(f"the server does not serve styles.{number}: {error}") from None
    return Target(url, model, heads)


def _read_head(head: Mapping[str, Any]) -> Head:
    abstain = head.get("abstain")
    fallback = () if abstain is None else (abstain["fallback"],)
    return Head(head["level"], tuple(head["temperatures"]), head["select"], fallback)


def read_counters(url: str) -> dict[str, float]:
    """The metrics that are compared, summed over their labels.

    Raises:
        TargetError: the server does not say.
    """
    text = _send(url, "/metrics").text
    names = (ADAPTIVE_TOKENS, ALL_TOKENS, RUNNING, WAITING, CPU_SECONDS)
    counters = dict.fromkeys(names, 0.0)
    found = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in counters:
                counters[sample.name] += sample.value
                found.add(sample.name)
    if ALL_TOKENS not in found:
        raise TargetError(f"{url}/metrics has no {ALL_TOKENS}: is --disable-log-stats on?")
    return counters


def read_version(url: str) -> str:
    """The server's version of vLLM."""
    return str(_ask(url, "/version").get("version"))


def _ask(url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    try:
        return _send(url, path, body).json()
    except ValueError:
        raise TargetError(f"{url}{path} does not answer with JSON") from None


def _send(url: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
    try:
        method = "GET" if body is None else "POST"
        headers = make_headers()
        response = httpx.request(
            method, f"{url}{path}", json=body, headers=headers, timeout=_TIMEOUT_S
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TargetError(f"nobody answers at {url!r} ({error})") from None
    if response.status_code == 404:
        raise TargetError(
            f"{url}{path} is not there: is this the address of an adaptive-head-server?"
        )
    if response.status_code == 401:
        raise TargetError(f"{url}{path} wants an API key: give it in the environment, as {API_KEY}")
    if not response.is_success:
        raise TargetError(f"{url}{path} answers {response.status_code}: {response.text[:300]}")
    return response
