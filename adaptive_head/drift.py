"""The cumulative shares of temperatures in training, which drift is measured against."""

import math
from collections.abc import Iterable

from adaptive_head.decision import round_to_millionth
from adaptive_head.metadata import HeadMetadata

# The threshold of the alert `AdaptiveDrift`, which no shift by less than a bucket is to reach.
_THRESHOLD = 0.5


def accumulate_shares(head: HeadMetadata, bounds: Iterable[float]) -> dict[float, float]:
    """Share of what a head served in training that is at most each of these bounds.

    Where its temperatures are continuous, only at bounds of its own. A bound is left out if the two
    buckets around it hold more than half of the shares: a shift of 0.01 could move all of that
    across it.

    Returns:
        Nothing for a head that came without shares.
    """
    shares = head.training_shares
    if shares is None:
        return {}
    own = [*map(round_to_millionth, head.bounds)]
    steep = set()
    if head.is_continuous:
        pairs = zip(shares, (*shares[1:], 0.0), strict=True)
        steep = {bound for bound, pair in zip(own, pairs, strict=True) if sum(pair) > _THRESHOLD}
        bounds = [bound for bound in bounds if bound in own or math.isinf(bound)]
    served = list(zip(own, shares, strict=True))
    return {
        bound: sum(share for value, share in served if value <= bound)
        for bound in bounds
        if bound not in steep
    }
