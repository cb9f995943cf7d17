"""Every metric of the front end, declared once. They stand beside vLLM's own on /metrics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.utils import floatToGoString

from adaptive_head.decision import MILLION, round_to_millionth
from adaptive_head.drift import accumulate_shares
from adaptive_head.metadata import HeadMetadata
from adaptive_head.options import Options
from server.counted_histogram import CountedHistogram

LABELS = ("model", "head", "level")
# Where no head is loaded, for the learning-free policies.
DEFAULT_BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)


class AdaptiveMetrics:
    """The metrics of one API process, for one served model.

    With several API processes prometheus-client adds them up, through the directory that
    vLLM sets up for its own.

    Args:
        model: the served model's name.
        heads: the loaded heads; their temperatures are the buckets.
        registry: a fresh one, in tests.
    """

    def __init__(
        self,
        model: str,
        heads: Mapping[str, HeadMetadata],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._model = model
        # By name, level and policy.
        self._series: dict[tuple[str, str, str], _Series] = {}
        buckets = merge_buckets(head.bounds for head in heads.values())
        self._temperature = CountedHistogram(
            "adaptive_temperature",
            "Temperatures chosen, one observation per generated token. Of a cancelled answer, at "
            "least the tokens that the client received and at most those that the engine made.",
            LABELS,
            buckets=buckets,
            registry=registry,
        )
        self._request_temperature = CountedHistogram(
            "adaptive_request_temperature",
            "Mean temperature of an answer.",
            LABELS,
            buckets=buckets,
            registry=registry,
        )
        self._requests = Counter(
            "adaptive_requests",
            "Adaptive prompts handed to the engine, also those that it then refuses.",
            (*LABELS, "policy"),
            registry=registry,
        )
        self._abstained_tokens = Counter(
            "adaptive_abstained_tokens",
            "Generated tokens that got a head's fallback, because it was too unsure to choose.",
            LABELS,
            registry=registry,
        )
        self._info = Gauge(
            "adaptive_head_info",
            "The loaded heads; always 1.",
            (*LABELS, "trained", "base_model", "temperatures", "select", "below_top"),
            registry=registry,
            multiprocess_mode="max",
        )
        self._training_share = Gauge(
            "adaptive_head_training_share",
            "Share of a head's choices in training that were at most `le`.",
            (*LABELS, "le"),
            registry=registry,
            multiprocess_mode="max",
        )
        self._canary_share = Gauge(
            "adaptive_canary_share",
            "Share of a head's requests that its canary answers.",
            ("model", "head", "canary"),
            registry=registry,
            multiprocess_mode="max",
        )
        self._head_changes = Counter(
            "adaptive_head_changes",
            "Attempts to change heads, or the override, while the server runs.",
            ("model", "action", "result"),
            registry=registry,
        )
        self._override = Gauge(
            "adaptive_override",
            "1 while one constant answers every adaptive request, else 0.",
            ("model",),
            registry=registry,
            multiprocess_mode="max",
        )
        self._unauthorized = Counter(
            "adaptive_unauthorized_requests",
            "Requests refused because their API key was missing or wrong.",
            ("model",),
            registry=registry,
        )
        self._unauthorized.labels(model)
        self.set_override(False)
        for name, head in heads.items():
            self.add_head(name, head)

    def add_head(self, name: str, head: HeadMetadata) -> None:
        """A head serves from now on. Its series start at once, at 0, so that no rise is missed."""
        self._series.clear()
        labels = self._model, name, head.level
        for histogram in (self._temperature, self._request_temperature):
            # A namesake's buckets may lack its temperatures.
            missing = {*map(round_to_millionth, head.bounds)} - {*histogram.labels(*labels).bounds}
            if missing:
                histogram.remove(*labels)
                histogram.widen(missing)
        bounds = self._temperature.labels(*labels).bounds
        self._request_temperature.labels(*labels)
        self._requests.labels(*labels, "head")
        if head.abstain is not None:
            self._abstained_tokens.labels(*labels)
        self._info.labels(*labels, *_describe(head)).set(1)
        for bound, share in accumulate_shares(head, bounds).items():
            self._training_share.labels(*labels, floatToGoString(bound)).set(share)

    def remove_head(self, name: str, head: HeadMetadata) -> None:
        """A head serves no longer. What it has chosen remains counted until `forget_head`."""
        self._info.remove(self._model, name, head.level, *_describe(head))
        self._training_share.remove_by_labels({"model": self._model, "head": name})

    def forget_head(self, name: str, level: str) -> None:
        """Drop the counts of a head that serves no longer and has no request left."""
        self._series.clear()
        counts = self._temperature, self._request_temperature, self._requests
        for metric in (*counts, self._abstained_tokens):
            metric.remove_by_labels({"model": self._model, "head": name, "level": level})

    def set_canary(self, head: str, canary: str, share: float) -> None:
        """`canary` answers this share (0 to 1) of the requests to `head`; 0 ends it."""
        labels = self._model, head, canary
        if share:
            self._canary_share.labels(*labels).set(share)
        else:
            self._canary_share.remove(*labels)

    def set_override(self, is_on: bool) -> None:
        """Show whether one constant answers every adaptive request."""
        self._override.labels(self._model).set(is_on)

    def count_change(self, action: str, result: str) -> None:
        """Somebody has tried to change heads or the override."""
        self._head_changes.labels(self._model, action, result).inc()

    def count_unauthorized(self) -> None:
        """A request came without an API key, or with a wrong one."""
        self._unauthorized.labels(self._model).inc()

    def count_request(self, options: Options) -> None:
        """A prompt is being handed to the engine, which may still refuse it."""
        self._find_series(options).requests.inc()

    def count_tokens(self, options: Options, num_tokens: Mapping[int, int]) -> None:
        """Tokens have been generated.

        Args:
            num_tokens: how many at each temperature, which is in millionths.
        """
        histogram = self._find_series(options).temperature
        for micro, count in num_tokens.items():
            histogram.observe_many(micro / MILLION, count)

    def count_abstained(self, options: Options, num_tokens: int) -> None:
        """So many of the tokens got the fallback of a head that may abstain."""
        labels = self._model, options.name, options.level
        self._abstained_tokens.labels(*labels).inc(num_tokens)

    def count_answer(self, options: Options, mean: float) -> None:
        """A sequence has ended; `mean` is its tokens' mean temperature."""
        self._find_series(options).request_temperature.observe(mean)

    def _find_series(self, options: Options) -> "_Series":
        key = options.name, options.level, options.policy
        if (series := self._series.get(key)) is None:
            labels = self._model, options.name, options.level
            series = self._series[key] = _Series(
                self._temperature.labels(*labels),
                self._request_temperature.labels(*labels),
                self._requests.labels(*labels, options.policy),
            )
        return series


@dataclass(frozen=True)
class _Series:
    """The series that an answer is counted in; to find them costs more than to count."""

    temperature: CountedHistogram
    request_temperature: CountedHistogram
    requests: Counter


def merge_buckets(bounds: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """The bounds of all heads, as a histogram's; DEFAULT_BUCKETS where there are none."""
    merged = {round_to_millionth(bound) for head in bounds for bound in head}
    return tuple(sorted(merged)) or DEFAULT_BUCKETS


def _describe(head: HeadMetadata) -> tuple[str, ...]:
    temperatures = " ".join(f"{value:g}" for value in head.temperatures)
    below_top = max(bound for bound in head.bounds if bound < head.temperatures[-1])
    return (
        str(head.trained).lower(),
        head.base_model.name,
        temperatures,
        head.select,
        floatToGoString(round_to_millionth(below_top)),
    )
