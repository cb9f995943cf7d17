"""What training minimises: the losses of LPO, and the supervised one that they are compared with.

Equations are those of Dhuliawala et al. 2024, arXiv 2411.09661. With the language model frozen,
only P(tau_k | h_t), the head's distribution over K temperatures, has a gradient.

A side of a pair is scored by a sum over its T tokens,

    Eq. 10   s = sum_t log P(tau_t | h_t)
    centred  s = sum_t log P(tau_t | h_t) - (sum_k log P(tau_k | h_t)) / K
    Eq. 9    s = sum_t log P(tau_t | h_t) + log K
    Eq. 11   s = sum_t log(K sum_k P(y_t | tau_k) P(tau_k | h_t) / sum_k P(y_t | tau_k))

or by their mean where lengths are normalised, and `compare_sides` makes a loss of two scores.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

MIN_SOFT_TEMPERATURE = 0.01
DROPPED_SHARE = 0.6
# Of float32 logits in one chunk, 64 MiB: they dwarf everything else when a vocabulary is large.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class PackedSide:
    """One side of B pairs: its tokens' rows, packed one behind the other.

    At the sequence level a side has a single row, and `logprobs` are sums over its tokens.

    Args:
        log_p: float [rows, K], log P(tau_k | h_t).
        choices: int64 [rows], which temperature was in force.
        logprobs: float [rows, K], log P(y_t | tau_k) of the realised token; may be -inf.
        segments: int64 [rows], which of the B pairs a row belongs to.
        num_pairs: B.
    """

    log_p: torch.Tensor
    choices: torch.Tensor
    logprobs: torch.Tensor
    segments: torch.Tensor
    num_pairs: int

    def add_up(self, values: torch.Tensor, *, normalised: bool) -> torch.Tensor:
        """Each pair's sum, or mean, of values [rows] -> [B]; 0 for a side without rows."""
        zeros = values.new_zeros(self.num_pairs)
        sums = zeros.index_add(0, self.segments, values)
        if not normalised:
            return sums
        lengths = zeros.index_add(0, self.segments, torch.ones_like(values))
        return sums / lengths.clamp(min=1)


def score_eq10(side: PackedSide, *, normalised: bool = False) -> torch.Tensor:
    """sum_t log P(tau_t | h_t) -> [B], the score of Eq. 10, the paper's default loss."""
    return side.add_up(_choose(side), normalised=normalised)


def score_centred(side: PackedSide, *, normalised: bool = False) -> torch.Tensor:
    """sum_t (log P(tau_t | h_t) - mean_k log P(tau_k | h_t)) -> [B]: Eq. 10, with a baseline.

    Not in the paper. At the token level the two sides of Eq. 10 are in different states, so it can
    be lowered without any preference between temperatures: by a distribution that is peaked, on
    whatever temperature, where the state looks like a rejected one, and flat elsewhere. Measured
    from its mean under uniform rollouts, a state's score is 0 on average whatever the head says,
    and only the choices are left. Of one state, as at the sequence level, it is Eq. 10.
    """
    centred = side.log_p - side.log_p.mean(dim=1, keepdim=True)
    chosen = centred.gather(1, side.choices.unsqueeze(1)).squeeze(1)
    return side.add_up(chosen, normalised=normalised)


def score_eq9(side: PackedSide, *, normalised: bool = False) -> torch.Tensor:
    """sum_t (log P(tau_t | h_t) + log K) -> [B], the temperatures' part of Eq. 9.

    Eq. 9 adds log P(y) / P_ref(y), which is 0 as the language model is frozen. Its reference has
    no head, hence chooses uniformly: a side is not worse for being longer, as it is in Eq. 10.
    """
    num_temperatures = side.log_p.shape[1]
    return side.add_up(_choose(side) + math.log(num_temperatures), normalised=normalised)


def score_eq11(side: PackedSide, *, normalised: bool = False) -> torch.Tensor:
    """The temperature marginalised, against a uniform reference -> [B], the score of Eq. 11.

        sum_t log( sum_k P(y_t | tau_k) P(tau_k | h_t) / sum_k P(y_t | tau_k) / K )

    A token that is impossible under every temperature says nothing: its term and gradient are 0.
    """
    impossible = side.logprobs.isneginf().all(dim=1, keepdim=True)
    logprobs = side.logprobs.masked_fill(impossible, 0.0).to(side.log_p.dtype)
    # Normalised over k before the head enters, sums over long responses lose no precision.
    posterior = logprobs.log_softmax(dim=1)
    terms = torch.logsumexp(side.log_p + posterior, dim=1) + math.log(side.log_p.shape[1])
    return side.add_up(terms, normalised=normalised)


def compare_sides(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta (chosen - rejected)): scores [B] of both sides -> loss [B]."""
    return -functional.logsigmoid(beta * (chosen - rejected))


def compute_nll(chosen: PackedSide, *, normalised: bool = False) -> torch.Tensor:
    """-sum_t log P(tau_t | h_t) of the chosen side alone -> [B]; the paper's ablation."""
    return -score_eq10(chosen, normalised=normalised)


