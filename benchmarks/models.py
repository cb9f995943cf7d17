"""Models without weights: shapes by name, or from any Hugging Face configuration."""

import json
from pathlib import Path
from typing import Any

import torch

from adaptive_head import AdaptiveHead, HeadConfig, save_head
from adaptive_head.checkpoint import BaseModelIdentity
from adaptive_head.options import Level

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-70b": _LLAMA_3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": _LLAMA_3
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def write_config(source: str, folder: Path) -> None:
    """Write a model's config.json, for vLLM to draw weights for.

    Args:
        source: a preset's name, a config.json, or a folder with one.

    Raises:
        ValueError: there is no such preset and no such file, or it is no configuration.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if source in PRESETS:
        config = PRESETS[source]
    elif path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not readable JSON: {error}") from None
    else:
        raise ValueError(f"{source}: neither a config.json nor one of {', '.join(PRESETS)}")
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ValueError(f"{path}: not the configuration of a model, which names architectures")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_heads(
    folders: dict[str, Path],
    hidden_size: int,
    layer_sizes: tuple[int, ...],
    temperatures: tuple[float, ...],
    level: Level,
) -> None:
    """Write heads that choose all of their temperatures, which an untrained one does not.

    Args:
        folders: by the heads' names.
    """
    config = HeadConfig(hidden_size, temperatures, layer_sizes)
    for seed, folder in enumerate(folders.values()):
        network = AdaptiveHead(config, seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                is_last = name == f"layers.{len(layer_sizes)}.weight"
                parameter.mul_(300 if is_last else 3)
        save_head(
            folder,
            network,
            level=level,
            base_model=BaseModelIdentity(name="dummy"),
            trained=False,
        )
