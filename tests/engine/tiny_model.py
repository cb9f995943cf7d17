"""A tiny random language model, so that an engine's correctness can be tested in seconds."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 512
HIDDEN_SIZE = 64


def make_tiny_model(folder: Path) -> Path:
    """Write the model; its weights are large enough that its distributions differ."""
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
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@torch.inference_mode()
def last_hidden_states(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """What enters the LM head at every position, by transformers. float32 [tokens, d]."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.model(torch.tensor([token_ids])).last_hidden_state[0]
