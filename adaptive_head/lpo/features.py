"""What the frozen language model says of the responses in pairs: computed once, then on disk.

A head is trained without the language model; all that it needs of it are these rows.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.head import check_temperatures
from adaptive_head.language_model import find_language_model
from adaptive_head.lpo.progress import TokenProgress
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.options import Level

# Raise this with every change to what a cache holds: older ones are then not found.
CACHE_VERSION: Final = 1
# Of float32 logits in one chunk, 64 MiB: those of a whole batch would take gigabytes.
_CHUNK_ELEMENTS = 2**24
# Temperatures travel from the worker as millionths.
_MICRO = 1_000_000
# By descending size of their elements, so that each array is aligned.
_ARRAYS = {
    "choices": ("I64", torch.int64),
    "token_ids": ("I64", torch.int64),
    "logprobs": ("F32", torch.float32),
    "hidden": ("BF16", torch.bfloat16),
}


@dataclass(frozen=True)
class Features:
    """One row a token, or at the sequence level one row a response.

    Args:
        temperatures: K of them.
        hidden: bfloat16 [rows, d], the state from which the temperature is chosen: what enters the
            output layer (after the final norm) at the position that predicts the token, and at
            the sequence level at the prompt's last token.
        choices: int64 [rows], index of the temperature that was in force.
        logprobs: float32 [rows, K], log P(y_t | tau_k) of the realised token, in nats: that of
            softmax(logits / tau_k), and at tau 0 0.0 for the likeliest token, -inf for others. At
            the sequence level the sum over the response's tokens.
        token_ids: int64 [rows], y_t; zeros at the sequence level.
        starts: rows [start, stop) of each response, by prompt and sample.
    """

    temperatures: tuple[float, ...]
    hidden: torch.Tensor
    choices: torch.Tensor
    logprobs: torch.Tensor
    token_ids: torch.Tensor
    starts: dict[tuple[str, int], tuple[int, int]]


def compute_features(
    model: Path | str,
    responses: Sequence[Response],
    level: Level,
    temperatures: tuple[float, ...],
    folder: Path,
    *,
    needs_logprobs: bool = True,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Features:
    """Run the frozen model over prompts and responses, or find that it has been done.

    The model runs in its checkpoint's dtype, on the GPU if there is one. Rows go to disk as they
    come, to a file that appears once it is whole; what returns is mapped into memory from there.

    Args:
        model: a folder, `embedded`, or a name on the Hugging Face hub.
        responses: in any order.
        level: whether a row is a token or a response.
        folder: of the caches; made if missing.
        needs_logprobs: whether a loss reads them (Eq. 11 does); they take most of the time, and are
            NaN where nobody does.
        batch_tokens: of one batch, padding included; a longer sequence is a batch of its own.
        progress: whether to draw a bar on stderr.

    Raises:
        DataError: a response is there twice, has no tokens, a token that the model does not know,
            or a temperature that is not one of the K; names the prompt and the sample.
        ValueError: there is no such model.
        OSError: the disk is full.
    """
    check_temperatures(temperatures)
    source = _find_folder(model)
    ordered = sorted(responses, key=lambda response: response.key)
    key = make_key(source, ordered, level, temperatures, needs_logprobs)
    if (cached := load_features(folder, key)) is not None:
        return cached
    plan = _Plan.make(ordered, level, temperatures)
    frozen = _FrozenModel(source)
    frozen.check_tokens(ordered)
    folder.mkdir(parents=True, exist_ok=True)
    bar = TokenProgress("features", len(ordered)) if progress else nullcontext()
    with bar as shown, _FeatureFile(folder, key, plan, frozen.hidden_size) as file:
        for batch in _make_batches(ordered, batch_tokens):
            for response, hidden, logprobs in frozen.read(batch, temperatures, needs_logprobs):
                if level == "sequence":
                    hidden, logprobs = hidden[:1], logprobs.sum(dim=0, keepdim=True)
                file.write(response, hidden=hidden, logprobs=logprobs)
                if shown is not None:
                    shown.advance(len(response.token_ids))
    features = load_features(folder, key)
    assert features is not None
    return features


def make_key(
    model: Path,
    responses: Sequence[Response],
    level: Level,
    temperatures: tuple[float, ...],
    needs_logprobs: bool = True,
) -> str:
    """The name of a cache: 16 hexadecimal digits of all that its rows depend on.

    Args:
        model: a folder; without safetensors, its path stands for its weights.
    """
    digest = hashlib.sha256()
    weights = fingerprint_model(model) or str(model.resolve())
    digest.update(repr((CACHE_VERSION, weights, level, temperatures)).encode())
    if not needs_logprobs:
        digest.update(b"hidden states only")
    for r in sorted(responses, key=lambda response: response.key):
        digest.update(repr((r.key, r.prompt_token_ids, r.token_ids, r.temperatures)).encode())
    return digest.hexdigest()[:16]


def load_features(folder: Path, key: str) -> Features | None:
    """The features of that key, mapped into memory, or None if they are not there whole."""
    path = _find_cache(folder, key)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if metadata["key"] != key:
            return None
        temperatures = tuple(json.loads(metadata["temperatures"]))
        index = json.loads(metadata["starts"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    starts = {(prompt_id, sample): (start, stop) for prompt_id, sample, start, stop in index}
    return Features(temperatures=temperatures, starts=starts, **arrays)


def read_unembedding(model: Path | str) -> torch.Tensor:
    """The output layer's weight W [vocab, d], in the checkpoint's dtype, on the CPU.

    Raises:
        DataError: the model's logits are not `hidden @ W.T`: it scales or caps them, or adds a
            bias.
        ValueError: there is no such model.
    """
    frozen = _FrozenModel(_find_folder(model))
    weight = frozen.unembedding
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, frozen.hidden_size, generator=generator).to(weight)
    # Large enough for a cap to show, and as large in every model; where all is 0, a bias shows.
    hidden *= 1000 / (hidden @ weight.T).abs().max()
    hidden[0] = 0
    expected = (hidden @ weight.T).float()
    errors = (frozen.compute_logits(hidden) - expected).abs()
    if (errors > 0.02 * expected.abs().amax(dim=1, keepdim=True)).any():
        raise DataError(f"{model}: the logits are not a product of hidden state and output layer")
    return weight.cpu()


def find_choices(response: Response, level: Level, temperatures: tuple[float, ...]) -> list[int]:
    """Index of the temperature of each token; at the sequence level, the one of the response.

    Raises:
        DataError: the response has no tokens, a temperature that is not one of these, or, at the
            sequence level, more than one; names prompt and sample.
    """
    where = f"prompt {response.prompt_id}, sample {response.sample}"
    if not response.token_ids:
        raise DataError(f"{where}: the response has no tokens")
    indices = {round(value * _MICRO): index for index, value in enumerate(temperatures)}
    try:
        choices = [indices[round(value * _MICRO)] for value in response.temperatures]
    except KeyError as error:
        known = ", ".join(f"{value:g}" for value in temperatures)
        value = error.args[0] / _MICRO
        raise DataError(f"{where}: temperature {value:g} is not one of {known}") from None
    if level == "token":
        return choices
    if len(set(choices)) > 1:
        raise DataError(f"{where}: a response of level sequence has one temperature, not several")
    return choices[:1]


def _find_folder(model: Path | str) -> Path:
    folder = Path(model)
    return folder if folder.is_dir() else find_language_model(str(model)).folder


def _find_cache(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


@dataclass(frozen=True)
class _Plan:
    """Which rows each response has, and what of them is known without the model."""

    temperatures: tuple[float, ...]
    level: Level
    starts: dict[tuple[str, int], tuple[int, int]]
    choices: dict[tuple[str, int], list[int]]

    @classmethod
    def make(
        cls, responses: Sequence[Response], level: Level, temperatures: tuple[float, ...]
    ) -> Self:
        starts, choices = {}, {}
        num_rows = 0
        for response in responses:
            where = f"prompt {response.prompt_id}, sample {response.sample}"
            if response.key in starts:
                raise DataError(f"{where}: the response is there twice")
            if not response.prompt_token_ids:
                raise DataError(f"{where}: the prompt has no tokens")
            choices[response.key] = find_choices(response, level, temperatures)
            starts[response.key] = (num_rows, num_rows + len(choices[response.key]))
            num_rows = starts[response.key][1]
        return cls(temperatures, level, starts, choices)

    @property
    def num_rows(self) -> int:
        return max((stop for _, stop in self.starts.values()), default=0)


class _Given(nn.Module):
    """Stands where a causal LM's transformer was, and returns what it is told."""

    output: Any

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output


