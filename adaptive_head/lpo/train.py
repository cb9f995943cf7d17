"""Trains one head on the cached features of preference pairs: an MLP fit, without the model."""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from adaptive_head.checkpoint import BaseModelIdentity, HeadError, load_head, save_head
from adaptive_head.head import AdaptiveHead, HeadConfig, select_argmax
from adaptive_head.lpo.experiment import HeadRecipe, derive_seed, digest
from adaptive_head.lpo.feature_file import Features
from adaptive_head.lpo.losses import (
    PackedSide,
    compare_sides,
    compute_cross_entropy,
    compute_mean_penalty,
    compute_nll,
    read_base_model,
    score_centred,
    score_eq9,
    score_eq10,
    score_eq11,
    weigh_positions,
)
from adaptive_head.lpo.records import Pair, Side
from adaptive_head.options import Level

CHECKPOINT_FILE = "checkpoint.safetensors"
HEAD_FOLDER = "head"
LOGS_FOLDER = "tensorboard"
# How a loss tells the better side; the losses that read one side only borrow Eq. 10's.
_SCORES = {"eq11": score_eq11, "eq9": score_eq9, "centred": score_centred}
_MAX_BYTES_IN_MEMORY = 2 * 2**30
_ROWS_PER_CHUNK = 8192
# Two sides of one choice differ by rounding alone.
_TIE = 1e-6


class TrainingError(RuntimeError):
    """Training cannot go on. The message names the epoch."""


@dataclass(frozen=True)
class TrainingResult:
    """What came of training; everything but the counts is of the best epoch, on validation.

    Args:
        best_epoch: from 1; its weights are the head's.
        epochs: how many were trained.
        num_pairs: that the head was trained on, `num_validation_pairs` not among them.
        untrained_loss: the validation loss before the first epoch.
        validation_accuracy: share of pairs whose chosen side has the higher score, ties half.
        mean_temperature: of the likeliest temperatures of all rows.
        temperature_shares: of all rows, by the likeliest temperature, such as `{"0.2": 0.75}`.
        seconds: that the epochs took, in all runs together.
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


@dataclass(frozen=True)
class _Epoch:
    """An epoch's measures; those of epoch 0, the untrained head, lack `train_loss`."""

    train_loss: float | None
    validation_loss: float
    accuracy: float
    mean_temperature: float
    entropy_of_mean: float
    shares: tuple[float, ...]


@dataclass
class _State:
    history: list[_Epoch]
    best_weights: dict[str, torch.Tensor]
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        return len(self.history) - 1

    @property
    def best_epoch(self) -> int:
        losses = [epoch.validation_loss for epoch in self.history]
        return losses.index(min(losses[1:]), 1) if self.epoch else 0


