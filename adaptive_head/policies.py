"""Learning-free temperatures: the head's siblings, and its controls.

Each maps what is known of a row at this step to a temperature, float32 [rows].
`parameters` are float32 [rows] each, since every row may carry its own.
"""

import torch

EDT_BASE = 0.8
# vLLM measures its memory without us: these rows at a time, not two copies of all logits.
_MAX_ENTROPY_ROWS = 32


def entropy_temperature(
    logits: torch.Tensor, t0: torch.Tensor, theta: torch.Tensor
) -> torch.Tensor:
    """T = T0 * 0.8^(theta / H): EDT, Zhang, Bao and Huang 2024, arXiv 2403.14541.

    H is the entropy, in nats, of the distribution as it would be sampled at T = 1: after
    grammar masks, bias and penalties. A certain model (H = 0) is sampled greedily, and so is a
    row that is masked as a whole.

    Args:
        logits: float32 [rows, vocabulary]; masked tokens are -inf.
    """
    entropy = torch.cat(
        [
            torch.special.entr(rows.softmax(dim=-1)).sum(dim=-1)
            for rows in logits.split(_MAX_ENTROPY_ROWS)
        ]
    )
    return t0 * EDT_BASE ** (theta / entropy.nan_to_num(0.0).clamp_min(1e-9))


def schedule_temperature(
    num_generated: torch.Tensor, start: torch.Tensor, end: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """From `start` at the first generated token, in a line, to `end` after `num_tokens`.

    Args:
        num_generated: int64 [rows], tokens generated before this one.
    """
    return torch.lerp(start, end, (num_generated / num_tokens).clamp(0.0, 1.0))


def two_phase_temperature(
    is_answer: torch.Tensor, thinking: torch.Tensor, answer: torch.Tensor
) -> torch.Tensor:
    """One temperature while the model thinks, another for its answer.

    Args:
        is_answer: bool [rows], True once the end-of-thinking marker has been seen.
    """
    return torch.where(is_answer, answer, thinking)


def list_temperature(
    num_generated: torch.Tensor, lists: torch.Tensor, slots: torch.Tensor, list_lens: torch.Tensor
) -> torch.Tensor:
    """The temperature that a list has for a token; beyond its end its last one.

    Args:
        num_generated: int64 [rows], tokens generated before this one.
        lists: float32 [slots, longest]; only the wanted temperatures are read.
        slots: int64 [rows], whose list a row follows.
        list_lens: [rows], at least 1.
    """
    places = torch.minimum(num_generated, list_lens.long() - 1).clamp_min(0)
    return lists[slots, places]