class _FrozenModel:
    """A causal LM in two halves: the transformer, and what makes logits of its hidden states.

    The second half is the model's own `forward` around a transformer that returns given states.
    So logits can be had for chosen positions and in chunks, and are scaled, capped and biased as
    the model does it, whatever its family.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here: it takes seconds, and a cache needs none of it.
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.requires_grad_(False).to(self._device)
        self.unembedding: torch.Tensor = model.get_output_embeddings().weight.detach()
        self._vocab, self.hidden_size = self.unembedding.shape
        self._transformer = model.base_model
        self._given = _Given()
        # An output of the model's own class: families read different fields of it.
        some_token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        with torch.inference_mode():
            self._given.output = self._transformer(input_ids=some_token, use_cache=False)
        setattr(model, model.base_model_prefix, self._given)

    def check_tokens(self, responses: Sequence[Response]) -> None:
        for response in responses:
            largest = max((*response.prompt_token_ids, *response.token_ids))
            if largest >= self._vocab:
                where = f"prompt {response.prompt_id}, sample {response.sample}"
                raise DataError(f"{where}: token {largest} is not one of the model's {self._vocab}")

    @torch.inference_mode()
    def read(
        self, batch: Sequence[Response], temperatures: tuple[float, ...], needs_logprobs: bool
    ) -> Iterator[tuple[Response, torch.Tensor, torch.Tensor]]:
        """Each response with its hidden states [tokens, d] and logprobs, float32 [tokens, K]."""
        # The last token predicts nothing that is asked for.
        texts = [[*r.prompt_token_ids, *r.token_ids[:-1]] for r in batch]
        width = max(map(len, texts))
        input_ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
        output = self._transformer(
            input_ids=input_ids.to(self._device),
            attention_mask=mask.to(self._device),
            use_cache=False,
        )
        lengths = [len(response.token_ids) for response in batch]
        hidden = torch.cat(
            [
                states[len(text) - length : len(text)]
                for states, text, length in zip(
                    output.last_hidden_state, texts, lengths, strict=True
                )
            ]
        )
        logprobs = torch.full((len(hidden), len(temperatures)), torch.nan)
        if needs_logprobs:
            token_ids = torch.tensor([token for r in batch for token in r.token_ids])
            logprobs = self._compute_logprobs(hidden, token_ids.to(self._device), temperatures)
        yield from zip(
            batch, hidden.cpu().split(lengths), logprobs.cpu().split(lengths), strict=True
        )

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, d] -> float32 logits [rows, vocab]."""
        self._given.output.last_hidden_state = hidden.unsqueeze(0).to(self._device)
        positions = torch.zeros(1, len(hidden), dtype=torch.long, device=self._device)
        logits: torch.Tensor = self._model(input_ids=positions, use_cache=False).logits
        return logits[0].float()

    def _compute_logprobs(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, temperatures: tuple[float, ...]
    ) -> torch.Tensor:
        step = max(1, _CHUNK_ELEMENTS // self._vocab)
        chunks = []
        for states, tokens in zip(hidden.split(step), token_ids.split(step), strict=True):
            logits = self.compute_logits(states)
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
            scaled = torch.empty_like(logits)
            columns = []
            for temperature in temperatures:
                if temperature == 0.0:
                    columns.append(torch.zeros_like(chosen).masked_fill(chosen < 0, -torch.inf))
                else:
                    torch.div(logits, temperature, out=scaled)
                    # No overflow: the largest logit is 0.
                    normaliser = scaled.exp_().sum(dim=1).log()
                    columns.append(chosen / temperature - normaliser)
            chunks.append(torch.stack(columns, dim=1))
        return torch.cat(chunks)


def _make_batches(responses: Sequence[Response], batch_tokens: int) -> Iterator[list[Response]]:
    """Responses of similar length together, the longest first: too little memory shows at once."""

    def measure(response: Response) -> int:
        return len(response.prompt_token_ids) + len(response.token_ids) - 1

    batch: list[Response] = []
    for response in sorted(responses, key=measure, reverse=True):
        if batch and measure(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(response)
    if batch:
        yield batch


class _FeatureFile:
    """A safetensors file that is written row by row, in any order, and appears when it is whole."""

    def __init__(self, folder: Path, key: str, plan: _Plan, hidden_size: int) -> None:
        self._path = _find_cache(folder, key)
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._plan = plan
        widths = {"choices": (), "token_ids": (), "logprobs": (len(plan.temperatures),)}
        shapes = {n: (plan.num_rows, *widths.get(n, (hidden_size,))) for n in _ARRAYS}
        index = [[*response, *rows] for response, rows in plan.starts.items()]
        metadata = {
            "key": key,
            "temperatures": json.dumps(plan.temperatures),
            "starts": json.dumps(index),
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, kind) in _ARRAYS.items():
            size = torch.Size(shapes[name]).numel() * kind.itemsize
            offsets = [end, end + size]
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": offsets}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {n: 8 + len(text) + header[n]["data_offsets"][0] for n in _ARRAYS}
        self._file = self._partial.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(8 + len(text) + end)

    def write(self, response: Response, *, hidden: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Put a response's rows in their place."""
        start, _ = self._plan.starts[response.key]
        choices = self._plan.choices[response.key]
        is_token = self._plan.level == "token"
        arrays = {
            "choices": torch.tensor(choices),
            "token_ids": torch.tensor(response.token_ids if is_token else [0]),
            "logprobs": logprobs,
            "hidden": hidden,
        }
        for name, (_, kind) in _ARRAYS.items():
            rows = arrays[name].to(kind).contiguous()
            row_size = rows[0].numel() * kind.itemsize
            self._file.seek(self._offsets[name] + start * row_size)
            self._file.write(rows.view(torch.uint8).numpy().tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            try:
                self._file.close()
            finally:
                self._partial.unlink()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)
