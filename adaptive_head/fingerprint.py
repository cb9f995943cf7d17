"""Which language model is this? A head is only meaningful on the one that it was made for."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_NUM_VALUES = 64
# Written out or left out depending on who saved the model, where it is tied to the embedding.
_TIED = "lm_head.weight"


def fingerprint_model(folder: Path) -> str | None:
    """A fingerprint of a model's weights: the same model saved as float32 or bfloat16 agrees,
    a fine-tuned sibling does not.

    SHA-256 over every tensor's name, shape and the first 64 values of its first row (as bfloat16),
    in order of name.

    Args:
        folder: a Hugging Face model folder.

    Returns:
        16 hexadecimal digits, or None where the folder holds no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                if name != _TIED:
                    tensors[name] = _describe(weights.get_slice(name))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name])
    return digest.hexdigest()[:16]


def _describe(tensor_slice: Any) -> bytes:
    shape = tensor_slice.get_shape()
    values = tensor_slice[:1] if len(shape) > 1 else tensor_slice[...]
    values = values.flatten()[:_NUM_VALUES]
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return repr(shape).encode() + values.contiguous().view(torch.uint8).numpy().tobytes()
