"""The one place that uses private fields of prometheus-client; a test pins what it uses.

Its public interface has no way to observe a value many times, or to widen a histogram's buckets,
that also works with several API processes.
"""

from collections.abc import Iterable

from prometheus_client import Histogram


class CountedHistogram(Histogram):
    """A histogram that takes many equal observations at the price of one, and new buckets.

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

    @property
    def bounds(self) -> list[float]:
        """The upper bounds of its buckets, the last of them infinite."""
        return self._upper_bounds

    def widen(self, bounds: Iterable[float]) -> None:
        """Give the children that come from now on these buckets too."""
        self._kwargs["buckets"] = sorted({*self._kwargs["buckets"], *bounds})
