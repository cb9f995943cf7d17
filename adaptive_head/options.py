"""What a request may ask for, and what it means: the `adaptive` object of a request.

`AdaptiveRequest` is the shape that clients send, `Options` what it means once the loaded heads
are known, and the only thing about adaptivity that travels to the engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from adaptive_head.abstention import Abstention
from adaptive_head.head import MAX_TEMPERATURE
from adaptive_head.parameters import (
    MAX_LIST_LEN,
    ConstantParameters,
    EntropyParameters,
    ListParameters,
    ScheduleParameters,
    Strict,
    Temperature,
    TwoPhaseParameters,
)

Level = Literal["token", "sequence"]
PolicyName = Literal["head", "entropy", "schedule", "two_phase", "constant", "list"]
Selection = Literal["argmax", "sample", "mean"]
ReportDetail = Literal["none", "summary", "tokens"]

# The key under which options travel in vLLM's `SamplingParams.extra_args`.
EXTRA_ARGS_KEY = "adaptive"
# The engine compares so many tokens at every step of a two-phase request.
MAX_MARKER_TOKENS = 8

Scale = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Parameter = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]
Generation = Annotated[int, Field(ge=0, strict=True)]
NumTokens = Annotated[int, Field(ge=0, strict=True)]
Marker = Annotated[tuple[TokenId, ...], Field(max_length=MAX_MARKER_TOKENS)]
Temperatures = Annotated[tuple[Temperature, ...], Field(max_length=MAX_LIST_LEN)]


class OptionError(ValueError):
    """An option that cannot be served. `field` names it, as in `adaptive.head`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class AdaptiveRequest(Strict):
    """The `adaptive` object of a request."""

    head: str | None = Field(None, description="A loaded head; null means the default head.")
    level: Level | None = Field(
        None, description="One choice a token or one a sequence; null means the head's own level."
    )
    policy: PolicyName = Field("head", description="What chooses the temperature.")
    select: Selection | None = Field(
        None,
        description="The likeliest temperature, a draw, or the mean; null means the head's own.",
    )
    abstain: bool | None = Field(
        None,
        description="Whether the head's fallback holds where it is unsure; null means the head's "
        "own way.",
    )
    min: Temperature | None = Field(None, description="No temperature below this.")
    max: Temperature | None = Field(None, description="No temperature above this.")
    scale: Scale = Field(1.0, description="Multiplies the chosen temperature, before min and max.")
    report: ReportDetail = Field("summary", description="What the answer says of its temperatures.")
    entropy: EntropyParameters | None = None
    schedule: ScheduleParameters | None = None
    two_phase: TwoPhaseParameters | None = None
    constant: ConstantParameters | None = None
    list: ListParameters | None = None


class Head(Protocol):
    """What must be known of a loaded head to resolve a request."""

    @property
    def level(self) -> Level: ...

    @property
    def select(self) -> Selection:
        """What a request gets that does not say it."""
        ...

    @property
    def abstain(self) -> Abstention | None:
        """When it gives a fallback instead of its choice; None where it always chooses."""
        ...


class MarkerTokenizer(Protocol):
    """Turns a marker into its token ids, without special tokens around them."""

    def __call__(self, marker: str, /) -> list[int]: ...


