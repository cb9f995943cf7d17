"""`head.json`: what a head chooses from, how, and which model it was made for.

Format 2. Format 1 is read too, and `adaptive-head upgrade` rewrites it. The format has places for
what this release does not serve yet: other kinds of head, choices with top-p and min-p.
A file that uses one of them is refused, never served as something else.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from adaptive_head.abstention import Abstention, Probability
from adaptive_head.head import MAX_TEMPERATURE, HeadConfig, check_temperatures
from adaptive_head.options import Level, Selection, TokenId, quote
from adaptive_head.parameters import Temperature

FORMAT_VERSION: Final = 2

MAX_PROBE_PROMPTS = 64
MAX_PROBE_TOKENS = 256
_MAX_TOLERANCES = 16
_MAX_LAYERS = 64
_MAX_PACKAGES = 64
# Of everything but `training`: a probe of the largest size, and the rest. To refuse one value takes
# microseconds, and a megabyte could hold half a million.
_MAX_VALUES = MAX_PROBE_PROMPTS * (MAX_PROBE_TOKENS + 2) + 1024
_MAX_MESSAGE_LENGTH = 1000

GateOutcome = Literal["passed", "failed"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

_SHARES = TypeAdapter(dict[str, Share])


class HeadError(ValueError):
    """A head that cannot be used. The message names the file and what is wrong with it.

    It may quote the file, and can be logged and sent all the same: it is one line of limited
    length, with escapes for what is not printable.
    """

    def __init__(self, message: str) -> None:
        cut = message[:_MAX_MESSAGE_LENGTH]
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in cut))


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable characters")
    return text


# Text that lists, labels and messages show.
Name = Annotated[str, Field(max_length=128), AfterValidator(_check_printable)]


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelIdentity(_Described):
    """The frozen language model that a head was made for; see `fingerprint_model`."""

    name: Name
    fingerprint: Name | None = None


class Setting(_Described):
    """One of the K things that a head chooses from; in JSON a number where it is no more.

    Attributes:
        top_p: None leaves the request's own, and so does `min_p`.
    """

    temperature: float
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = None
    min_p: Probability | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number or isinstance(value, Mapping | cls)):
            raise ValueError(
                f"must be a number, or an object with temperature, top_p and min_p, "
                f"got {quote(value)}"
            )
        return {"temperature": value} if is_number else value

    @model_serializer
    def _write(self) -> float | dict[str, float]:
        values = {name: value for name, value in self if value is not None}
        return values if len(values) > 1 else self.temperature


class FeatureProbe(_Described):
    """Short prompts, and the temperatures that the head is to give at their end.

    They show whether the hidden states of the model being served are those that the head was
    trained on.

    Attributes:
        prompts: token ids.
        temperatures: of each prompt, the mean of the head's distribution at its last token.
        tolerances: by the dtype that the model is served in, how far off temperatures may be.
    """

    prompts: Annotated[
        tuple[
            Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_PROBE_TOKENS)], ...
        ],
        Field(min_length=1, max_length=MAX_PROBE_PROMPTS),
    ]
    temperatures: tuple[Temperature, ...]
    tolerances: Annotated[
        dict[Name, Annotated[float, Field(gt=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False)]],
        Field(min_length=1, max_length=_MAX_TOLERANCES),
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.temperatures) != len(self.prompts):
            raise ValueError(
                f"{len(self.temperatures)} temperatures for {len(self.prompts)} prompts"
            )
        return self


class HeadMetadata(_Described):
    """The contents of `head.json`.

    Attributes:
        choices: the K settings, in the order of the network's outputs.
        select: what a request gets that does not say it.
        abstain: None where the head always chooses.
        training: how it was trained; any JSON object.
        gate: what `adaptive-head gate` found; null before the gate has run.
    """

    format_version: Literal[2] = FORMAT_VERSION
    kind: Literal["categorical"] = "categorical"
    choices: tuple[Setting, ...]
    level: Level
    select: Selection = "argmax"
    abstain: Abstention | None = None
    hidden_size: Annotated[int, Field(ge=1)]
    layer_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=_MAX_LAYERS)]
    base_model: BaseModelIdentity
    probe: FeatureProbe | None = None
    trained: bool
    training: dict[str, Any] | None = None
    gate: GateOutcome | None = None
    created: Name
    git_sha: Name | None = None
    packages: Annotated[dict[Name, Name], Field(max_length=_MAX_PACKAGES)]

    @field_validator("kind", mode="before")
    @classmethod
    def _refuse_other_kinds(cls, value: Any) -> Any:
        if value != "categorical":
            raise ValueError(f'this release serves heads of kind "categorical", not {quote(value)}')
        return value

    @field_validator("choices")
    @classmethod
    def _check_choices(cls, value: tuple[Setting, ...]) -> tuple[Setting, ...]:
        for index, setting in enumerate(value):
            for field in ("top_p", "min_p"):
                if getattr(setting, field) is not None:
                    raise ValueError(
                        f"this release serves choices of temperatures only, and number {index} "
                        f"has a {field}"
                    )
        check_temperatures(tuple(setting.temperature for setting in value))
        return value

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperature of each choice."""
        return tuple(setting.temperature for setting in self.choices)

    @property
    def is_continuous(self) -> bool:
        """Whether what it serves by default lies between its choices, too."""
        return self.select == "mean"

    @property
    def bounds(self) -> tuple[float, ...]:
        """What the temperatures that it serves are counted by, increasing.

        Its choices and its fallback, or the upper bounds of buckets where temperatures are
        continuous.
        """
        served = {*self.temperatures, *([self.abstain.fallback] if self.abstain else ())}
        return bound_means(served) if self.is_continuous else tuple(sorted(served))

    @property
    def config(self) -> HeadConfig:
        """The shape of the head's network."""
        return HeadConfig(self.hidden_size, self.temperatures, self.layer_sizes)

    @property
    def training_shares(self) -> tuple[float, ...] | None:
        """What it would have served in training: the share of each of `bounds`; they add up to 1.

        None where `training`, which is free in form, does not say so, for a head whose default is
        a draw, and for one that may abstain: the shares are those of its choices alone.
        """
        if self.abstain is not None:
            return None
        try:
            found = _SHARES.validate_python((self.training or {})[_SHARES_KEYS[self.select]])
            shares = tuple(found[str(bound)] for bound in self.bounds)
        except (ValidationError, KeyError):
            return None
        return shares if math.isclose(sum(shares), 1.0, abs_tol=1e-3) else None


