"""From a chosen value to the millionths that travel; device functions of several kernels."""

import triton
import triton.language as tl

from adaptive_head.decision import MILLION
from adaptive_head.slots import Column

_MILLION = tl.constexpr(float(MILLION))
_SCALE = tl.constexpr(int(Column.SCALE))
_MIN = tl.constexpr(int(Column.MIN))
_MAX = tl.constexpr(int(Column.MAX))


@triton.jit
def to_micro(temperature):
    # As `adaptive_head.slots.to_micro`: in float64, half of a millionth rounded up.
    return tl.floor(temperature.to(tl.float64) * _MILLION + 0.5).to(tl.int32)


@triton.jit
def bound(temperature, options_ptr):
    """Scale, then min and max, then millionths. NaN, of broken logits, is taken for 0."""
    temperature = tl.where(temperature == temperature, temperature, 0.0)
    temperature = temperature * tl.load(options_ptr + _SCALE)
    temperature = tl.maximum(temperature, tl.load(options_ptr + _MIN))
    return to_micro(tl.minimum(temperature, tl.load(options_ptr + _MAX)))


@triton.jit
def prefer_chosen(chosen, micro):
    """A sequence-level choice that has been made (not NaN), else this one."""
    is_chosen = chosen == chosen
    return tl.where(is_chosen, to_micro(tl.where(is_chosen, chosen, 0.0)), micro)