@dataclass(frozen=True)
class Options:
    """A request's options once resolved: complete, and valid for the loaded heads.

    `parameters` are the policy's own: entropy (t0, theta), schedule (start, end, tokens),
    two_phase (thinking, answer), constant (temperature,), list (), head (threshold, fallback,
    statistic) where it may abstain (`Abstention.parameters`), else ().
    `name` labels answers and metrics: the head's name, or the policy's. A head's `generation` tells
    it from earlier ones of its name. `marker_token_ids`, in this order, end the thinking of
    two_phase, `start_token_ids` begin it again; () is no marker. `num_written` of the prompt's last
    tokens count for the phase as what the model writes does: a generation prompt, or the beginning
    of its answer. `temperatures` are a list's.
    """

    policy: PolicyName
    name: str
    level: Level
    select: Selection
    scale: Scale
    min: Temperature
    max: Temperature
    parameters: tuple[Parameter, ...] = ()
    marker_token_ids: Marker = ()
    start_token_ids: Marker = ()
    generation: Generation = 0
    temperatures: Temperatures = ()
    num_written: NumTokens = 0

    @property
    def is_continuous(self) -> bool:
        """Whether temperatures may be any number, and not only those of a table."""
        return self.policy in ("entropy", "schedule", "list") or self.select == "mean"

    @property
    def can_abstain(self) -> bool:
        """Whether tokens may get a head's fallback."""
        return self.policy == "head" and bool(self.parameters)

    def to_extra_args(self) -> dict[str, Any]:
        """The options as `SamplingParams.extra_args` carries them (plain, msgpack-able)."""
        # A frozen dataclass without slots: its fields are its dictionary.
        values = dict(
            vars(self),
            parameters=list(self.parameters),
            marker_token_ids=list(self.marker_token_ids),
            start_token_ids=list(self.start_token_ids),
            temperatures=list(self.temperatures),
        )
        return {EXTRA_ARGS_KEY: values}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "Options | None":
        """The options that a request carries, or None for an ordinary request.

        Raises:
            OptionError: the entry is not one that `to_extra_args` made.
        """
        if not extra_args or EXTRA_ARGS_KEY not in extra_args:
            return None
        value = extra_args[EXTRA_ARGS_KEY]
        refusal = OptionError("", f"extra_args[{EXTRA_ARGS_KEY!r}] was not made by to_extra_args")
        if not isinstance(value, Mapping) or set(value) != {f.name for f in fields(cls)}:
            raise refusal
        try:
            options = _OPTIONS.validate_python(dict(value))
        except ValidationError:
            raise refusal from None
        has_its_name = options.policy in ("head", options.name)
        has_its_list = bool(options.temperatures) == (options.policy == "list")
        is_complete = len(options.parameters) in _NUM_PARAMETERS[options.policy]
        if not (has_its_name and has_its_list and is_complete):
            raise refusal
        return options


_OPTIONS = TypeAdapter(Options)
_NUM_PARAMETERS: dict[PolicyName, tuple[int, ...]] = {
    "head": (0, 3),
    "entropy": (2,),
    "schedule": (3,),
    "two_phase": (2,),
    "constant": (1,),
    "list": (0,),
}


def parse_request(value: Any) -> AdaptiveRequest:
    """Validate the `adaptive` object of a request's body.

    Raises:
        OptionError: names the first wrong field, and says what would be valid.
    """
    if not isinstance(value, Mapping):
        raise OptionError("", f'must be an object such as {{"level": "token"}}, got {quote(value)}')
    try:
        return AdaptiveRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        field = field if field.isprintable() else repr(field)
        message = first["msg"]
        if first["type"] == "extra_forbidden":
            *parents, _ = first["loc"]
            model = _PARAMETER_MODELS[str(parents[0])] if parents else AdaptiveRequest
            message = "unknown field; the fields are " + ", ".join(model.model_fields)
        raise OptionError(field, f"{message} (got {quote(first['input'])})") from None


_PARAMETER_MODELS: dict[str, type[Strict]] = {
    "entropy": EntropyParameters,
    "schedule": ScheduleParameters,
    "two_phase": TwoPhaseParameters,
    "constant": ConstantParameters,
    "list": ListParameters,
}


def quote(value: Any) -> str:
    """A client's value as an error shows it. Never what is in a list or an object, which may be
    nested too deep to print."""
    return type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.80}"


def resolve_options(
    request: AdaptiveRequest,
    heads: Mapping[str, Head],
    default_head: str | None,
    tokenize_marker: MarkerTokenizer | None = None,
) -> Options:
    """Decide what a request means, given the loaded heads.

    Args:
        heads: the loaded heads by name.
        default_head: which of them answers where a request names none.
        tokenize_marker: needed for the two_phase policy.

    Raises:
        OptionError: the request cannot be served; says what would be valid.
    """
    _refuse_misplaced(request)
    low = 0.0 if request.min is None else request.min
    high = MAX_TEMPERATURE if request.max is None else request.max
    if low > high:
        raise OptionError("min", f"min {low:g} is above max {high:g}")
    if request.policy == "head":
        name, head = _find_head(request, heads, default_head)
        level, select = head.level, request.select or head.select
        parameters: tuple[float, ...] = resolve_abstention(request, name, head)
    else:
        name, level, select = request.policy, _resolve_policy_level(request), "argmax"
        parameters = _resolve_parameters(request)
    markers: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
    if request.policy == "two_phase":
        marker = (request.two_phase or TwoPhaseParameters()).marker
        markers = _resolve_markers(marker, tokenize_marker)
    return Options(
        policy=request.policy,
        name=name,
        level=level,
        select=select,
        scale=request.scale,
        min=low,
        max=high,
        parameters=parameters,
        marker_token_ids=markers[0],
        start_token_ids=markers[1],
        temperatures=tuple(request.list.temperatures) if request.list else (),
    )


