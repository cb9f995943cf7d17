"""Records for tests."""

from typing import Any

from adaptive_head.lpo.records import Response


def make_response(prompt_id: str, sample: int, **changes: Any) -> Response:
    """A short response; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "prompt_id": prompt_id,
        "task": prompt_id.split("/")[0],
        "sample": sample,
        "seed": 7,
        "prompt_token_ids": (1, 2, 3),
        "token_ids": (4, 5),
        "temperatures": (0.0, 0.2),
        "text": " hello wörld",
        "finish_reason": "stop",
        "scores": {"correct": 1.0},
    }
    return Response(**fields | changes)
