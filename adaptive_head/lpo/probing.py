"""The feature probe of a head, from the frozen model that it was trained on."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import AutoTokenizer

from adaptive_head.head import AdaptiveHead
from adaptive_head.lpo.frozen_model import FrozenModel, find_model_folder
from adaptive_head.metadata import MAX_PROBE_TOKENS, FeatureProbe
from adaptive_head.probe import choose_tolerance, compare_temperatures, expect_temperatures
from adaptive_head.vllm.head_runner import convert

# Unlike each other, so that a head has something to tell apart.
TEXTS: Final = (
    "What is the capital of France?",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Translate to German: Good morning, how are you?",
    "12 + 30 = 42, and 17 * 3 =",
    '{"name": "Ada", "born": 1815, "field":',
    "List five words that rhyme with light:\n1.",
    "Dear Sir or Madam,\n\nI am writing to",
)


@dataclass(frozen=True)
class ProbeStates:
    """The hidden states at the end of the probe's prompts.

    Attributes:
        prompts: token ids.
        precise: float32 [prompts, d], of the model in float32.
        rounded: bfloat16 [prompts, d], of the model in bfloat16.
    """

    prompts: tuple[tuple[int, ...], ...]
    precise: torch.Tensor
    rounded: torch.Tensor


def read_probe_states(model: Path | str) -> ProbeStates:
    """Run a model over the probe's prompts, in float32 and in bfloat16.

    Raises:
        ValueError: there is no such model.
        OSError: it has no tokenizer.
        torch.OutOfMemoryError: the device has no room for it in float32.
    """
    folder = find_model_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tuple(tuple(tokenizer(text).input_ids[:MAX_PROBE_TOKENS]) for text in TEXTS)
    precise, rounded = (
        _read_last_states(FrozenModel(folder, dtype), prompts) for dtype in ("float32", "bfloat16")
    )
    return ProbeStates(prompts, precise, rounded)


def make_probe(network: AdaptiveHead, states: ProbeStates) -> FeatureProbe:
    """The probe of one head. Its tolerance for 16 bits is what they change for this head."""
    network = copy.deepcopy(network).cpu().float().eval()
    expected = expect_temperatures(network, states.precise)
    # As a GPU does it: the head in 16 bits, too.
    rounded = expect_temperatures(convert(network, torch.bfloat16), states.rounded)
    tolerance = choose_tolerance(compare_temperatures(expected, rounded))
    return FeatureProbe(
        prompts=states.prompts,
        temperatures=expected,
        tolerances={
            "float32": choose_tolerance(0.0),
            "float16": tolerance,
            "bfloat16": tolerance,
        },
    )


def _read_last_states(frozen: FrozenModel, prompts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    return torch.stack([frozen.read_states(prompt)[-1] for prompt in prompts])
