"""Reward models of Hugging Face: sequence classifiers that judge a response to a prompt."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adaptive_head.lpo.records import DataError, Prompt, Response, Span
from adaptive_head.lpo.rewards import ModelRewardConfig, describe_error, name_response

Encoding = dict[str, list[int]]


class RewardModel:
    """Scores responses by a model: its only label's logit, or its output's `score`.

    A chat is judged in the chat template of the model's own tokenizer, and a plain text as a
    user's message in it. Without a template a plain text is judged in one piece with its
    response, and a chat's contents and the response as a pair of texts, as BERT-like models take
    them. What is too long for the model loses its beginning.

    Raises:
        ValueError: begins with the field; the model cannot be loaded, lacks weights, or gives no
            single score.
    """

    has_spans = False

    def __init__(self, config: ModelRewardConfig) -> None:
        self._config = config
        self._device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer, self._model = load(config, self._device)
        self._max_length = find_max_length(self._tokenizer, self._model)
        self._text_config = self._model.config.get_text_config()
        self._pad_token_id = self._text_config.pad_token_id
        takes_types = "token_type_ids" in inspect.signature(self._model.forward).parameters
        self._input_names = ("input_ids", "token_type_ids") if takes_types else ("input_ids",)
        self._try_out()

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError if the prompt's reference lacks the request without its constraint."""
        self._config.check_prompt(prompt)

    def find_spans(self, prompt: Prompt, response: Response) -> list[Span]:
        """None: a model scores whole responses."""
        return []

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """The model's score of each response.

        Raises:
            DataError: names the response that the chat template refuses, or the longest of a
                batch on which the model fails (out of memory, say).
        """
        encodings = []
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                seen = self._config.remove_constraint(prompt)
                encodings.append(self._encode(seen, response.text))
            except Exception as error:
                raise DataError(f"{name_response(response)}: {describe_error(error)}") from error
        # Those of like length together: little padding, and too much for the memory fails at once.
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i]["input_ids"]))
        scores = [0.0] * len(encodings)
        for start in range(0, len(order), self._config.batch_size):
            batch = order[start : start + self._config.batch_size]
            try:
                values = self._compute([encodings[i] for i in batch])
            except Exception as error:
                where = f"{name_response(responses[batch[0]])} (the longest of {len(batch)})"
                raise DataError(f"{where}: {describe_error(error)}") from error
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
        return scores

    def _encode(self, prompt: Prompt, answer: str) -> Encoding:
        options: dict[str, Any] = {"truncation": False}
        if self._max_length is not None:
            options = {"truncation": True, "max_length": self._max_length}
        messages = list(prompt.messages or [{"role": "user", "content": prompt.text or ""}])
        if self._tokenizer.chat_template:
            chat = [*messages, {"role": "assistant", "content": answer}]
            encoded = self._tokenizer.apply_chat_template(chat, return_dict=True, **options)
        elif prompt.messages is None:
            encoded = self._tokenizer(f"{prompt.text}{answer}", **options)
        else:
            contents = "\n".join(message["content"] for message in messages)
            encoded = self._tokenizer(contents, answer, **options)
        return {name: encoded[name] for name in self._input_names if name in encoded}

    def _compute(self, encodings: Sequence[Encoding]) -> list[float]:
        pad = self._pad_token_id
        if pad is None:
            # The model then looks for the last token that is not this one, so it must be one that
            # no response ends with; the usual stand-in, the end of text, is not.
            used = {token for encoding in encodings for token in encoding["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self._text_config.pad_token_id = pad
        lengths = [len(encoding["input_ids"]) for encoding in encodings]
        rows = {name: [encoding[name] for encoding in encodings] for name in encodings[0]}
        rows["attention_mask"] = [[1] * length for length in lengths]
        inputs = {}
        for name, values in rows.items():
            filler = pad if name == "input_ids" else 0
            padded = [row + [filler] * (max(lengths) - len(row)) for row in values]
            inputs[name] = torch.tensor(padded, device=self._device)
        with torch.inference_mode():
            output = self._model(**inputs)
        scores = output.logits if getattr(output, "score", None) is None else output.score
        if scores.numel() != len(encodings):
            raise ValueError(f"{scores.numel() // len(encodings)} labels and no score")
        values_read: list[float] = scores.float().flatten().tolist()
        return values_read

    def _try_out(self) -> None:
        """Fail now rather than after hours of responses."""
        prompt = Prompt("", "", messages=({"role": "user", "content": "Hello"},))
        try:
            self._compute([self._encode(prompt, "Hello")])
        except Exception as error:
            problem = f"model: {self._config.model} cannot score a response"
            raise ValueError(f"{problem}: {describe_error(error)}") from error


def load(config: ModelRewardConfig, device: str) -> tuple[Any, Any]:
    """A reward model's tokenizer and the model itself, ready on the device.

    Raises:
        ValueError: begins with the field that is wrong.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    trust = config.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model, trust_remote_code=trust, truncation_side="left"
        )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.model,
            trust_remote_code=trust,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    except Exception as error:
        reason = " ".join(describe_error(error).split())
        raise ValueError(f"model: {config.model} cannot be loaded: {reason}") from error
    # A language model's, say: transformers gives it random ones and only warns.
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:3])
        raise ValueError(f"model: {config.model} is no reward model: it lacks the weights {names}")
    model.config.use_cache = False
    try:
        return tokenizer, model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {config.model} cannot run on {device}: {error}") from error


def find_max_length(tokenizer: Any, model: Any) -> int | None:
    """How many tokens the model takes; None where neither it nor its tokenizer says."""
    # A tokenizer without a limit says 10^30.
    known = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min([*known, *([positions] if positions else [])], default=None)
