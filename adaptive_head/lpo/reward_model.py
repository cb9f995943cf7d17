"""Reward models of Hugging Face: sequence classifiers that judge a response to a prompt."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adaptive_head.lpo.records import DataError, Prompt, Response, Span
from adaptive_head.lpo.rewards import ModelRewardConfig

Encoding = dict[str, list[int]]


class RewardModel:
    """Scores responses by a model: its only label's logit, or its output's `score`.

    A chat is judged in the chat template of the model's own tokenizer, and a plain text as a
    user's message in it. Without a template a plain text is judged in one piece with the
    response, and a chat as a pair of texts, as BERT-like models take them. What is too long for
    the model loses its beginning.

    Raises:
        ValueError: begins with the field; the model cannot be loaded, lacks weights, or gives no
            single score.
    """

    has_spans = False

    def __init__(self, config: ModelRewardConfig) -> None:
        self._config = config
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        source = {
            "pretrained_model_name_or_path": config.model,
            "trust_remote_code": config.trust_remote_code,
        }
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(**source)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                **source, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"model: {config.model} cannot be loaded: {reason}") from error
        # Such as a language model's: transformers gives it a random head, and a warning.
        if info["missing_keys"]:
            names = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"model: {config.model} is no reward model: it lacks {names}")
        try:
            self._model = model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {config.model} cannot run on {device}: {error}") from error
        self._tokenizer.truncation_side = "left"
        self._max_length = find_max_length(self._tokenizer, model)
        self._pad_token_id = model.config.get_text_config().pad_token_id
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._compute([self._encode_texts("a", "b")])

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError if the prompt's reference lacks the request without its constraint."""
        self._config.check_prompt(prompt)

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        """None: a model scores whole responses."""
        return []

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """The model's score of each response.

        Raises:
            DataError: names the response that the chat template refuses.
        """
        encodings = []
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                encodings.append(self._encode(self._config.remove_constraint(prompt), response))
            except Exception as error:
                where = f"prompt {response.prompt_id}, sample {response.sample}"
                raise DataError(f"{where}: {type(error).__name__}: {error}") from error
        scores = [0.0] * len(encodings)
        # Those of like length together: little padding, and the largest batch comes first.
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i]["input_ids"]))
        for start in range(0, len(order), self._config.batch_size):
            batch = order[start : start + self._config.batch_size]
            values = self._compute([encodings[i] for i in batch])
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
        return scores
