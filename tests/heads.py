"""Untrained heads with opinions strong enough that ties do not matter."""

from pathlib import Path

import torch

from adaptive_head import AdaptiveHead, HeadConfig, save_head
from adaptive_head.checkpoint import BaseModelIdentity
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.options import Level


def save_strong_head(
    folder: Path, model: Path, config: HeadConfig, level: Level, seed: int
) -> Path:
    """Write a head for a model. The seed decides which temperatures it likes."""
    network = AdaptiveHead(config, seed=seed)
    with torch.no_grad():
        for layer in network.layers:
            layer.weight *= 3
        network.layers[-1].weight *= 100
    identity = BaseModelIdentity(name=model.name, fingerprint=fingerprint_model(model))
    save_head(folder, network, level=level, base_model=identity, trained=False)
    return folder
