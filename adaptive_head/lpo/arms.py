"""The arms of an evaluation: heads, and the controls that show what a head's choices are worth.

A head must beat more than single fixed temperatures: arXiv 2411.09661 names no other control, yet
one temperature for each task, or the head's own average (MeanShift, SimpleDeco), does as well as
many controllers do.
"""

import hashlib
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from adaptive_head.checkpoint import WEIGHTS_FILE, HeadMetadata, read_metadata, save_head
from adaptive_head.dtype import choose_dtype
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.lpo.experiment import Experiment, derive_seed, digest
from adaptive_head.lpo.records import DataError, Prompt, Response
from adaptive_head.options import AdaptiveRequest
from adaptive_head.parameters import ConstantParameters

ArmKind = Literal["fixed", "train", "head", "self", "entropy", "meanshift", "shuffled"]
ResponseKey = tuple[str, int]
Setting = float | AdaptiveRequest

MICRO_DIGITS = 6
# vLLM itself would take none above, and would raise what lies between 0 and this one.
_VLLM_TEMPERATURES = (0.01, 2.0)
# log 0, finite as weights must be; no Gumbel noise bridges it.
_NEVER = -1e4


@dataclass(frozen=True)
class HeadUnderTest:
    """A head that is evaluated.

    Args:
        tasks: it was trained for, in the experiment's order.
        weights: digest of its weights.
    """

    name: str
    folder: Path
    metadata: HeadMetadata
    weights: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One way to sample answers.

    Args:
        name: of its file, unique.
        kind: `fixed` and `train` are one temperature for all tokens, on test prompts and on
            training prompts; `self` is the head again with other seeds.
        head: that it controls for, or that it is; None for those that all heads share.
        settings: by task, how to sample; a mapping gives every response a temperature.
        temperature: of `fixed` and `train`.
        histograms: of a token-level `shuffled`: by task, how often each of the head's `bounds`
            is to come.
    """

    name: str
    kind: ArmKind
    settings: Mapping[str, Setting | Mapping[ResponseKey, float]]
    head: str | None = None
    temperature: float | None = None
    histograms: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def split(self) -> Literal["train", "test"]:
        """The prompts that it answers."""
        return "train" if self.kind == "train" else "test"

    def find_setting(self, prompt: Prompt, sample: int) -> Setting:
        """How to sample one response."""
        setting = self.settings[prompt.task]
        if isinstance(setting, Mapping):
            setting = setting[prompt.id, sample]
        return setting

    def make_seed(self, experiment: Experiment, prompt: Prompt, sample: int) -> int:
        """A request's seed: the same in all arms, so that they are paired, but for `self`."""
        stream = ("self",) if self.kind == "self" else ()
        return derive_seed(experiment.seed, "evaluation", prompt.id, sample, *stream)

    def describe(self) -> list[Any]:
        """What its answers depend on, as JSON."""
        settings = {task: _describe(setting) for task, setting in self.settings.items()}
        return [self.kind == "self", settings, dict(self.histograms)]


def _describe(setting: Setting | Mapping[ResponseKey, float]) -> Any:
    if isinstance(setting, AdaptiveRequest):
        return setting.model_dump(exclude_none=True)
    return sorted(setting.items()) if isinstance(setting, Mapping) else setting


def read_heads(experiment: Experiment, heads: Mapping[str, Path]) -> dict[str, HeadUnderTest]:
    """The heads' metadata and what they were trained for.

    Raises:
        HeadError: a folder is not a head.
        DataError: a head was trained for none of the experiment's tasks.
    """
    found = {}
    for name, folder in heads.items():
        recipe = experiment.heads.get(name)
        trained = recipe.tasks if recipe else ()
        tasks = tuple(task for task in experiment.tasks if not trained or task in trained)
        if not tasks:
            raise DataError(f"head {name} belongs to no task of the experiment")
        weights = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()[:16]
        found[name] = HeadUnderTest(name, folder, read_metadata(folder), weights, tasks)
    return found


def plan_arms(experiment: Experiment, heads: Mapping[str, HeadUnderTest]) -> list[Arm]:
    """The arms that need nobody else's answers."""
    evaluation = experiment.evaluation
    chosen = {t for head in heads.values() for t in head.metadata.temperatures}
    temperatures = sorted({round(t, MICRO_DIGITS) for t in chosen.union(evaluation.fixed)})
    arms = []
    for kind in ("fixed", "train") if evaluation.num_train_prompts else ("fixed",):
        for temperature in temperatures:
            settings = dict.fromkeys(experiment.tasks, fix_temperature(temperature))
            name = f"{kind}-{format_temperature(temperature)}"
            arms.append(Arm(name, kind, settings, temperature=temperature))
    for name, head in heads.items():
        settings = dict.fromkeys(head.tasks, AdaptiveRequest(head=name))
        arms += [Arm(f"{kind}-{name}", kind, settings, name) for kind in ("head", "self")]
    rule = AdaptiveRequest(policy="entropy", entropy=evaluation.entropy)
    return [*arms, Arm("entropy", "entropy", dict.fromkeys(experiment.tasks, rule))]