def _refuse_misplaced(request: AdaptiveRequest) -> None:
    """An option that the chosen policy would ignore is a mistake of the client."""
    if request.policy != "head":
        for field in ("head", "select", "abstain"):
            if getattr(request, field) is not None:
                raise OptionError(field, f"{field} goes with policy head, not {request.policy}")
    for policy in _PARAMETER_MODELS:
        if policy != request.policy and getattr(request, policy) is not None:
            raise OptionError(policy, f"{policy} goes with policy {policy}, not {request.policy}")
    if request.policy == "list" and request.list is None:
        raise OptionError(
            "list", 'policy list needs temperatures, such as {"temperatures": [0.2, 0.7]}'
        )


def _find_head(
    request: AdaptiveRequest, heads: Mapping[str, Head], default_head: str | None
) -> tuple[str, Head]:
    name = default_head if request.head is None else request.head
    if name is None:
        policies = ", ".join(_PARAMETER_MODELS)
        raise OptionError("head", f"no head is loaded; the policies need none: {policies}")
    if name not in heads:
        loaded = ", ".join(sorted(heads)) or "none"
        raise OptionError("head", f"unknown head {name!r:.80}; loaded: {loaded}")
    head = heads[name]
    if request.level not in (None, head.level):
        raise OptionError("level", f"head {name!r} was made for level {head.level!r}")
    return name, head


def resolve_abstention(request: AdaptiveRequest, name: str, head: Head) -> tuple[float, ...]:
    """`Options.parameters` of a request to a head.

    Raises:
        OptionError: the request wants the head to abstain, and it has no fallback.
    """
    if request.abstain and head.abstain is None:
        raise OptionError(
            "abstain", f"head {name!r:.80} cannot abstain: it has no fallback; leave abstain out"
        )
    return () if head.abstain is None or request.abstain is False else head.abstain.parameters


def _resolve_policy_level(request: AdaptiveRequest) -> Level:
    if request.level == "sequence" and request.policy in ("schedule", "two_phase", "list"):
        raise OptionError("level", f"policy {request.policy} has level token only")
    return request.level or "token"


def _resolve_parameters(request: AdaptiveRequest) -> tuple[float, ...]:
    match request.policy:
        case "entropy":
            entropy = request.entropy or EntropyParameters()
            return entropy.t0, entropy.theta
        case "schedule":
            schedule = request.schedule or ScheduleParameters()
            return schedule.start, schedule.end, float(schedule.tokens)
        case "two_phase":
            two_phase = request.two_phase or TwoPhaseParameters()
            return two_phase.thinking, two_phase.answer
        case "constant":
            return ((request.constant or ConstantParameters()).temperature,)
        case "list" | "head":
            return ()


def _resolve_markers(
    marker: str, tokenize_marker: MarkerTokenizer | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the end-of-thinking marker and, where `</x>` has one, of its `<x>`."""
    if tokenize_marker is None:
        raise OptionError("policy", "two_phase needs a tokenizer, and this server has none")
    end = tokenize_marker(marker)
    if not 1 <= len(end) <= MAX_MARKER_TOKENS:
        raise OptionError(
            "two_phase.marker",
            f"{marker!r:.80} is {len(end)} tokens to this model; the marker must be 1 to "
            f"{MAX_MARKER_TOKENS} tokens, such as the tag that ends a reasoning model's thinking",
        )
    start = tokenize_marker("<" + marker[2:]) if marker.startswith("</") else []
    return tuple(end), tuple(start) if len(start) <= MAX_MARKER_TOKENS else ()