def bound_means(temperatures: Iterable[float]) -> tuple[float, ...]:
    """The upper bounds of the buckets that means of these temperatures are counted in.

    Tenths up to 2, the same for all heads so that they can be compared, and the temperatures.
    """
    return tuple(sorted({*(tenth / 10 for tenth in range(21)), *temperatures}))


# Entries of `training`, by `select`.
_SHARES_KEYS = {"argmax": "temperature_shares", "mean": "expected_temperature_shares"}


def parse_metadata(path: Path, text: bytes) -> HeadMetadata:
    """Read and check the contents of a `head.json` of either format.

    Args:
        path: for messages.

    Raises:
        HeadError: it is not JSON, of a newer format, a field is wrong or not served yet, or it
            cannot be written again.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeadError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise HeadError(f"{path} must hold a JSON object")
    num_values = _count_values(content) - _count_values(content.get("training"))
    if num_values > _MAX_VALUES:
        raise HeadError(
            f"{path} has {num_values:,} values besides training, at most {_MAX_VALUES:,} are read"
        )
    found = content.get("format_version")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise HeadError(
            f"{path} has format {found}; this release reads up to {FORMAT_VERSION}: "
            "install a newer one"
        )
    names = {}
    # The version of format 1 was optional.
    if content.get("format_version", 1) == 1:
        content, names = _convert_format_1(path, content), {"choices": "temperatures"}
    try:
        metadata = HeadMetadata.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field, *parts = first["loc"] or ("(top level)",)
        place = ".".join(map(str, (names.get(str(field), field), *parts)))
        message = first["msg"].removeprefix("Value error, ")
        raise HeadError(f"{path}: {place}: {message}") from None
    dump_metadata(path, metadata)
    return metadata


def dump_metadata(path: Path, metadata: HeadMetadata) -> str:
    """The contents of a `head.json` of the newest format.

    Args:
        path: for messages.

    Raises:
        HeadError: `training` holds what JSON cannot, such as half a surrogate pair.
    """
    try:
        return metadata.model_dump_json(indent=2) + "\n"
    except PydanticSerializationError as error:
        raise HeadError(f"{path}: training cannot be written: {error}") from None


def _count_values(value: Any) -> int:
    """How many values a JSON value is made of, however deep they are."""
    num_values, todo = 0, [value]
    while todo:
        num_values += 1
        value = todo.pop()
        todo += (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        )
    return num_values


def _convert_format_1(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 as format 2: `temperatures` are the choices, and `argmax` was the default."""
    new = {"kind", "choices", "select", "abstain", "probe", "gate"}
    known = HeadMetadata.model_fields.keys() - new
    if unknown := sorted(content.keys() - known - {"temperatures"}):
        raise HeadError(f"{path}: {unknown[0]}: Extra inputs are not permitted")
    converted = {name: value for name, value in content.items() if name != "temperatures"}
    if "temperatures" in content:
        converted["choices"] = content["temperatures"]
    return converted | {"format_version": FORMAT_VERSION}
