"""The arms of an evaluation: one way each to sample answers, and what its answers depend on."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adaptive_head.checkpoint import WEIGHTS_FILE, HeadMetadata, read_metadata
from adaptive_head.dtype import choose_dtype
from adaptive_head.lpo.engine import NO_FILTERS, Filters
from adaptive_head.lpo.experiment import Control, Experiment, digest
from adaptive_head.lpo.records import DataError, Prompt, Response
from adaptive_head.options import AdaptiveRequest
from adaptive_head.parameters import ConstantParameters

ArmKind = Literal["fixed", "train", "head"] | Control
Family = Literal["fixed", "entropy", "min_p", "top_p", "head_min_p"]
ResponseKey = tuple[str, int]

MICRO_DIGITS = 6
# Between a head's name and the number of a further training seed; in no head's name itself.
REPLICATE_SIGN = "+"
# vLLM itself would take none above, and would raise what lies between 0 and this one.
_VLLM_TEMPERATURES = (0.01, 2.0)


@dataclass(frozen=True)
class Setting:
    """How an answer is sampled: a temperature, fixed or adaptive, and vLLM's other parameters."""

    temperature: float | AdaptiveRequest
    filters: Filters = NO_FILTERS

    def describe(self) -> Any:
        """The setting as JSON."""
        given = self.temperature
        if isinstance(given, AdaptiveRequest):
            return [given.model_dump(exclude_none=True), asdict(self.filters)]
        return [given, asdict(self.filters)]


@dataclass(frozen=True)
class HeadUnderTest:
    """A head that is evaluated.

    Args:
        name: its own, such as `token`, or with the number of a further training seed, `token+2`.
        tasks: it was trained for, in the experiment's order.
        identity: what its answers depend on; see `identify_head`.
    """

    name: str
    folder: Path
    metadata: HeadMetadata
    identity: Mapping[str, Any]
    tasks: tuple[str, ...]

    @property
    def base(self) -> str:
        """The name that it shares with the heads of other training seeds."""
        return get_base(self.name)


def name_replicate(name: str, number: int) -> str:
    """The name of a head's training by number, from 0; the first has the head's name itself."""
    return name if number == 0 else f"{name}{REPLICATE_SIGN}{number + 1}"


def get_base(name: str) -> str:
    """A head's name without the number of its training seed."""
    return name.partition(REPLICATE_SIGN)[0]


@dataclass(frozen=True)
class Arm:
    """One way to sample answers.

    Args:
        name: of its file, unique.
        kind: `train` arms answer training prompts, to tune a control; `self` is the head again
            with other seeds.
        settings: by task, how to sample; a mapping gives every response a setting.
        num_samples: answers to each prompt.
        head: that it controls for, or that it is; None for arms that all heads share.
        family: of a `train` arm, the control that it is a setting of.
        temperature: of the family `fixed`.
        label: of its setting, for tables; None where the kind says it all.
    """

    name: str
    kind: ArmKind
    settings: Mapping[str, Setting | Mapping[ResponseKey, Setting]]
    num_samples: int
    head: str | None = None
    family: Family | None = None
    temperature: float | None = None
    label: str | None = None

    @property
    def split(self) -> Literal["train", "test"]:
        """The prompts that it answers."""
        return "train" if self.kind == "train" else "test"

    def find_setting(self, prompt: Prompt, sample: int) -> Setting:
        """How to sample one response."""
        setting = self.settings[prompt.task]
        return setting if isinstance(setting, Setting) else setting[prompt.id, sample]

    def make_seed(self, experiment: Experiment, prompt: Prompt, sample: int) -> int:
        """A request's seed: the same in all arms, so that they are paired, except `self`."""
        stream = ("self",) if self.kind == "self" else ()
        return experiment.derive_seed("evaluation", prompt.id, sample, *stream)

    def describe(self) -> list[Any]:
        """What its answers depend on, as JSON."""
        return [
            self.kind == "self",
            {task: _describe(setting) for task, setting in self.settings.items()},
        ]


def _describe(setting: Setting | Mapping[ResponseKey, Setting]) -> Any:
    if isinstance(setting, Setting):
        return setting.describe()
    return [[key, of_response.describe()] for key, of_response in sorted(setting.items())]


def read_heads(experiment: Experiment, heads: Mapping[str, Path]) -> dict[str, HeadUnderTest]:
    """The heads' metadata and what they were trained for.

    Args:
        heads: folders by name; `name_replicate` names those of further training seeds.

    Raises:
        HeadError: a folder is not a head.
        DataError: a head was trained for none of the experiment's tasks.
    """
    found = {}
    for name, folder in heads.items():
        recipe = experiment.heads.get(get_base(name))
        trained = recipe.tasks if recipe else ()
        tasks = tuple(task for task in experiment.tasks if not trained or task in trained)
        if not tasks:
            raise DataError(f"head {name} belongs to no task of the experiment")
        identity = identify_head(folder)
        found[name] = HeadUnderTest(name, folder, read_metadata(folder), identity, tasks)
    return found


def identify_head(folder: Path) -> dict[str, Any]:
    """What a head's answers depend on: a digest of its weights, and its settings, as JSON."""
    metadata = read_metadata(folder)
    settings = metadata.model_dump(mode="json", include={"choices", "level", "select", "abstain"})
    weights = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()[:16]
    return {"weights": weights, **settings}


def fix_temperature(temperature: float) -> Setting:
    """One temperature for every token, by vLLM's own parameter where it has such a value."""
    low, high = _VLLM_TEMPERATURES
    if temperature == 0 or low <= temperature <= high:
        return Setting(temperature)
    constant = ConstantParameters(temperature=temperature)
    return Setting(AdaptiveRequest(policy="constant", constant=constant))


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


def make_arm_key(
    experiment: Experiment,
    heads: Mapping[str, HeadUnderTest],
    arm: Arm,
    prompts: Sequence[Prompt],
) -> str:
    """A digest of all that an arm's answers depend on, except how many there are."""
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
    asks = arm.kind in ("head", "self", "head_min_p") or arm.family == "head_min_p"
    head = heads[arm.head] if arm.head and asks else None
    own: list[Any] = []
    if head is not None:
        own = [head.identity["weights"], head.metadata.temperatures, head.metadata.level]
        # Answers that were kept before heads had a `select` are those of the likeliest.
        own += [head.metadata.select] if head.metadata.select != "argmax" else []
        abstain = head.metadata.abstain
        own += [abstain.model_dump()] if abstain is not None else []
    dtype = choose_dtype(experiment.engine.dtype)
    engine = [experiment.model, models, dtype, experiment.engine.options]
    return digest([experiment.name, experiment.seed, engine, of_tasks, arm.describe(), own])
