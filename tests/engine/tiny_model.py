"""A tiny random language model, so that an engine's correctness can be tested in seconds."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 512
HIDDEN_SIZE = 64


def make_tiny_model(folder: Path, **changes: int) -> Path:
    """Write the model; its weights are large enough that its distributions differ.

    Args:
        changes: of its configuration.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def make_tiny_eagle(folder: Path, model: Path) -> Path:
    """Write a draft model for `make_tiny_model`'s: one layer over its hidden states, untrained."""
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(model)
    config.num_hidden_layers = 1
    # EAGLE takes embedding and LM head from the model, and has no norm before its first layer.
    weights = {
        name.removeprefix("model."): tensor.contiguous()
        for name, tensor in LlamaForCausalLM(config).float().state_dict().items()
        if "layers" in name and "input_layernorm" not in name
    }
    weights["fc.weight"] = torch.randn(HIDDEN_SIZE, 2 * HIDDEN_SIZE) * 0.1
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def last_hidden_states(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """What enters the LM head at every position, by transformers. float32 [tokens, d]."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.model(torch.tensor([token_ids])).last_hidden_state[0]
