"""Every metric of the front end, declared once. They stand beside vLLM's own on /metrics."""

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from adaptive_head.checkpoint import HeadMetadata
from adaptive_head.options import Options
from adaptive_head.selector import MICRO

LABELS = ("model", "head", "level")
# Where no head is loaded, for the learning-free policies.
DEFAULT_BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)


class CountedHistogram(Histogram):
    """A histogram that takes many equal observations at the price of one.

    prometheus-client observes one value at a time, which would be the dearest part of a token's
    way through the API process.
    """

    def observe_many(self, value: float, count: int) -> None:
        """Observe `value` `count` times."""
        self._raise_if_not_observable()
        self._sum.inc(value * count)
        for bound, bucket in zip(self._upper_bounds, self._buckets, strict=True):
            if value <= bound:
                bucket.inc(count)
                break


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
        buckets = merge_buckets(head.temperatures for head in heads.values())
        self._temperature = CountedHistogram(
            "adaptive_temperature",
            "Temperatures chosen, one observation a generated token.",
            LABELS,
            buckets=buckets,
            registry=registry,
        )
        self._request_temperature = Histogram(
            "adaptive_request_temperature",
            "Mean temperature of an answer.",
            LABELS,
            buckets=buckets,
            registry=registry,
        )
        self._requests = Counter(
            "adaptive_requests",
            "Adaptive prompts handed to the engine.",
            (*LABELS, "policy"),
            registry=registry,
        )
        info = Gauge(
            "adaptive_head_info",
            "The loaded heads; always 1.",
            (*LABELS, "trained", "base_model", "temperatures"),
            registry=registry,
            multiprocess_mode="max",
        )
        for name, head in heads.items():
            temperatures = " ".join(f"{value:g}" for value in head.temperatures)
            trained = str(head.trained).lower()
            info.labels(model, name, head.level, trained, head.base_model.name, temperatures).set(1)

    def count_request(self, options: Options) -> None:
        """A prompt has been handed to the engine."""
        self._requests.labels(self._model, options.name, options.level, options.policy).inc()

    def count_tokens(self, options: Options, num_tokens: Mapping[int, int]) -> None:
        """Tokens have been generated.

        Args:
            num_tokens: how many at each temperature, which is in millionths.
        """
        histogram = self._temperature.labels(self._model, options.name, options.level)
        for micro, count in num_tokens.items():
            histogram.observe_many(micro / MICRO, count)

    def count_answer(self, options: Options, mean: float) -> None:
        """A sequence has ended; `mean` is its tokens' mean temperature."""
        self._request_temperature.labels(self._model, options.name, options.level).observe(mean)


def merge_buckets(temperatures: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """The temperatures of all heads, as bucket bounds; DEFAULT_BUCKETS where there are none.

    Rounded as the observed ones are, which would miss their bucket otherwise.
    """
    bounds = {round(value * MICRO) / MICRO for head in temperatures for value in head}
    return tuple(sorted(bounds)) or DEFAULT_BUCKETS
