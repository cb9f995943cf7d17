"""A head, its optimiser and its pairs: one epoch, and one validation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaptive_head.head import AdaptiveHead, HeadConfig, select_argmax
from adaptive_head.lpo.experiment import HeadRecipe, derive_seed
from adaptive_head.lpo.losses import (
    PackedSide,
    compare_sides,
    compute_cross_entropy,
    compute_mean_penalty,
    compute_nll,
    score_centred,
    score_eq9,
    score_eq10,
    score_eq11,
    weigh_positions,
)
from adaptive_head.lpo.pair_rows import ROWS_PER_CHUNK, Batch, PairRows, Rows
from adaptive_head.metadata import bound_means

# How a loss tells the better side; the losses that read one side only borrow Eq. 10's.
_SCORES = {"eq11": score_eq11, "eq9": score_eq9, "centred": score_centred}
# Two sides of one choice differ by rounding alone.
_TIE = 1e-6


class TrainingError(RuntimeError):
    """Training cannot continue. The message names the epoch."""


@dataclass(frozen=True)
class Epoch:
    """An epoch's measures; those of epoch 0, the untrained head, lack `train_loss`."""

    train_loss: float | None
    validation_loss: float
    accuracy: float
    mean_temperature: float
    entropy_of_mean: float
    shares: tuple[float, ...]


class Trainer:
    """A head, its optimiser and its pairs."""

    def __init__(
        self,
        recipe: HeadRecipe,
        rows: PairRows,
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
    def validate(self, epoch: int, train_loss: float | None) -> Epoch:
        """Raises: TrainingError: the loss is not finite."""
        batch = self._validation
        chunks = batch.rows.hidden.split(ROWS_PER_CHUNK)
        log_p = torch.cat([self._compute_log_p(chunk) for chunk in chunks])
        loss = self._compute_loss(log_p, batch, generator=None)
        _check_finite(loss, "validation", epoch)
        margins = torch.sub(*self._score(*batch.pack_sides(log_p)))
        wins = torch.where(margins.abs() < _TIE, 0.5, (margins > 0).float())
        counts = select_argmax(log_p).bincount(minlength=log_p.shape[1])
        shares = counts / len(log_p)
        mean = log_p.exp().mean(dim=0)
        return Epoch(
            train_loss=train_loss,
            validation_loss=loss.item(),
            accuracy=wins.mean().item(),
            mean_temperature=(shares @ self._temperatures).item(),
            entropy_of_mean=torch.special.entr(mean).sum().item(),
            shares=tuple(shares.tolist()),
        )

    @torch.no_grad()
    def share_expected_temperatures(self) -> dict[str, float]:
        """By upper bound, the share of the validation rows whose expected temperature is in each
        of the buckets of `bound_means`."""
        bounds = bound_means(self.recipe.temperatures)
        chunks = self._validation.rows.hidden.split(ROWS_PER_CHUNK)
        probabilities = torch.cat([self._compute_log_p(chunk) for chunk in chunks]).exp()
        means = (probabilities @ self._temperatures).double().cpu()
        # Means are served in millionths, so that one on a bound counts there.
        edges = torch.tensor(bounds, dtype=torch.float64)
        places = torch.bucketize(means.round(decimals=6), edges)
        shares = places.clamp(max=len(bounds) - 1).bincount(minlength=len(bounds)) / len(means)
        return dict(zip(map(str, bounds), shares.tolist(), strict=True))

    def _compute_log_p(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(hidden)
        return logits.log_softmax(dim=1)

    def _compute_loss(
        self, log_p: torch.Tensor, batch: Batch, generator: torch.Generator | None
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
        self, chosen: PackedSide, rows: Rows, generator: torch.Generator | None
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


def _check_finite(loss: torch.Tensor, name: str, epoch: int) -> None:
    if not loss.isfinite():
        raise TrainingError(
            f"the {name} loss is {loss.item()} in epoch {epoch}; "
            "a lower learning_rate or beta may help"
        )
