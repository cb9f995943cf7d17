"""Trains one head on the cached features of preference pairs: an MLP fit, without the model."""

import copy
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from adaptive_head.checkpoint import (
    BaseModelIdentity,
    HeadError,
    load_head,
    save_head,
    write_metadata,
)
from adaptive_head.lpo.experiment import HeadRecipe, derive_seed, digest
from adaptive_head.lpo.feature_file import Features
from adaptive_head.lpo.pair_rows import PairRows
from adaptive_head.lpo.probing import ProbeStates, make_probe
from adaptive_head.lpo.records import Pair
from adaptive_head.lpo.trainer import Epoch, Trainer

HEAD_FOLDER = "head"
LOGS_FOLDER = "tensorboard"


@dataclass(frozen=True)
class TrainingResult:
    """What came of training; everything but the counts is of the best epoch, on validation.

    Args:
        best_epoch: its weights are the head's; 0 is the untrained head: nothing was learnt.
        epochs: how many were trained.
        num_pairs: that the head was trained on, `num_validation_pairs` not among them.
        untrained_loss: the validation loss before the first epoch.
        validation_accuracy: share of pairs whose chosen side has the higher score, ties half.
        mean_temperature: of the likeliest temperatures of all rows.
        temperature_shares: of all rows, by the likeliest temperature, such as `{"0.2": 0.75}`.
        seconds: that the epochs took.
    """

    best_epoch: int
    epochs: int
    num_pairs: int
    num_validation_pairs: int
    validation_loss: float
    untrained_loss: float
    validation_accuracy: float
    mean_temperature: float
    temperature_shares: dict[str, float]
    seconds: float


