"""What the frozen language model says of the responses in pairs: computed once, then on disk.

A head is trained without the language model; all that it needs of it are these rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from adaptive_head.decision import MILLION
from adaptive_head.dtype import choose_dtype
from adaptive_head.fingerprint import fingerprint_model
from adaptive_head.head import check_temperatures
from adaptive_head.lpo.feature_file import FeatureFile, Features, RowPlan, load_features
from adaptive_head.lpo.frozen_model import FrozenModel, find_model_folder
from adaptive_head.lpo.progress import TokenProgress
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.options import Level

# Raise this with every change to what a cache holds: older ones are then not found.
CACHE_VERSION: Final = 2


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

    The model runs as `FrozenModel` describes. Rows go to disk as they come, to a file that appears
    once it is whole; what returns is mapped into memory from there.

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
    source = find_model_folder(model)
    ordered = sorted(responses, key=lambda response: response.key)
    key = make_key(source, ordered, level, temperatures, needs_logprobs)
    if (cached := load_features(folder, key)) is not None:
        return cached
    plan = _plan_rows(ordered, level, temperatures)
    frozen = FrozenModel(source)
    frozen.check_tokens(ordered)
    folder.mkdir(parents=True, exist_ok=True)
    bar = TokenProgress("features", len(ordered)) if progress else nullcontext()
    with bar as shown, FeatureFile(folder, key, plan, frozen.hidden_size) as file:
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
    if (dtype := choose_dtype()) != "auto":
        digest.update(dtype.encode())
    for r in sorted(responses, key=lambda response: response.key):
        digest.update(repr((r.key, r.prompt_token_ids, r.token_ids, r.temperatures)).encode())
    return digest.hexdigest()[:16]


def find_choices(response: Response, level: Level, temperatures: tuple[float, ...]) -> list[int]:
    """Index of the temperature of each token; at the sequence level, the one of the response.

    Raises:
        DataError: the response has no tokens, a temperature that is not one of these, or, at the
            sequence level, more than one; names prompt and sample.
    """
    where = f"prompt {response.prompt_id}, sample {response.sample}"
    if not response.token_ids:
        raise DataError(f"{where}: the response has no tokens")
    indices = {round(value * MILLION): index for index, value in enumerate(temperatures)}
    try:
        choices = [indices[round(value * MILLION)] for value in response.temperatures]
    except KeyError as error:
        known = ", ".join(f"{value:g}" for value in temperatures)
        value = error.args[0] / MILLION
        raise DataError(f"{where}: temperature {value:g} is not one of {known}") from None
    if level == "token":
        return choices
    if len(set(choices)) > 1:
        raise DataError(f"{where}: a response of level sequence has one temperature, not several")
    return choices[:1]


def _plan_rows(
    responses: Sequence[Response], level: Level, temperatures: tuple[float, ...]
) -> RowPlan:
    starts: dict[tuple[str, int], tuple[int, int]] = {}
    choices: dict[tuple[str, int], list[int]] = {}
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
    return RowPlan(temperatures, level, starts, choices)


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
