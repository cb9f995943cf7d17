"""Where a head puts its temperatures: by how often, by position, and at the spans of rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from adaptive_head.checkpoint import HeadMetadata
from adaptive_head.lpo.arms import count_choices, format_temperature, list_choices
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.records import Prompt, Response
from adaptive_head.lpo.rewards import Reward
from adaptive_head.lpo.statistics import Curve, average_by_index, bootstrap_groups, make_interval
from adaptive_head.lpo.summaries import Rewards
from adaptive_head.lpo.token_ranges import Decode, cover_span, locate_tokens

MAX_POSITION = 1024
# As far as Fig. 6 of arXiv 2411.09661 goes.
MAX_DISTANCE = 50
# Curves end where so few responses are left that their mean says little.
_MIN_SHARE = 0.1


def describe_choices(
    experiment: Experiment,
    metadata: HeadMetadata,
    answers: Sequence[Response],
    prompts: Sequence[Prompt],
    rewards: Rewards,
    decode: Decode | None,
) -> dict[str, dict[str, Any]]:
    """The temperatures that a head chose, by task, as JSON.

    `mean` and `std` are over tokens, or over responses of a sequence-level head; `counts` is by
    temperature. Of a token-level head there are `by_position` and, by reward that finds spans,
    `spans`: the mean `at_start`, the token that a span begins with (in Fig. 6 of arXiv 2411.09661
    a sentence's first), the mean `elsewhere`, the mean over prompts of their `difference`, and
    `by_distance` from a span's beginning to the next's.

    Args:
        answers: of the head, to `prompts`.
        decode: needed for spans.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    described = {}
    for task in dict.fromkeys(response.task for response in answers):
        of_task = [response for response in answers if response.task == task]
        choices = list_choices(metadata.level, of_task)
        counts = count_choices(metadata, choices).tolist()
        names = map(format_temperature, metadata.bounds)
        entry: dict[str, Any] = {
            "mean": float(np.mean(choices)),
            "std": float(np.std(choices)),
            "counts": dict(zip(names, counts, strict=True)),
            "by_position": None,
            "spans": {},
        }
        if metadata.level == "token":
            entry["by_position"] = describe_positions(of_task, by_id)
            for name, reward in rewards[task].items():
                if reward.has_spans and decode is not None:
                    entry["spans"][name] = describe_spans(
                        experiment, of_task, by_id, reward, decode
                    )
        described[task] = entry
    return described


def describe_positions(
    responses: Sequence[Response], prompts: Mapping[str, Prompt]
) -> dict[str, Any]:
    """The mean temperature by position, from the response's first token on."""
    numbers = _number_groups(responses, prompts)
    lengths = [len(response.temperatures) for response in responses]
    curve = average_by_index(
        np.concatenate([np.arange(length) for length in lengths]),
        np.repeat([numbers[response.prompt_id] for response in responses], lengths),
        np.concatenate([response.temperatures for response in responses]),
        min(MAX_POSITION, max(lengths)),
    )
    return _to_json(curve, _MIN_SHARE * len(responses))


def describe_spans(
    experiment: Experiment,
    responses: Sequence[Response],
    prompts: Mapping[str, Prompt],
    reward: Reward,
    decode: Decode,
) -> dict[str, Any]:
    """Temperatures where spans begin and elsewhere; see `describe_choices`.

    Responses whose tokens cannot be found in their text are left out, and counted.
    """
    numbers = {
        id_: number for number, id_ in enumerate(dict.fromkeys(r.prompt_id for r in responses))
    }
    groups = _number_groups(responses, prompts)
    # Distance from the last beginning (-1 before the first), prompt and temperature of each token.
    tokens: list[tuple[int, int, float]] = []
    num_left_out = 0
    for response in responses:
        locations = locate_tokens(response.token_ids, response.text, decode)
        if locations is None:
            num_left_out += 1
            continue
        spans = reward.find_spans(prompts[response.prompt_id], response)
        covered = (cover_span(locations, span) for span in spans)
        starts = {tokens_of_span[0] for tokens_of_span in covered if tokens_of_span}
        distance = -1
        for index, temperature in enumerate(response.temperatures):
            if index in starts:
                distance = 0
            elif distance >= 0:
                distance += 1
            tokens.append((distance, numbers[response.prompt_id], temperature))
    table = np.array(tokens, dtype=float).reshape(-1, 3)
    distances, owners, values = table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2]
    is_start, is_after = distances == 0, distances >= 0
    at_start, elsewhere = (
        _average_by_prompt(owners[where], values[where], len(numbers))
        for where in (is_start, ~is_start)
    )
    difference = at_start - elsewhere
    compared = [p for p, number in numbers.items() if not np.isnan(difference[number])]
    number_of_group = np.array([groups[p] for p in numbers], dtype=int)
    curve = average_by_index(
        distances[is_after],
        number_of_group[owners[is_after]],
        values[is_after],
        MAX_DISTANCE + 1,
    )
    return {
        "at_start": float(values[is_start].mean()) if is_start.any() else None,
        "elsewhere": float(values[~is_start].mean()) if (~is_start).any() else None,
        "difference": (
            _bootstrap_difference(
                experiment, difference[~np.isnan(difference)], [prompts[p] for p in compared]
            )
            if compared
            else None
        ),
        "num_starts": int(is_start.sum()),
        "num_elsewhere": int((~is_start).sum()),
        "num_responses_left_out": num_left_out,
        "by_distance": _to_json(curve, _MIN_SHARE * int(is_start.sum())),
    }


def _average_by_prompt(owners: np.ndarray, values: np.ndarray, num_prompts: int) -> np.ndarray:
    """The mean of each prompt's values, NaN where it has none; [prompts]."""
    counts = np.bincount(owners, minlength=num_prompts)
    sums = np.bincount(owners, values, num_prompts)
    return np.divide(sums, counts, out=np.full(num_prompts, np.nan), where=counts > 0)


def _bootstrap_difference(
    experiment: Experiment, values: np.ndarray, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    groups = [prompt.group for prompt in prompts]
    kinds = [prompt.kind for prompt in prompts]
    num, seed = experiment.evaluation.num_bootstrap, experiment.derive_seed("bootstrap")
    draws = bootstrap_groups(values, groups, kinds, num, seed)
    return asdict(make_interval(float(values.mean()), draws, len(set(groups))))


def _number_groups(responses: Sequence[Response], prompts: Mapping[str, Prompt]) -> dict[str, int]:
    """By prompt, the number of its group."""
    ids = dict.fromkeys(response.prompt_id for response in responses)
    numbers: dict[str, int] = {}
    return {id_: numbers.setdefault(prompts[id_].group, len(numbers)) for id_ in ids}


def _to_json(curve: Curve, min_count: float) -> dict[str, Any]:
    """A curve up to where fewer than `min_count` values are left; errors can be null."""
    is_thin = curve.counts < max(1, min_count)
    stop = int(np.argmax(is_thin)) if is_thin.any() else len(is_thin)
    return {
        "means": curve.means[:stop].tolist(),
        "errors": [None if np.isnan(error) else error for error in curve.errors[:stop].tolist()],
        "counts": curve.counts[:stop].tolist(),
    }