@dataclass
class _Fit:
    """What the epochs came to; `history` begins with the untrained head."""

    history: list[Epoch]
    best_epoch: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def train_head(
    recipe: HeadRecipe,
    features: Features,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    identity: BaseModelIdentity,
    provenance: dict[str, Any],
    unembedding: torch.Tensor | None = None,
    read_probe_states: Callable[[], ProbeStates | None] | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a head and save it as `folder/head`, with TensorBoard logs beside it.

    A finished head is not trained again, as long as recipe, pairs, model and features are the
    same. A fit that was killed starts again and, on a CPU, gives the same head bit for bit.

    Args:
        features: of the responses in `pairs`, at the recipe's level and temperatures.
        folder: of this head alone.
        identity: the model that the features are of.
        provenance: any JSON object; it goes into `head.json`.
        unembedding: float [vocab, d], logits being `hidden @ unembedding.T`; the loss
            `cross_entropy` needs it, no other does.
        read_probe_states: called once the head is trained; without states it gets no probe.
        progress: whether to draw a bar on stderr.

    A head that no epoch brought below the untrained one's validation loss is saved untrained, as
    `trained: false`, and a line on stderr says so.

    Raises:
        ValueError: features, pairs and recipe do not belong together, or the pairs are of fewer
            than two prompts.
        TrainingError: the loss is not finite.
    """
    _check_inputs(recipe, features, unembedding)
    training, validation = split_pairs(pairs, recipe.validation_share, recipe.seed)
    rows = PairRows(features, pairs, recipe.level)
    settings = digest(
        {
            "recipe": recipe.model_dump(mode="json"),
            "pairs": [asdict(pair) for pair in pairs],
            "model": identity.model_dump(),
            "hidden_size": rows.hidden_size,
            "features": rows.fingerprint(),
        }
    )
    if (finished := _read_finished(folder / HEAD_FOLDER, settings)) is not None:
        _note_failure(folder, finished)
        return finished
    rows.gather()
    trainer = Trainer(recipe, rows, training, validation, unembedding)
    fit = _fit(trainer, folder, progress)
    best = fit.history[fit.best_epoch]
    result = TrainingResult(
        best_epoch=fit.best_epoch,
        epochs=len(fit.history) - 1,
        num_pairs=len(training),
        num_validation_pairs=len(validation),
        validation_loss=best.validation_loss,
        untrained_loss=fit.history[0].validation_loss,
        validation_accuracy=best.accuracy,
        mean_temperature=best.mean_temperature,
        temperature_shares=dict(zip(map(str, recipe.temperatures), best.shares, strict=True)),
        seconds=fit.seconds,
    )
    trainer.network.load_state_dict(fit.best_weights)
    if (folder / HEAD_FOLDER).exists():
        shutil.rmtree(folder / HEAD_FOLDER)
    metadata = save_head(
        folder / HEAD_FOLDER,
        trainer.network,
        level=recipe.level,
        base_model=identity,
        trained=fit.best_epoch > 0,
        training={
            "digest": settings,
            "loss": recipe.loss,
            "recipe": recipe.model_dump(mode="json"),
            **asdict(result),
            "expected_temperature_shares": trainer.share_expected_temperatures(),
            "history": [asdict(epoch) for epoch in fit.history],
            "provenance": provenance,
        },
    )
    _note_failure(folder, result)
    # A machine without room for the model in float32 may end the process here.
    if read_probe_states and (states := read_probe_states()) is not None:
        probe = make_probe(trainer.network, states)
        write_metadata(folder / HEAD_FOLDER, metadata.model_copy(update={"probe": probe}))
    return result


def split_pairs(
    pairs: Sequence[Pair], validation_share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the pairs to train on and to validate on; no prompt has pairs in both.

    Args:
        validation_share: of the prompts, at least one and not all.

    Raises:
        ValueError: the pairs are of fewer than two prompts.
    """
    prompts = sorted({pair.chosen.prompt_id for pair in pairs})
    if len(prompts) < 2:
        raise ValueError(
            f"pairs of at least two prompts are needed, one of them for validation; "
            f"there are {len(pairs)} pairs of {len(prompts)} prompts"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    num_held_out = min(max(1, round(validation_share * len(prompts))), len(prompts) - 1)
    held_out = {prompts[index] for index in order[:num_held_out]}
    is_held_out = [pair.chosen.prompt_id in held_out for pair in pairs]
    return (
        [index for index, held in enumerate(is_held_out) if not held],
        [index for index, held in enumerate(is_held_out) if held],
    )


def _check_inputs(recipe: HeadRecipe, features: Features, unembedding: torch.Tensor | None) -> None:
    if features.temperatures != recipe.temperatures:
        raise ValueError(
            f"the features are of the temperatures {features.temperatures}, "
            f"the recipe's are {recipe.temperatures}"
        )
    if recipe.loss == "eq11" and features.logprobs[:1].isnan().any():
        raise ValueError("loss: eq11 needs features that hold log-probabilities")
    if recipe.loss != "cross_entropy":
        return
    if recipe.level != "token":
        raise ValueError("loss: cross_entropy scores tokens, so the level must be token")
    width = features.hidden.shape[1]
    if unembedding is None or unembedding.ndim != 2 or unembedding.shape[1] != width:
        raise ValueError(f"loss: cross_entropy needs the unembedding, a matrix [vocab, {width}]")


def _fit(trainer: Trainer, folder: Path, show_progress: bool) -> _Fit:
    """Epochs until the validation loss stops falling."""
    recipe = trainer.recipe
    untrained = copy.deepcopy(trainer.network.state_dict())
    fit = _Fit([trainer.validate(0, None)], best_weights=untrained)
    start = time.monotonic()
    shutil.rmtree(folder / LOGS_FOLDER, ignore_errors=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with (
        SummaryWriter(str(folder / LOGS_FOLDER)) as writer,
        Progress(*columns, console=console, disable=not show_progress) as bar,
    ):
        task = bar.add_task(folder.name, total=recipe.max_epochs * trainer.num_batches)
        for epoch in range(1, recipe.max_epochs + 1):
            train_loss = trainer.run_epoch(epoch, lambda: bar.advance(task))
            measures = trainer.validate(epoch, train_loss)
            fit.history.append(measures)
            if measures.validation_loss < fit.history[fit.best_epoch].validation_loss:
                fit.best_epoch = epoch
                fit.best_weights = copy.deepcopy(trainer.network.state_dict())
            _log_epoch(writer, epoch, measures, recipe.temperatures)
            losses = f"loss {train_loss:.4f}, validation {measures.validation_loss:.4f}"
            bar.update(task, description=f"{folder.name}: epoch {epoch}, {losses}")
            if epoch - fit.best_epoch >= recipe.patience:
                break
    fit.seconds = time.monotonic() - start
    return fit


def _log_epoch(
    writer: SummaryWriter, number: int, epoch: Epoch, temperatures: Sequence[float]
) -> None:
    scalars = {
        "loss/training": epoch.train_loss,
        "loss/validation": epoch.validation_loss,
        "pair_accuracy": epoch.accuracy,
        "mean_temperature": epoch.mean_temperature,
        "entropy_of_mean": epoch.entropy_of_mean,
    }
    for temperature, share in zip(temperatures, epoch.shares, strict=True):
        scalars[f"argmax/{temperature}"] = share
    for name, value in scalars.items():
        writer.add_scalar(name, value, number)
    writer.flush()


def _read_finished(folder: Path, settings: str) -> TrainingResult | None:
    """What a head that is there already came out as; None unless it is whole and of `settings`."""
    if not folder.exists():
        return None
    try:
        training = load_head(folder).metadata.training or {}
    except HeadError as error:
        _note(f"{error}; the head is trained again")
        return None
    if training.get("digest") != settings:
        _note(f"{folder} is of other settings or data; it will be replaced")
        return None
    return TrainingResult(**{field.name: training[field.name] for field in fields(TrainingResult)})


def _note_failure(folder: Path, result: TrainingResult) -> None:
    """Say so where training left the head as it was."""
    if result.best_epoch == 0:
        _note(
            f"{folder.name}: nothing was learnt: no epoch's validation loss was below the "
            f"untrained head's, {result.untrained_loss:.4f}; the head is saved untrained"
        )


def _note(text: str) -> None:
    Console(file=sys.stderr, highlight=False).print(text, markup=False, soft_wrap=True)
