"""Is a request adaptive, and can it be served? Decided here, before the engine sees it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastapi import Request
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.exceptions import VLLMValidationError

from adaptive_head.operator_policy import bound_options, fill_in
from adaptive_head.options import AdaptiveRequest, OptionError, resolve_options
from server.head_control import HeadControl
from server.heads import HeadRegistry
from server.metrics import AdaptiveMetrics
from server.protocol import ADAPTIVE, AdaptiveFields, invalid_option
from server.report import Report, set_current_report

# For clients that cannot send a string as temperature: a model's name with this at its end.
MODEL_SUFFIX = ":adaptive"
MAX_SEED = (1 << 63) - 1
_NO_OPTIONS = AdaptiveRequest()


@dataclass(frozen=True)
class AdaptiveState:
    """What the routes need to know; `app.state.adaptive`.

    Attributes:
        policy: completes requests that choose neither a policy nor a head.
        max_temperature: bounds every adaptive request; None for no bound.
    """

    heads: HeadRegistry
    adaptive_by_default: bool
    served_names: tuple[str, ...]
    tokenize_marker: Callable[[str], list[int]] | None
    metrics: AdaptiveMetrics
    control: HeadControl | None = None
    policy: AdaptiveRequest = _NO_OPTIONS
    max_temperature: float | None = None

    @staticmethod
    def adaptive_name(served_name: str) -> str:
        """The name under which every request to a served model is adaptive."""
        return served_name + MODEL_SUFFIX

    def strip_adaptive_name(self, name: str | None) -> str | None:
        """The served model behind an adaptive name; None for any other name."""
        if name is None or name in self.served_names:
            return None
        stripped = name.removesuffix(MODEL_SUFFIX)
        return stripped if stripped != name and stripped in self.served_names else None


def serve_adaptive_names(models: OpenAIServingModels, state: AdaptiveState) -> None:
    """Let every route know the adaptive names, also one that generates nothing."""
    # The list is also that of `models.registry`; the first is the name that answers have.
    paths = {path.name: path for path in models.base_model_paths}
    models.base_model_paths += [
        replace(paths[name], name=state.adaptive_name(name)) for name in state.served_names
    ]


def admit(request: AdaptiveFields, raw_request: Request) -> None:
    """Make a request adaptive if it asks for that; an ordinary one stays as it is.

    An adaptive one holds its head from here on, until `Holding` releases it.

    Raises:
        VLLMValidationError: it asks for something that cannot be served (a 400).
    """
    state: AdaptiveState = raw_request.app.state.adaptive
    asked_name = request.model
    served_name = state.strip_adaptive_name(asked_name)
    if served_name is not None:
        request.model = served_name
    adapters = raw_request.app.state.openai_serving_models.lora_requests
    is_adapted = request.model in adapters
    is_beam_search = getattr(request, "use_beam_search", False)
    if served_name is None and not is_asked_for(request):
        # What the server's default cannot serve was not asked for, and stays ordinary.
        is_default = state.adaptive_by_default and request.temperature is None
        is_served = not is_adapted or state.policy.policy != "head"
        if not is_default or not is_served or is_beam_search:
            return
    options = fill_in(request.adaptive or _NO_OPTIONS, state.policy)
    try:
        resolved = resolve_options(
            options, state.heads.by_name, state.heads.default, state.tokenize_marker
        )
        resolved = bound_options(resolved, state.max_temperature)
    except OptionError as error:
        raise invalid_option(error) from None
    if is_beam_search:
        raise VLLMValidationError(
            "beam search has no temperature to adapt; leave out use_beam_search",
            parameter="use_beam_search",
        )
    if resolved.policy == "head" and is_adapted:
        raise VLLMValidationError(
            f"the heads were made for the base model, not for the adapter {request.model!r}; "
            f"ask for {' or '.join(state.served_names)}, or for a policy that needs no head",
            parameter="model",
        )
    num_choices = getattr(request, "n", 1) or 1
    seed = getattr(request, "seed", None)
    if seed is not None and seed + num_choices > MAX_SEED + 1:
        # vLLM numbers a request's choices on from its seed, and a worker would fail on the last.
        raise VLLMValidationError(
            f"seed must be at most {MAX_SEED + 1 - num_choices} with n = {num_choices}",
            parameter="seed",
        )
    resolved, head = state.heads.choose(resolved, options, seed)
    report = Report(
        resolved,
        options.report,
        num_choices,
        state.metrics,
        takes_many_prompts=request.takes_many_prompts,
        head=head,
        is_override=resolved is state.heads.override,
        alias=None if served_name is None else asked_name,
    )
    request.begin_report(report)
    report.hold()
    set_current_report(report)


def is_asked_for(request: AdaptiveFields) -> bool:
    """Whether the request's own fields make it adaptive.

    Raises:
        VLLMValidationError: they contradict each other.
    """
    if request.temperature in (None, ADAPTIVE):
        return request.temperature == ADAPTIVE or request.adaptive is not None
    if request.adaptive is not None:
        raise VLLMValidationError(
            f'adaptive goes with temperature "adaptive", not {request.temperature}',
            parameter="temperature",
        )
    return False
