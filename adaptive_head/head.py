"""The A-daptive decoder's head: hidden state -> a distribution over K temperatures.

Dhuliawala et al. 2024, "Adaptive Decoding via Latent Preference Optimization", arXiv 2411.09661.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, cast

import torch
from torch import nn

MAX_TEMPERATURE = 10.0
MAX_NUM_TEMPERATURES = 64


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a head.

    Args:
        hidden_size: d, the width of the model's last hidden state.
        temperatures: the K temperatures to choose from, strictly increasing, each in [0, 10].
        layer_sizes: widths of the hidden layers; the paper's are (2048, 2048).

    Raises:
        ValueError: a size is not positive, or the temperatures are not as described.
    """

    hidden_size: int
    temperatures: tuple[float, ...]
    layer_sizes: tuple[int, ...] = (2048, 2048)

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or any(size < 1 for size in self.layer_sizes):
            raise ValueError("hidden_size and layer_sizes must be positive")
        check_temperatures(self.temperatures)

    @property
    def widths(self) -> tuple[int, ...]:
        """d, the widths of the hidden layers, K."""
        return (self.hidden_size, *self.layer_sizes, len(self.temperatures))


def check_temperatures(temperatures: tuple[float, ...]) -> None:
    """Raise ValueError unless there are 2 to 64 strictly increasing temperatures in [0, 10]."""
    if not 2 <= len(temperatures) <= MAX_NUM_TEMPERATURES:
        raise ValueError(
            f"temperatures: 2 to {MAX_NUM_TEMPERATURES} are needed, got {len(temperatures)}"
        )
    for value in temperatures:
        if not (math.isfinite(value) and 0.0 <= value <= MAX_TEMPERATURE):
            raise ValueError(f"temperatures: {value} is not in [0, {MAX_TEMPERATURE:g}]")
    if any(low >= high for low, high in pairwise(temperatures)):
        raise ValueError("temperatures must be strictly increasing")


class AdaptiveHead(nn.Module):
    """MLP with SiLU, d -> layer_sizes -> K.

    `forward` maps hidden states [rows, d] of any float dtype to float32 logits [rows, K];
    their softmax is P(tau_k | h_t). Each layer computes in the dtype of its weights.
    """

    def __init__(self, config: HeadConfig, seed: int = 0) -> None:
        super().__init__()
        self._build(config)
        self.to_empty(device="cpu")
        self._initialise(seed)

    @classmethod
    def from_weights(cls, config: HeadConfig, weights: Mapping[str, torch.Tensor]) -> Self:
        """A head with these weights, as float32, and without drawing any first."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head._build(config)
        head.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
        return head

    def _build(self, config: HeadConfig) -> None:
        self.config = config
        self.layers = nn.ModuleList(
            nn.Linear(wide, narrow, device="meta") for wide, narrow in pairwise(config.widths)
        )

    def _initialise(self, seed: int) -> None:
        # Training responses are sampled from the untrained head, which the paper needs to be
        # close to uniform over the temperatures: the last layer starts a hundredfold smaller.
        generator = torch.Generator().manual_seed(seed)
        layers = self._linears()
        for layer in layers:
            bound = 1 / math.sqrt(layer.in_features)
            if layer is layers[-1]:
                bound *= 0.01
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        *inner, last = self._linears()
        x = hidden
        for layer in inner:
            x = nn.functional.silu(layer(x.to(layer.weight.dtype)))
        logits: torch.Tensor = last(x.to(last.weight.dtype))
        return logits.float()

    def _linears(self) -> list[nn.Linear]:
        # To torch's annotations a ModuleList holds modules of any kind.
        return cast(list[nn.Linear], list(self.layers))


def select_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Eq. 4 of arXiv 2411.09661: the likeliest temperature. [rows, K] -> int64 [rows]."""
    return logits.argmax(dim=-1)


def select_sample(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Eq. 5 of arXiv 2411.09661: a draw from P(tau_k | h_t), by the Gumbel-max trick.

    Args:
        logits: float32 [rows, K].
        noise: independent standard Gumbel variables [rows, K], see `gumbel_noise`.
    """
    return (logits + noise).argmax(dim=-1)


def select_mean(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """The expected temperature, sum over k of P(tau_k | h_t) tau_k.

    Args:
        logits: float32 [rows, K]. NaN, of a broken hidden state, is taken for very unlikely.
        temperatures: float32 [K].

    Returns:
        float32 [rows], never NaN.
    """
    probabilities = logits.nan_to_num(nan=torch.finfo(logits.dtype).min).softmax(dim=-1)
    return (probabilities * temperatures).sum(dim=-1)


# Odd 64-bit constants of SplitMix64 (Steele, Lea and Flood 2014), as signed integers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical, not arithmetic, shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, num_choices: int) -> torch.Tensor:
    """Standard Gumbel noise that depends on nothing but (seed, position, choice).

    A counter-based generator: the same request seed gives the same draws whatever else is in
    the batch, on every device and after a preemption.

    Args:
        seeds: int64 [rows], one a request.
        positions: int64 [rows], the token's position in its sequence.
        num_choices: K.

    Returns:
        float32 [rows, K].
    """
    row = _mix(_mix(seeds + _STEP) + positions * _STEP)
    choice = torch.arange(1, num_choices + 1, device=seeds.device)
    bits = _mix(row.unsqueeze(1) + choice * _STEP)
    # 24 bits fill a float32 mantissa; the half keeps the uniform off both 0 and 1.
    uniform = (_shift_right(bits, 40).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform)).float()