def compute_mean_penalty(log_p: torch.Tensor) -> torch.Tensor:
    """KL(P(. | h) || mean P), averaged over all rows [rows, K] -> scalar.

    It is 0 when the choice does not depend on the state, and log K at most.
    """
    log_mean = torch.logsumexp(log_p, dim=0) - math.log(max(len(log_p), 1))
    return (log_p.exp() * (log_p - log_mean)).sum() / max(len(log_p), 1)


def soften_temperature(log_p: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """T = max(0.01, sum_k P(tau_k | h_t) tau_k): [rows, K] and [K] -> [rows]."""
    return (log_p.exp() @ temperatures.to(log_p.dtype)).clamp(min=MIN_SOFT_TEMPERATURE)


def compute_token_losses(
    temperature: torch.Tensor,
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    unembedding: torch.Tensor,
) -> torch.Tensor:
    """-log softmax(W h_t / T_t)[y_t], whose gradient with respect to T is exact.

    Args:
        temperature: float [rows], T > 0.
        hidden: float of any kind [rows, d].
        token_ids: int64 [rows], y.
        unembedding: float [vocab, d], W; it sets the precision of the product.

    Returns:
        [rows] of the temperature's dtype.
    """
    losses = []
    for rows in _chunk(len(hidden), len(unembedding)):
        chunk = temperature[rows]
        with torch.no_grad():
            logits = _unembed(hidden[rows], unembedding).to(chunk.dtype)
            scaled = logits / chunk.unsqueeze(1)
            label = logits.gather(1, token_ids[rows].unsqueeze(1)).squeeze(1)
            peak = scaled.amax(dim=1, keepdim=True)
            # In place, since passes over the vocabulary are what this costs.
            weights = scaled.sub_(peak).exp_()
            total = weights.sum(dim=1)
            value = peak.squeeze(1) + total.log() - label / chunk
            mean = torch.linalg.vecdot(weights, logits) / total
            slope = (label - mean) / chunk.square()
        # The derivative by hand, so that no logits wait for the backward pass.
        losses.append(value + slope * (chunk - chunk.detach()))
    return torch.cat(losses) if losses else temperature


@torch.no_grad()
def read_base_model(
    hidden: torch.Tensor, token_ids: torch.Tensor, unembedding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How the frozen model, at temperature 1, sees the realised tokens.

    Shapes and dtypes are those of `compute_token_losses`.

    Returns:
        float32 [rows], the tokens' probabilities; bool [rows], whether they are its likeliest.
    """
    probabilities = torch.zeros(len(hidden))
    right = torch.zeros(len(hidden), dtype=torch.bool)
    for rows in _chunk(len(hidden), len(unembedding)):
        logits = _unembed(hidden[rows], unembedding).float()
        labels = token_ids[rows].to(logits.device).unsqueeze(1)
        probabilities[rows] = logits.softmax(dim=1).gather(1, labels).squeeze(1).cpu()
        right[rows] = (logits.argmax(dim=1) == labels.squeeze(1)).cpu()
    return probabilities, right


def weigh_positions(right: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """AutoDeco's first correction: drop 60 % of the positions that the model has right anyway.

    Args:
        right: bool [rows].
        generator: of the draws; without one, the weights are their expectation.

    Returns:
        float32 [rows]: 0 or 1, or in expectation 0.4 or 1.
    """
    if generator is None:
        return torch.where(right, 1 - DROPPED_SHARE, 1.0)
    draws = torch.rand(right.shape, generator=generator).to(right.device)
    return (~right | (draws >= DROPPED_SHARE)).float()


def compute_cross_entropy(
    log_p: torch.Tensor,
    temperatures: torch.Tensor,
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    unembedding: torch.Tensor,
    base_probabilities: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The loss of AutoDeco (Wang et al. 2025, arXiv 2510.26697), with K temperatures for a head.

        sum_t w_t p_t CE(y_t, softmax(W h_t / T_t)) / sum_t w_t,   T = soften_temperature

    where p_t, the base probability of the label, is AutoDeco's second correction.

    Args:
        log_p: float [rows, K].
        temperatures: float [K].
        hidden, token_ids, unembedding: as of `compute_token_losses`.
        base_probabilities: float [rows], p, of `read_base_model`.
        weights: float [rows], w, of `weigh_positions`.

    Returns:
        Scalar; 0 when every weight is 0.
    """
    kept = weights > 0
    losses = compute_token_losses(
        soften_temperature(log_p[kept], temperatures), hidden[kept], token_ids[kept], unembedding
    )
    total = (weights * base_probabilities)[kept] * losses
    return total.sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _choose(side: PackedSide) -> torch.Tensor:
    return side.log_p.gather(1, side.choices.unsqueeze(1)).squeeze(1)


def _chunk(num_rows: int, vocab: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocab)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _unembed(hidden: torch.Tensor, unembedding: torch.Tensor) -> torch.Tensor:
    return hidden.to(unembedding) @ unembedding.T
