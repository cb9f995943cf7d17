"""One answer with its temperatures, for `adaptive-head inspect`."""

from pathlib import Path

from transformers import AutoTokenizer

from adaptive_head.language_model import LanguageModel
from adaptive_head.lpo.coloring import split_tokens
from adaptive_head.lpo.engine import GenerationRequest, open_engine
from adaptive_head.lpo.experiment import EngineConfig
from adaptive_head.lpo.records import Prompt
from adaptive_head.lpo.tasks import encode_prompt
from adaptive_head.options import AdaptiveRequest

ENGINE = EngineConfig(max_num_seqs=1)


def answer_prompt(
    prompt: str, head: Path, model: LanguageModel, max_tokens: int, seed: int
) -> tuple[list[str], list[float]]:
    """An answer's tokens as text, and the temperature of each.

    Raises:
        ValueError: the head is not one for the model.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    message = Prompt("prompt", "inspect", messages=({"role": "user", "content": prompt},))
    request = GenerationRequest(
        id="prompt",
        prompt_token_ids=encode_prompt(tokenizer, message),
        max_tokens=max_tokens,
        seed=seed,
        temperature=AdaptiveRequest(head="inspected"),
    )
    with open_engine(model.folder, ENGINE, {"inspected": head}) as engine:
        (generation,) = engine.generate([request])
    return split_tokens(tokenizer.decode, generation.token_ids), list(generation.temperatures)
