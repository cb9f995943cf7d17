"""The controls that show what a head's choices are worth.

A head must beat more than single fixed temperatures: arXiv 2411.09661 names no other control, yet
one temperature for each task, or the head's own average (MeanShift, SimpleDeco), does as well as
many controllers do. Filters such as min-p have no temperature to learn at all.
"""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adaptive_head.lpo.arms import (
    MICRO_DIGITS,
    Arm,
    ArmKind,
    Family,
    HeadUnderTest,
    ResponseKey,
    Setting,
    fix_temperature,
    format_temperature,
    list_choices,
)
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.records import DataError, Response
from adaptive_head.lpo.settings import list_settings, read_card
from adaptive_head.options import AdaptiveRequest
from adaptive_head.parameters import MAX_LIST_LEN


def plan_arms(experiment: Experiment, heads: Mapping[str, HeadUnderTest]) -> list[Arm]:
    """The arms that need nobody else's answers, tuning arms among them."""
    num_samples = count_samples(experiment)
    fixed = [
        Arm(
            f"fixed-{format_temperature(temperature)}",
            "fixed",
            dict.fromkeys(experiment.tasks, fix_temperature(temperature)),
            num_samples,
            temperature=temperature,
        )
        for temperature in list_temperatures(experiment, heads)
    ]
    kinds: list[ArmKind] = ["head"]
    kinds += ["self"] if "self" in experiment.evaluation.controls else []
    of_heads = [
        Arm(
            f"{kind}-{name}",
            kind,
            dict.fromkeys(head.tasks, Setting(AdaptiveRequest(head=name))),
            num_samples,
            name,
        )
        for name, head in heads.items()
        for kind in kinds
    ]
    return [*fixed, *plan_tuning(experiment, heads), *of_heads]


def count_samples(experiment: Experiment) -> int:
    """Answers to each test prompt, over all streams."""
    return experiment.evaluation.num_streams * experiment.evaluation.num_responses


def count_tuning_samples(experiment: Experiment, num_settings: int) -> int:
    """Answers to each training prompt by each setting of a tuned control.

    Over all its settings a control gets as many answers as a head was trained on.
    """
    return math.ceil(experiment.rollouts.num_responses / num_settings)


def list_temperatures(experiment: Experiment, heads: Mapping[str, HeadUnderTest]) -> list[float]:
    """The fixed temperatures: those of any head, and the experiment's own."""
    chosen = {t for head in heads.values() for t in head.metadata.temperatures}
    return sorted({round(t, MICRO_DIGITS) for t in chosen.union(experiment.evaluation.fixed)})


def plan_tuning(experiment: Experiment, heads: Mapping[str, HeadUnderTest]) -> list[Arm]:
    """The arms on training prompts, by which each control gets its best setting.

    Every control has as many settings as there are fixed temperatures, and as many answers. A
    head's min-p is tuned with the first training seed's head alone.
    """
    if experiment.evaluation.num_train_prompts == 0:
        return []
    temperatures = list_temperatures(experiment, heads)
    num_settings = len(temperatures)
    num_samples = count_tuning_samples(experiment, num_settings)
    arms = []
    for family in ("fixed", *list_families(experiment)):
        for number, (setting, label) in enumerate(list_settings(family, temperatures)):
            settings = dict.fromkeys(experiment.tasks, setting)
            temperature = temperatures[number] if family == "fixed" else None
            name = f"train-{family}-{label}"
            arms.append(Arm(name, "train", settings, num_samples, None, family, temperature, label))
    for name, head in heads.items():
        if name == head.base and "head_min_p" in experiment.evaluation.controls:
            for setting, label in list_settings("head_min_p", temperatures, name):
                settings = dict.fromkeys(head.tasks, setting)
                arm_name = f"train-head_min_p-{label}-{name}"
                arms.append(
                    Arm(arm_name, "train", settings, num_samples, name, "head_min_p", None, label)
                )
    return arms


def list_families(experiment: Experiment) -> list[Family]:
    """The tuned controls that all heads share, except the fixed temperatures."""
    families: tuple[Family, ...] = ("entropy", "min_p", "top_p")
    return [family for family in families if family in experiment.evaluation.controls]


def plan_controls(
    experiment: Experiment,
    head: HeadUnderTest,
    answers: Sequence[Response],
    fixed_answers: Mapping[float, Sequence[Response]],
) -> list[Arm]:
    """The arms that take the head's own temperatures away from their places.

    MeanShift is, for each task, the fixed temperature that the head used on average.
    `equal_surprisal` is the one at which the answers are as surprising to the model at
    temperature 1 as the head's, interpolated between the fixed temperatures; it stands for equal
    entropy, of which a sampled token's surprise is a sample. `shuffled` uses an answer's own
    temperatures in random order, `dealt` gives an answer the temperatures of another one. The
    answers to a task are dealt within it.

    Args:
        answers: all of the head's.
        fixed_answers: by fixed temperature, to the same prompts.

    Raises:
        DataError: a task's answers have no tokens.
    """
    level = head.metadata.level
    means: dict[str, Setting] = {}
    equals: dict[str, Setting] = {}
    shuffled: dict[str, dict[ResponseKey, Setting]] = {}
    dealt: dict[str, dict[ResponseKey, Setting]] = {}
    for task in head.tasks:
        of_task = sorted((r for r in answers if r.task == task), key=lambda r: r.key)
        choices = list_choices(level, of_task)
        if not choices:
            raise DataError(f"head {head.name}: not one token in its answers to {task}")
        means[task] = fix_temperature(round(float(np.mean(choices)), MICRO_DIGITS))
        equals[task] = fix_temperature(find_equal(of_task, fixed_answers, task))
        rng = random.Random(experiment.derive_seed("shuffle", head.name, task))
        length = experiment.tasks[task].max_tokens
        if level == "token":
            shuffled[task] = {
                r.key: make_list(shuffle_cycles(r.temperatures or choices[:1], length, rng))
                for r in of_task
            }
        dealt[task] = deal(of_task, level, length, rng)
    kinds: dict[ArmKind, Mapping[str, Setting | Mapping[ResponseKey, Setting]]] = {
        "meanshift": means,
        "equal_surprisal": equals,
        **({"shuffled": shuffled} if level == "token" else {}),
        "dealt": dealt,
    }
    num_samples = count_samples(experiment)
    return [
        Arm(f"{kind}-{head.name}", kind, settings, num_samples, head.name)
        for kind, settings in kinds.items()
        if kind in experiment.evaluation.controls
    ]