def plan_controls(
    experiment: Experiment, head: HeadUnderTest, answers: Sequence[Response]
) -> list[Arm]:
    """The arms that take the head's own temperatures away from their places.

    MeanShift is, for each task, the fixed temperature that the head used on average; `shuffled`
    uses the same temperatures in an order of chance. A token-level head is shuffled by a head
    whose distribution is the histogram of its choices, whatever the state.

    Args:
        answers: all of the head's.

    Raises:
        DataError: a task's answers have no tokens, or temperatures that are not the head's.
    """
    means: dict[str, Setting] = {}
    shuffled: dict[str, Setting | dict[ResponseKey, float]] = {}
    histograms = {}
    for task in head.tasks:
        of_task = sorted((r for r in answers if r.task == task), key=lambda r: r.key)
        choices = list_choices(head.metadata.level, of_task)
        if not choices:
            raise DataError(f"head {head.name}: not one token in its answers to {task}")
        means[task] = fix_temperature(round(float(np.mean(choices)), MICRO_DIGITS))
        if head.metadata.level == "sequence":
            seed = derive_seed(experiment.seed, "shuffle", head.name, task)
            shuffled[task] = shuffle_choices(choices, [r.key for r in of_task], seed)
        else:
            histogram = count_choices(head.metadata, choices)
            histograms[task] = tuple(histogram.tolist())
            shuffled[task] = AdaptiveRequest(
                head=name_shuffled_head(head.name, task), select="sample"
            )
    return [
        Arm(f"meanshift-{head.name}", "meanshift", means, head.name),
        Arm(f"shuffled-{head.name}", "shuffled", shuffled, head.name, histograms=histograms),
    ]


def name_shuffled_head(head: str, task: str) -> str:
    """Unique: neither a head's name nor a task's has a plus sign."""
    return f"{head}+{task}"


def save_shuffled_heads(arm: Arm, metadata: HeadMetadata, folder: Path) -> dict[str, Path]:
    """Write the heads that a `shuffled` arm samples from, one a task.

    Each has the same distribution at every state: its histogram.

    Args:
        metadata: of the head that is shuffled.
        folder: of their folders; those there are replaced.

    Returns:
        Their folders by name; none for a sequence-level head.
    """
    folders = {}
    for task, histogram in arm.histograms.items():
        network = AdaptiveHead(HeadConfig(metadata.hidden_size, metadata.bounds, ()))
        shares = torch.tensor(histogram, dtype=torch.float64) / sum(histogram)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
            network.get_parameter("layers.0.bias").copy_(shares.log().clamp(min=_NEVER))
        name = name_shuffled_head(arm.head or "", task)
        folders[name] = folder / name
        shutil.rmtree(folders[name], ignore_errors=True)
        save_head(
            folders[name],
            network,
            level="token",
            base_model=metadata.base_model,
            trained=False,
            training={"control": arm.name, "task": task, "histogram": list(histogram)},
        )
    return folders


def fix_temperature(temperature: float) -> Setting:
    """One temperature for every token, by vLLM's own parameter where it has such a value."""
    low, high = _VLLM_TEMPERATURES
    if temperature == 0 or low <= temperature <= high:
        return temperature
    return AdaptiveRequest(policy="constant", constant=ConstantParameters(temperature=temperature))


def format_temperature(temperature: float) -> str:
    """As short as it is exact to a millionth: 0, 0.2, 1."""
    return f"{temperature:.{MICRO_DIGITS}f}".rstrip("0").rstrip(".")


def list_choices(level: str, responses: Iterable[Response]) -> list[float]:
    """The temperatures that were chosen: one a token, or one a response that has any token."""
    if level == "sequence":
        return [r.temperatures[0] for r in responses if r.temperatures]
    return [temperature for r in responses for temperature in r.temperatures]


def count_choices(metadata: HeadMetadata, choices: Sequence[float]) -> np.ndarray:
    """How often each of a head's `bounds` was chosen, or was nearest; int64 [bounds].

    Raises:
        DataError: a head chooses from a table, and a choice is not in it.
    """
    table, values = np.asarray(metadata.bounds), np.asarray(choices)
    # The worker rounds its choices to a millionth.
    nearest = np.clip(np.searchsorted((table[1:] + table[:-1]) / 2, values), 0, len(table) - 1)
    wrong = np.abs(table[nearest] - values) > 2 * 10.0**-MICRO_DIGITS
    if wrong.any() and not metadata.is_continuous:
        raise DataError(f"{values[wrong][0]:g} is not a temperature of the head")
    return np.bincount(nearest, minlength=len(table))


def shuffle_choices(
    choices: Sequence[float], keys: Sequence[ResponseKey], seed: int
) -> dict[ResponseKey, float]:
    """The choices dealt to the responses anew; where responses outnumber choices, some twice."""
    dealt = list(choices)
    random.Random(seed).shuffle(dealt)
    return {key: dealt[index % len(dealt)] for index, key in enumerate(keys)}


def make_arm_key(
    experiment: Experiment,
    heads: Mapping[str, HeadUnderTest],
    arm: Arm,
    prompts: Sequence[Prompt],
) -> str:
    """A digest of all that an arm's answers depend on, but for how many there are."""
    tasks = {name: experiment.tasks[name] for name in arm.settings}
    of_tasks = {
        name: [
            task.max_tokens,
            {reward: config.model_dump(mode="json") for reward, config in task.rewards.items()},
            [[p.id, p.messages, p.text, p.reference] for p in prompts if p.task == name],
        ]
        for name, task in tasks.items()
    }
    models = sorted({head.metadata.base_model.model_dump_json() for head in heads.values()})
    head = heads[arm.head] if arm.head and arm.kind in ("head", "self") else None
    own: list[Any] = []
    if head is not None:
        own = [head.weights, head.metadata.temperatures, head.metadata.level]
        # Answers that were kept before heads had a `select` are those of the likeliest.
        own += [head.metadata.select] if head.metadata.select != "argmax" else []
    dtype = choose_dtype(experiment.engine.dtype)
    engine = [experiment.model, models, dtype, experiment.engine.options]
    return digest([experiment.seed, engine, of_tasks, arm.describe(), own])
