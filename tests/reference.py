"""Slow references in Python numbers, written from the papers and not from the code under test."""

import math

import numpy as np

MASK = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def splitmix64_finish(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def gumbel(seed: int, position: int, choice: int) -> float:
    row = splitmix64_finish((seed + GOLDEN_GAMMA) & MASK)
    row = splitmix64_finish((row + position * GOLDEN_GAMMA) & MASK)
    bits = splitmix64_finish((row + (choice + 1) * GOLDEN_GAMMA) & MASK)
    uniform = ((bits >> 40) + 0.5) / (1 << 24)
    return -math.log(-math.log(uniform))


def mlp(state_dict, hidden: np.ndarray) -> np.ndarray:
    """Linear layers of a state dict with SiLU between them, in float64. [d] or [rows, d]."""
    x = np.asarray(hidden, dtype=np.float64)
    num_layers = len(state_dict) // 2
    for index in range(num_layers):
        weight = state_dict[f"layers.{index}.weight"].double().numpy()
        bias = state_dict[f"layers.{index}.bias"].double().numpy()
        x = x @ weight.T + bias
        if index < num_layers - 1:
            x = x / (1 + np.exp(-x))
    return x


def softmax(values) -> list[float]:
    peak = max(values)
    weights = [math.exp(value - peak) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def entropy(values) -> float:
    """In nats, of the softmax of logits; -inf is a masked token."""
    return -math.fsum(p * math.log(p) for p in softmax(values) if p > 0)


def entropy_temperature(values, t0: float, theta: float) -> float:
    uncertainty = entropy(values)
    return t0 * 0.8 ** (theta / uncertainty) if uncertainty > 1e-9 else 0.0


def schedule_temperature(num_generated: int, start: float, end: float, tokens: float) -> float:
    return start + (end - start) * min(num_generated / tokens, 1.0)


def chi_square(observed, expected) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
