"""A scenario: who asks, how much, for how long, and what must hold. Read from a YAML file."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

FOLDER = Path(__file__).parent / "scenarios"

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Weight = Annotated[int, Field(ge=0, le=1000)]


class ScenarioError(ValueError):
    """A scenario that cannot be run; the message is one sentence that names the field."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(_Strict):
    """So many users for so long; they come and go at `spawn_rate` a second."""

    duration: Seconds
    users: Annotated[int, Field(ge=1, le=100_000)]
    spawn_rate: Annotated[float, Field(gt=0, le=1000)]


class Mix(_Strict):
    """Of how many users one is of each kind, by weight."""

    chat: Weight = 0
    batch: Weight = 0
    long_prompt: Weight = 0
    leaving: Weight = 0


class Style(_Strict):
    """What a request says of its temperature; one is drawn for each, by weight.

    Whether `adaptive` can be served, the server is asked at the start of a run.
    """

    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["adaptive"]
    adaptive: dict[str, Any] | None = None

    @property
    def is_adaptive(self) -> bool:
        return self.temperature == "adaptive"

    @property
    def arm(self) -> str:
        return "adaptive" if self.is_adaptive else "fixed"

    @property
    def fields(self) -> dict[str, Any]:
        """Its fields of a request's body."""
        return self.model_dump(include={"temperature", "adaptive"}, exclude_none=True)

    @model_validator(mode="after")
    def _check(self) -> "Style":
        if self.adaptive is not None and not self.is_adaptive:
            raise ValueError('adaptive goes with temperature "adaptive"')
        return self


class Work(_Strict):
    """What the users ask for.

    Attributes:
        max_tokens: of an answer, drawn between the two.
        think_time: seconds between an answer and the user's next request, drawn between the two.
        turns: questions in a chat, each with the whole chat before it.
        long_prompt_words: of a long prompt.
        batch_prompts: prompts in a request of a batch user.
        batch_n: answers to each of them.
        leave_after: tokens that a leaving user reads.
        leave_max_tokens: tokens that it asked for.
        ignore_eos: answers have all of their `max_tokens`.
    """

    max_tokens: tuple[int, int] = (16, 48)
    think_time: tuple[float, float] = (0.5, 2.0)
    turns: Annotated[int, Field(ge=1, le=20)] = 3
    long_prompt_words: Annotated[int, Field(ge=1, le=1_000_000)] = 300
    batch_prompts: Annotated[int, Field(ge=1, le=100)] = 3
    batch_n: Annotated[int, Field(ge=1, le=100)] = 2
    leave_after: Annotated[int, Field(ge=1)] = 4
    leave_max_tokens: Annotated[int, Field(ge=2)] = 400
    ignore_eos: bool = False

    @field_validator("max_tokens", "think_time")
    @classmethod
    def _check_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError("must be two numbers, the smaller one first")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _check_tokens(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] < 1:
            raise ValueError("must be at least 1")
        return value


class Limits(_Strict):
    """What a run must keep to.

    A wrong answer is never within the limits, nor are tokens that the server counts otherwise.

    Attributes:
        max_failed: share of requests that the server may refuse or fail to finish.
        max_ttft: seconds that 95 % of streams must begin within; null for no limit.
        max_idle_wait: seconds after the last user's end in which the server must be idle.
    """

    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_ttft: Seconds | None = None
    max_idle_wait: Seconds = 30.0


class Scenario(_Strict):
    """A load test."""

    about: str
    seed: int = 0
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    mix: Mix
    styles: Annotated[tuple[Style, ...], Field(min_length=1)]
    work: Work = Work()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check(self) -> "Scenario":
        if not any(self.mix.model_dump().values()):
            raise ValueError("mix: at least one weight must be above 0")
        if self.mix.batch and self.work.batch_n > 1:
            greedy = [style for style in self.styles if style.temperature == 0]
            if len(greedy) == len(self.styles):
                raise ValueError("work.batch_n: must be 1 where every style is greedy")
        return self

    @property
    def duration(self) -> float:
        """Seconds of all stages."""
        return sum(stage.duration for stage in self.stages)

    def adjust(self, scale: float = 1.0, duration: float | None = None) -> "Scenario":
        """The same with `scale` times the users, stretched to so many seconds."""
        stretch = 1.0 if duration is None else duration / self.duration
        stages = [
            stage.model_copy(
                update={
                    "users": max(1, round(stage.users * scale)),
                    "spawn_rate": stage.spawn_rate * scale / stretch,
                    "duration": stage.duration * stretch,
                }
            )
            for stage in self.stages
        ]
        return self.model_copy(update={"stages": tuple(stages)})


def list_scenarios() -> list[str]:
    """The names of those that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_scenario(name: str) -> Scenario:
    """Read a scenario by its name, or from a file.

    Raises:
        ScenarioError: there is none, or it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ScenarioError(
            f"there is no scenario {name!r}: give a file, or one of {', '.join(list_scenarios())}"
        )
    try:
        return Scenario.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ScenarioError(": ".join(filter(None, (str(path), field, message)))) from None
