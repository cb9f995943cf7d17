"""An experiment as its YAML file describes it: every setting of training, in one place."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from adaptive_head.head import check_temperatures
from adaptive_head.lpo.records import DataError
from adaptive_head.lpo.rewards import RewardConfig
from adaptive_head.options import Level
from adaptive_head.parameters import Temperature

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
# Training seeds and streams of answers that a primary experiment has.
MIN_REPLICATES = 3
Control = Literal[
    "self",
    "meanshift",
    "equal_surprisal",
    "shuffled",
    "dealt",
    "entropy",
    "min_p",
    "top_p",
    "card",
    "head_min_p",
]
LossName = Literal["eq10", "centred", "eq11", "eq9", "nll", "cross_entropy"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptConfig(_Strict):
    """Where a task's prompts come from: a generator of `lpo.tasks`, or JSONL files.

    A line of a file is `{"messages": [...], "group": "..."}` or `{"text": "...", "group": "..."}`
    and may have a `kind`; any other key of it goes into the prompt's reference. `template` wraps a
    line's value `{prompt}` or other keys instead, and `group`, such as `{question}`, names the
    group by a line's keys.
    """

    generate: str | None = None
    file: Path | None = None
    test_file: Path | None = None
    template: str | None = None
    group: str | None = None
    num_train: Count
    num_test: Count

    @field_validator("file", "test_file")
    @classmethod
    def _resolve(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return value and (info.context or {}).get("folder", Path()) / value

    @field_serializer("file", "test_file", when_used="json")
    def _name_file(self, value: Path | None) -> str | None:
        """Without its folder, which is another on every machine."""
        return None if value is None else value.name

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.generate is None) == (self.file is None):
            raise ValueError("give either generate or file")
        if self.generate and (self.test_file or self.template or self.group):
            raise ValueError("test_file, template and group belong to file")
        return self


class Preference(_Strict):
    """Which response of a prompt is better, by the names of the task's rewards.

    With `first` alone the best by it is chosen and the worst rejected. With `then`, as in the
    paper (§3.3): among the `top` best by `first` the best by `then`, among the `top` worst the
    worst.
    """

    first: str
    then: str | None = None
    top: Count = 4


class TaskConfig(_Strict):
    """One kind of prompt, and what makes a response to it good.

    Args:
        rewards: by name; each gives every response a score, higher is better.
        prefer: makes pairs.
        compare: rewards by which evaluation tells who wins, the later ones break ties; the first
            is the task's metric. Empty: all rewards, in their order.
    """

    prompts: PromptConfig
    max_tokens: Count
    rewards: Annotated[dict[Name, RewardConfig], Field(min_length=1)]
    prefer: Preference
    compare: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in (self.prefer.first, self.prefer.then, *self.compare):
            if name is not None and name not in self.rewards:
                raise ValueError(f"{name!r} is not one of the rewards ({', '.join(self.rewards)})")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.compare or tuple(self.rewards)


class EngineConfig(_Strict):
    """How vLLM runs. `options` are any of vLLM's engine arguments.

    Args:
        backend: `local` is one engine in this process; `data_parallel` vLLM's own data
            parallelism, of `num_replicas`; `ray` one engine a Ray actor, on one machine or many.
        max_num_seqs: requests that run at once in a replica.
        dtype: `auto` is the checkpoint's, but float32 on a CPU without instructions for bfloat16.
    """

    backend: Literal["local", "data_parallel", "ray"] = "local"
    num_replicas: Count = 1
    max_num_seqs: Count = 128
    dtype: str = "auto"
    ray_address: str | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.backend == "local" and self.num_replicas != 1:
            raise ValueError("num_replicas needs the backend data_parallel or ray")
        return self


class RolloutConfig(_Strict):
    num_responses: Annotated[int, Field(ge=2, le=1024)] = 16
    shard_size: Count = 2000


class HeadRecipe(_Strict):
    """How one head is trained. The defaults are ours: the paper names none of them.

    Args:
        credit: `response` pairs whole responses, `span` the spans that a reward scores apart.
        max_pairs_per_prompt: None is one of responses, as in the paper, and 32 of a reward's spans.
        length_normalised: divide a side's sum of log-probabilities by its number of tokens.
        mean_penalty: weight of KL(P(. | h) || mean P) in the loss, which pulls the choice towards
            one that does not depend on the state; 0 is the paper.
        layers: widths of the hidden layers.
    """

    level: Level
    loss: LossName = "eq10"
    credit: Literal["response", "span"] = "response"
    tasks: tuple[str, ...] = ()
    max_pairs_per_prompt: Count | None = None
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    layers: tuple[Count, ...] = (256, 256)
    beta: Annotated[float, Field(gt=0, le=100)] = 1.0
    length_normalised: bool = False
    mean_penalty: Annotated[float, Field(ge=0)] = 0.0
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size: Count = 64
    max_epochs: Count = 100
    patience: Count = 10
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: Seed = 0

    @model_validator(mode="after")
    def _check_temperatures(self) -> Self:
        check_temperatures(self.temperatures)
        if self.level == "sequence" and self.credit == "span":
            raise ValueError("credit: a sequence-level head has one choice, so no spans")
        if self.level == "sequence" and self.loss == "cross_entropy":
            raise ValueError("loss: cross_entropy needs a choice for each token: level: token")
        return self


class EvaluationConfig(_Strict):
    """What the heads are compared with on held-out prompts.

    Args:
        num_responses: to each prompt in each stream, in every arm.
        num_streams: independent repetitions of all answers, which the bootstrap resamples.
        num_train_prompts: a task's training prompts on which controls are tuned; None is all, as
            the heads have, 0 leaves the best fixed temperatures out and the rest untuned.
        majority: compare answers by majority vote over `num_responses` (maj@N), too.
        controls: what heads are compared with, in addition to the fixed temperatures.
    """

    num_responses: Count = 1
    num_streams: Annotated[int, Field(ge=1, le=100)] = 1
    num_train_prompts: Annotated[int, Field(ge=0)] | None = None
    fixed: tuple[Temperature, ...] = ()
    majority: bool = False
    controls: tuple[Control, ...] = get_args(Control)
    num_bootstrap: Count = 20_000


class Experiment(_Strict):
    """A whole experiment file.

    Args:
        name: part of every derived seed, so that experiments share neither draws nor prompts.
        model: `embedded`, a folder, or a name on the Hugging Face hub.
        primary: its results are the evidence for its heads. It needs `MIN_REPLICATES` training
            seeds and streams of answers; any other experiment is exploratory.
        num_training_seeds: how often heads are trained, each time on rollouts of their own. The
            first one's heads are those that ship, whatever the others' are worth.
        outside: tasks of kinds that no head is trained on. All heads and controls answer them, and
            they have a table of their own.
        heads: by name; those of one level and one set of temperatures share rollouts.
        ready_heads: folders of heads that are evaluated as they are, by name.
    """

    name: Name
    about: str = ""
    model: str = "embedded"
    seed: Seed = 0
    primary: bool = False
    num_training_seeds: Annotated[int, Field(ge=1, le=100)] = 1
    engine: EngineConfig = EngineConfig()
    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    outside: dict[Name, TaskConfig] = {}
    rollouts: RolloutConfig = RolloutConfig()
    heads: dict[Name, HeadRecipe] = {}
    ready_heads: dict[Name, Path] = {}
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("ready_heads")
    @classmethod
    def _resolve(cls, value: dict[str, Path], info: ValidationInfo) -> dict[str, Path]:
        folder = (info.context or {}).get("folder", Path())
        return {name: folder / path for name, path in value.items()}

    @field_serializer("ready_heads", when_used="json")
    def _name_heads(self, value: dict[str, Path]) -> dict[str, str]:
        return {name: path.name for name, path in value.items()}

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if not self.heads and not self.ready_heads:
            raise ValueError("heads: give at least one, here or in ready_heads")
        for name in self.heads.keys() & self.ready_heads.keys():
            raise ValueError(f"ready_heads.{name}: heads has one of this name")
        for name in self.tasks.keys() & self.outside.keys():
            raise ValueError(f"outside.{name}: tasks has one of this name")
        return self

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        for name, head in self.heads.items():
            if unknown := set(head.tasks) - self.tasks.keys():
                raise ValueError(f"heads.{name}.tasks: {', '.join(sorted(unknown))} is not a task")
        return self

    @model_validator(mode="after")
    def _check_primary(self) -> Self:
        counts = {
            "num_training_seeds": self.num_training_seeds,
            "evaluation.num_streams": self.evaluation.num_streams,
        }
        if self.primary and self.ready_heads:
            raise ValueError("primary: ready_heads have one training only")
        for name, count in counts.items():
            if self.primary and count < MIN_REPLICATES:
                raise ValueError(f"primary: {name} must be at least {MIN_REPLICATES}")
        return self

    def look_outside(self) -> "Experiment | None":
        """The experiment of the outside tasks, which all heads answer; None where there are none.

        It has a name of its own, and so draws of its own.
        """
        if not self.outside:
            return None
        heads = {name: r.model_copy(update={"tasks": ()}) for name, r in self.heads.items()}
        update = {"name": f"{self.name}.outside", "tasks": self.outside, "outside": {}}
        return self.model_copy(update=update | {"heads": heads})

    def derive_seed(self, *parts: object) -> int:
        """A seed in [0, 2^31) that depends on the experiment's name and seed, and on `parts`."""
        return derive_seed(self.name, self.seed, *parts)

    def seed_recipe(self, recipe: HeadRecipe, replicate: int) -> HeadRecipe:
        """A head's recipe with the seed of one training, which no other experiment uses."""
        seed = self.derive_seed("training", recipe.seed, replicate)
        return recipe.model_copy(update={"seed": seed})

    def shrink(self) -> "Experiment":
        """The `--quick` form: the same stages on a few short responses, in minutes.

        Its numbers mean nothing; it shows that an experiment runs from end to end.
        """
        # Enough for pairs of several prompts, which training needs, whatever is sampled.
        num_train = max(3, 10 // len(self.tasks))
        tasks = {name: _shrink_task(task, num_train, 40) for name, task in self.tasks.items()}
        # They teach nothing, so they need no differences between answers.
        outside = {name: _shrink_task(task, 1, 12) for name, task in self.outside.items()}
        heads = {
            name: head.model_copy(update={"max_epochs": 2}) for name, head in self.heads.items()
        }
        evaluation = {"num_responses": min(self.evaluation.num_responses, 3)}
        evaluation |= {"num_streams": min(self.evaluation.num_streams, 2)}
        if self.evaluation.num_train_prompts != 0:
            evaluation |= {"num_train_prompts": 1}
        return self.model_copy(
            update={
                "primary": False,
                "num_training_seeds": min(self.num_training_seeds, 2),
                "tasks": tasks,
                "outside": outside,
                "heads": heads,
                "rollouts": self.rollouts.model_copy(update={"num_responses": 6}),
                "evaluation": self.evaluation.model_copy(
                    update=evaluation | {"num_bootstrap": 200}
                ),
            }
        )


def _shrink_task(task: TaskConfig, num_train: int, max_tokens: int) -> TaskConfig:
    prompts = task.prompts.model_copy(update={"num_train": num_train, "num_test": 2})
    max_tokens = min(task.max_tokens, max_tokens)
    return task.model_copy(update={"prompts": prompts, "max_tokens": max_tokens})


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file; paths in it are relative to its folder.

    `outside` may be the path of a file of tasks, whose own paths are relative to that one's folder.

    Raises:
        DataError: names the file, the field and what would be valid.
    """
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold the fields {', '.join(Experiment.model_fields)}")
    if isinstance(outside := content.get("outside"), str):
        content |= {"outside": _read_tasks(path.parent / outside)}
    try:
        return Experiment.model_validate(content, context={"folder": path.parent})
    except ValidationError as error:
        raise _refuse(path, error) from None


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from None


def _read_tasks(path: Path) -> dict[str, TaskConfig]:
    """A file of tasks by their names."""
    content = _read_yaml(path)
    try:
        return _TASKS.validate_python(content, context={"folder": path.parent})
    except ValidationError as error:
        raise _refuse(path, error) from None


def _refuse(path: Path, error: ValidationError) -> DataError:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "(top level)"
    return DataError(f"{path}: {name}: {first['msg']}")


_TASKS = TypeAdapter(dict[Name, TaskConfig])


def digest(value: Any) -> str:
    """A short hash of settings, by which a stage knows whether its results are still theirs."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A request's seed in [0, 2^31): a function of what it belongs to, whatever runs beside it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1