def shuffle_cycles(values: Sequence[float], length: int, rng: random.Random) -> list[float]:
    """The values in random order, and again in another one, until there are `length`.

    The shuffled answer may be longer than the one that the values are from.
    """
    found: list[float] = []
    while len(found) < length:
        found += rng.sample(values, len(values))
    return found[:length]


def deal(
    answers: Sequence[Response], level: str, length: int, rng: random.Random
) -> dict[ResponseKey, Setting]:
    """Give each answer the temperatures of another answer with tokens, in their order.

    Those of a longer answer are cut; after the end of a shorter one they begin again.
    """
    dealt = [r.temperatures for r in answers if r.temperatures]
    rng.shuffle(dealt)
    settings = {}
    for index, response in enumerate(answers):
        temperatures = dealt[index % len(dealt)]
        if level == "sequence":
            settings[response.key] = fix_temperature(temperatures[0])
        else:
            cycled = (temperatures * math.ceil(length / len(temperatures)))[:length]
            settings[response.key] = make_list(cycled)
    return settings


def make_list(temperatures: Sequence[float]) -> Setting:
    """A temperature for each token by its position; after their end the last one holds."""
    given = {"temperatures": list(temperatures[:MAX_LIST_LEN])}
    return Setting(AdaptiveRequest.model_validate({"policy": "list", "list": given}))


def find_equal(
    answers: Sequence[Response], fixed_answers: Mapping[float, Sequence[Response]], task: str
) -> float:
    """The fixed temperature whose answers to a task are as surprising as the head's.

    Raises:
        DataError: an answer has no log-probabilities.
    """
    temperatures = sorted(fixed_answers)
    surprise = [
        measure_surprise([r for r in fixed_answers[t] if r.task == task]) for t in temperatures
    ]
    # It rises with the temperature, apart from noise.
    rising = np.maximum.accumulate(surprise)
    found = float(np.interp(measure_surprise(answers), rising, temperatures))
    return round(found, MICRO_DIGITS)


def measure_surprise(answers: Sequence[Response]) -> float:
    """Mean of -log p over the tokens, in nats; 0 without tokens."""
    values: list[float] = []
    for response in answers:
        if response.logprobs is None:
            where = f"prompt {response.prompt_id}, sample {response.sample}"
            raise DataError(f"{where}: logprobs: missing")
        values += response.logprobs
    return -float(np.mean(values)) if values else 0.0


def plan_tuned(
    experiment: Experiment,
    model: Path | str,
    heads: Mapping[str, HeadUnderTest],
    chosen: Mapping[Family, Mapping[str, Mapping[str, Arm]]],
) -> list[Arm]:
    """The tuned controls with what training prompts chose, and the model card's setting.

    Args:
        chosen: by family, head (empty where heads share it) and task, the arm that was best; an
            empty mapping takes the first settings.
    """
    num_samples = count_samples(experiment)
    temperatures = list_temperatures(experiment, heads)
    arms = []
    if "card" in experiment.evaluation.controls:
        card = dict.fromkeys(experiment.tasks, read_card(model))
        arms.append(Arm("card", "card", card, num_samples))
    for family in list_families(experiment):
        settings, label = _choose(
            family, temperatures, experiment.tasks, chosen.get(family, {}).get("", {})
        )
        arms.append(Arm(family, family, settings, num_samples, label=label))
    tuned_heads = heads if "head_min_p" in experiment.evaluation.controls else {}
    for name, head in tuned_heads.items():
        settings, label = _choose(
            "head_min_p",
            temperatures,
            head.tasks,
            chosen.get("head_min_p", {}).get(head.base, {}),
            name,
        )
        arms.append(
            Arm(f"head_min_p-{name}", "head_min_p", settings, num_samples, name, label=label)
        )
    return arms


def _choose(
    family: Family,
    temperatures: Sequence[float],
    tasks: Mapping[str, object] | Sequence[str],
    best: Mapping[str, Arm],
    head: str = "",
) -> tuple[dict[str, Setting], str]:
    """Settings by task, and a label of them all."""
    by_label = {label: setting for setting, label in list_settings(family, temperatures, head)}
    first = next(iter(by_label))
    labels = {task: (best[task].label or first) if task in best else first for task in tasks}
    return {task: by_label[label] for task, label in labels.items()}, ", ".join(
        dict.fromkeys(labels.values())
    )