def train_head(
    recipe: HeadRecipe,
    features: Features,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    identity: BaseModelIdentity,
    provenance: dict[str, Any],
    unembedding: torch.Tensor | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a head and save it as `folder/head`, with TensorBoard logs beside it.

    A run that was killed goes on after its last whole epoch, and on a CPU it gives bit for bit
    the head of a run that was not. A head that is finished already is not trained again. Both
    hold for the same recipe, pairs, model and features; anything else starts over.

    Args:
        features: of the responses in `pairs`, at the recipe's level and temperatures.
        folder: of this head alone.
        identity: the model that the features are of.
        provenance: any JSON object; it goes into `head.json`.
        unembedding: float [vocab, d], logits being `hidden @ unembedding.T`; the loss
            `cross_entropy` needs it, no other does.
        progress: whether to draw a bar on stderr.

    Raises:
        ValueError: features, pairs and recipe do not belong together, or the pairs are of fewer
            than two prompts.
        TrainingError: the loss is not finite.
    """
    _check_inputs(recipe, features, unembedding)
    training, validation = split_pairs(pairs, recipe.validation_share, recipe.seed)
    rows = _PairRows(features, pairs, recipe.level)
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
        return finished
    rows.gather()
    trainer = _Trainer(recipe, rows, training, validation, unembedding)
    state = _load_checkpoint(folder / CHECKPOINT_FILE, settings, trainer)
    if state is None:
        shutil.rmtree(folder / LOGS_FOLDER, ignore_errors=True)
        state = _State([trainer.validate(0, None)], _copy_weights(trainer.network))
    _fit(trainer, state, folder, settings, progress)

    best = state.history[state.best_epoch]
    result = TrainingResult(
        best_epoch=state.best_epoch,
        epochs=state.epoch,
        num_pairs=len(training),
        num_validation_pairs=len(validation),
        validation_loss=best.validation_loss,
        untrained_loss=state.history[0].validation_loss,
        validation_accuracy=best.accuracy,
        mean_temperature=best.mean_temperature,
        temperature_shares=dict(zip(map(str, recipe.temperatures), best.shares, strict=True)),
        seconds=state.seconds,
    )
    trainer.network.load_state_dict(state.best_weights)
    if (folder / HEAD_FOLDER).exists():
        shutil.rmtree(folder / HEAD_FOLDER)
    save_head(
        folder / HEAD_FOLDER,
        trainer.network,
        level=recipe.level,
        base_model=identity,
        trained=True,
        training={
            "digest": settings,
            "loss": recipe.loss,
            "recipe": recipe.model_dump(mode="json"),
            **asdict(result),
            "history": [asdict(epoch) for epoch in state.history],
            "provenance": provenance,
        },
    )
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
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


@dataclass(frozen=True)
class _Rows:
    """Rows of features; the last two, of `read_base_model`, are real for cross-entropy only."""

    hidden: torch.Tensor
    choices: torch.Tensor
    logprobs: torch.Tensor
    token_ids: torch.Tensor
    base_probabilities: torch.Tensor
    right: torch.Tensor

    def take(self, index: torch.Tensor, device: torch.device) -> "_Rows":
        return _Rows(*(getattr(self, field.name)[index].to(device) for field in fields(self)))


@dataclass(frozen=True)
class _Batch:
    """The rows of B pairs' chosen sides, and behind them those of their rejected sides."""

    rows: _Rows
    segments: torch.Tensor
    num_chosen: int
    num_pairs: int

    def pack_sides(self, log_p: torch.Tensor) -> tuple[PackedSide, PackedSide]:
        chosen, rejected = slice(self.num_chosen), slice(self.num_chosen, None)
        return self._pack(log_p, chosen), self._pack(log_p, rejected)

    def _pack(self, log_p: torch.Tensor, side: slice) -> PackedSide:
        return PackedSide(
            log_p[side],
            self.rows.choices[side],
            self.rows.logprobs[side],
            self.segments[side],
            self.num_pairs,
        )


class _PairRows:
    """The rows that each pair's sides have, in main memory unless they are too many for it."""

    def __init__(self, features: Features, pairs: Sequence[Pair], level: Level) -> None:
        self.sides = [
            (_find_rows(pair.chosen, features, level), _find_rows(pair.rejected, features, level))
            for pair in pairs
        ]
        self.used = _index([side for sides in self.sides for side in sides]).unique()
        self._rows = _Rows(
            features.hidden,
            features.choices,
            features.logprobs,
            features.token_ids,
            base_probabilities=torch.zeros(1).expand(len(features.hidden)),
            right=torch.zeros(1, dtype=torch.bool).expand(len(features.hidden)),
        )

    @property
    def hidden_size(self) -> int:
        return self._rows.hidden.shape[1]

    def fingerprint(self) -> str:
        """Tells rollouts apart in which the same tokens of the same responses are paired."""
        columns = (self._rows.choices, self._rows.logprobs, self._rows.token_ids)
        hashed = hashlib.sha256()
        for column in columns:
            hashed.update(column[self.used].numpy().tobytes())
        return hashed.hexdigest()

    def gather(self) -> None:
        """Read the rows into main memory, if they fit: their files are slow to pick rows from."""
        hidden = self._rows.hidden
        if len(self.used) * hidden.shape[1] * hidden.element_size() > _MAX_BYTES_IN_MEMORY:
            return
        self._rows = self._rows.take(self.used, torch.device("cpu"))
        # Used rows are in order and whole sides, so a side stays one range.
        self.sides = [
            (self._shift(chosen), self._shift(rejected)) for chosen, rejected in self.sides
        ]

    def _shift(self, side: range) -> range:
        start = int(torch.searchsorted(self.used, side.start))
        return range(start, start + len(side))

    def add_base_model(self, unembedding: torch.Tensor) -> None:
        """Compute once what cross-entropy takes from the frozen model."""
        probabilities = torch.zeros(len(self._rows.hidden))
        right = torch.zeros(len(self._rows.hidden), dtype=torch.bool)
        for index in _index([chosen for chosen, _ in self.sides]).unique().split(_ROWS_PER_CHUNK):
            probabilities[index], right[index] = read_base_model(
                self._rows.hidden[index], self._rows.token_ids[index], unembedding
            )
        self._rows = replace(self._rows, base_probabilities=probabilities, right=right)

    def pack(self, pairs: Sequence[int], device: torch.device) -> _Batch:
        chosen = [self.sides[pair][0] for pair in pairs]
        rejected = [self.sides[pair][1] for pair in pairs]
        lengths = torch.tensor([len(side) for side in (*chosen, *rejected)])
        owners = torch.arange(len(pairs)).repeat(2)
        return _Batch(
            self._rows.take(_index([*chosen, *rejected]), device),
            segments=owners.repeat_interleave(lengths).to(device),
            num_chosen=sum(map(len, chosen)),
            num_pairs=len(pairs),
        )


def _index(sides: Sequence[range]) -> torch.Tensor:
    return torch.cat([torch.arange(side.start, side.stop) for side in sides])


def _find_rows(side: Side, features: Features, level: Level) -> range:
    name = f"sample {side.sample} of prompt {side.prompt_id}"
    if side.key not in features.starts:
        raise ValueError(f"there are no features of {name}")
    start, stop = features.starts[side.key]
    if level == "sequence":
        if stop - start != 1:
            raise ValueError(
                f"{name} has {stop - start} rows; features for a sequence-level head have one"
            )
        return range(start, stop)
    if not 0 <= side.start < side.stop <= stop - start:
        raise ValueError(
            f"tokens [{side.start}, {side.stop}) of {name} are not among its {stop - start} rows"
        )
    return range(start + side.start, start + side.stop)


class _Trainer:
    """A head, its optimiser and its pairs."""

    def __init__(
        self,
        recipe: HeadRecipe,
        rows: _PairRows,
        training: Sequence[int],
        validation: Sequence[int],
        unembedding: torch.Tensor | None,
    ) -> None:
        self.recipe = recipe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = HeadConfig(rows.hidden_size, recipe.temperatures, recipe.layers)
        self.network = AdaptiveHead(config, recipe.seed).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self._unembedding = None
        if recipe.loss == "cross_entropy" and unembedding is not None:
            self._unembedding = unembedding.to(self.device)
            rows.add_base_model(self._unembedding)
        self._rows = rows
        self._training = training
        self._validation = rows.pack(validation, self.device)
        self._temperatures = torch.tensor(recipe.temperatures, device=self.device)

    @property
    def num_batches(self) -> int:
        """In an epoch."""
        return math.ceil(len(self._training) / self.recipe.batch_size)

    def run_epoch(self, epoch: int, advance: Callable[[], None]) -> float:
        """One pass over the training pairs; the mean of their losses as it went by.

        Raises:
            TrainingError: the loss is not finite.
        """
        # Of the epoch alone, so that a run that goes on draws what it would have drawn.
        generator = torch.Generator().manual_seed(derive_seed(self.recipe.seed, "epoch", epoch))
        order = torch.randperm(len(self._training), generator=generator)
        total = 0.0
        for indices in order.split(self.recipe.batch_size):
            batch = self._rows.pack(
                [self._training[index] for index in indices.tolist()], self.device
            )
            loss = self._compute_loss(self._compute_log_p(batch.rows.hidden), batch, generator)
            _check_finite(loss, "training", epoch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(indices)
            advance()
        return total / len(self._training)

    @torch.no_grad()
    def validate(self, epoch: int, train_loss: float | None) -> _Epoch:
        """Raises: TrainingError: the loss is not finite."""
        batch = self._validation
        chunks = batch.rows.hidden.split(_ROWS_PER_CHUNK)
        log_p = torch.cat([self._compute_log_p(chunk) for chunk in chunks])
        loss = self._compute_loss(log_p, batch, generator=None)
        _check_finite(loss, "validation", epoch)
        margins = torch.sub(*self._score(*batch.pack_sides(log_p)))
        wins = torch.where(margins.abs() < _TIE, 0.5, (margins > 0).float())
        counts = select_argmax(log_p).bincount(minlength=log_p.shape[1])
        shares = counts / len(log_p)
        mean = log_p.exp().mean(dim=0)
        return _Epoch(
            train_loss=train_loss,
            validation_loss=loss.item(),
            accuracy=wins.mean().item(),
            mean_temperature=(shares @ self._temperatures).item(),
            entropy_of_mean=torch.special.entr(mean).sum().item(),
            shares=tuple(shares.tolist()),
        )

    def _compute_log_p(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(hidden)
        return logits.log_softmax(dim=1)

    def _compute_loss(
        self, log_p: torch.Tensor, batch: _Batch, generator: torch.Generator | None
    ) -> torch.Tensor:
        chosen, rejected = batch.pack_sides(log_p)
        if self.recipe.loss == "cross_entropy":
            loss = self._compute_cross_entropy(chosen, batch.rows, generator)
        elif self.recipe.loss == "nll":
            loss = compute_nll(chosen, normalised=self.recipe.length_normalised).mean()
        else:
            loss = compare_sides(*self._score(chosen, rejected), self.recipe.beta).mean()
        if self.recipe.mean_penalty:
            loss = loss + self.recipe.mean_penalty * compute_mean_penalty(log_p)
        return loss

    def _score(self, chosen: PackedSide, rejected: PackedSide) -> tuple[torch.Tensor, torch.Tensor]:
        score = _SCORES.get(self.recipe.loss, score_eq10)
        normalised = self.recipe.length_normalised
        return score(chosen, normalised=normalised), score(rejected, normalised=normalised)

    def _compute_cross_entropy(
        self, chosen: PackedSide, rows: _Rows, generator: torch.Generator | None
    ) -> torch.Tensor:
        assert self._unembedding is not None
        num_chosen = len(chosen.log_p)
        return compute_cross_entropy(
            chosen.log_p,
            self._temperatures,
            rows.hidden[:num_chosen],
            rows.token_ids[:num_chosen],
            self._unembedding,
            rows.base_probabilities[:num_chosen],
            weigh_positions(rows.right[:num_chosen], generator),
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


def _check_finite(loss: torch.Tensor, name: str, epoch: int) -> None:
    if not loss.isfinite():
        raise TrainingError(
            f"the {name} loss is {loss.item()} in epoch {epoch}; "
            "a lower learning_rate or beta may help"
        )


def _fit(
    trainer: _Trainer, state: _State, folder: Path, settings: str, show_progress: bool
) -> None:
    """Epochs until the validation loss stops falling, each with a checkpoint behind it."""
    recipe = trainer.recipe
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with (
        SummaryWriter(str(folder / LOGS_FOLDER), purge_step=state.epoch + 1) as writer,
        Progress(*columns, console=console, disable=not show_progress) as bar,
    ):
        task = bar.add_task(
            folder.name,
            total=recipe.max_epochs * trainer.num_batches,
            completed=state.epoch * trainer.num_batches,
        )
        while state.epoch < recipe.max_epochs and state.epoch - state.best_epoch < recipe.patience:
            start = time.monotonic()
            epoch = state.epoch + 1
            train_loss = trainer.run_epoch(epoch, lambda: bar.advance(task))
            state.history.append(trainer.validate(epoch, train_loss))
            if state.best_epoch == epoch:
                state.best_weights = _copy_weights(trainer.network)
            state.seconds += time.monotonic() - start
            # Before the checkpoint: a run that goes on writes no epoch of before into the logs.
            _log_epoch(writer, epoch, state.history[-1], recipe.temperatures)
            _save_checkpoint(folder / CHECKPOINT_FILE, settings, trainer, state)
            losses = f"loss {train_loss:.4f}, validation {state.history[-1].validation_loss:.4f}"
            bar.update(task, description=f"{folder.name}: epoch {epoch}, {losses}")


def _log_epoch(
    writer: SummaryWriter, number: int, epoch: _Epoch, temperatures: Sequence[float]
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


def _save_checkpoint(path: Path, settings: str, trainer: _Trainer, state: _State) -> None:
    """One file, scalars in its header, so that no kill leaves halves of two epochs."""
    tensors = {f"head.{name}": value for name, value in trainer.network.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in state.best_weights.items()}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    scalars = {
        "settings": settings,
        "seconds": state.seconds,
        "history": [asdict(epoch) for epoch in state.history],
    }
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={"state": json.dumps(scalars)})
    os.replace(partial, path)


def _load_checkpoint(path: Path, settings: str, trainer: _Trainer) -> _State | None:
    """Put the trainer where the file left it; None, and a note, if it cannot go on from there."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            scalars = json.loads(file.metadata()["state"])
            # Copies, as the file will be replaced beneath its mapping.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        _note(f"{path} is damaged ({error}); training starts over")
        return None
    if scalars["settings"] != settings:
        _note(f"{path} is of other settings or data; training starts over")
        return None
    trainer.network.load_state_dict(_strip(tensors, "head."))
    optimizer = trainer.optimizer.state_dict()
    for index in range(len(optimizer["param_groups"][0]["params"])):
        optimizer["state"][index] = _strip(tensors, f"optimizer.{index}.")
    trainer.optimizer.load_state_dict(optimizer)
    history = [_Epoch(**epoch | {"shares": tuple(epoch["shares"])}) for epoch in scalars["history"]]
    return _State(history, _strip(tensors, "best."), scalars["seconds"])


def _strip(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


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


def _note(text: str) -> None:
    Console(file=sys.stderr, highlight=False).print(text, markup=False, soft_wrap=True)


def _copy_weights(network: AdaptiveHead) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
