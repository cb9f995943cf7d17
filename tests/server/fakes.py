"""Stand-ins for what the front end meets in vLLM's API process, so that no engine is needed."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from vllm.outputs import CompletionOutput, RequestOutput, SamplingMask

from adaptive_head.checkpoint import BaseModelIdentity, HeadMetadata
from adaptive_head.decision import Decision
from adaptive_head.options import parse_request, resolve_options
from adaptive_head.vllm.wire import DecisionSender
from server.admission import AdaptiveState
from server.heads import HeadRegistry
from server.metrics import AdaptiveMetrics
from server.report import PromptReport, Report

MODEL = "smol"
ADAPTER = "poems"
TEMPERATURES = (0.0, 0.3, 0.7, 1.0)


def describe_head(
    level="token", temperatures=TEMPERATURES, trained=False, training=None, select="argmax"
) -> HeadMetadata:
    return HeadMetadata(
        choices=temperatures,
        level=level,
        select=select,
        hidden_size=8,
        layer_sizes=(4,),
        base_model=BaseModelIdentity(name="base"),
        trained=trained,
        training=training,
        created="2026-01-01T00:00:00+00:00",
        packages={},
    )


HEADS = {"tok": describe_head(), "seq": describe_head("sequence")}


def make_state(**changes) -> AdaptiveState:
    heads = changes.pop("heads", HEADS)
    fields = {
        "heads": HeadRegistry(heads, next(iter(heads), None)),
        "adaptive_by_default": False,
        "served_names": (MODEL, "smol-2"),
        "tokenize_marker": lambda marker: [7],
        "metrics": AdaptiveMetrics(MODEL, heads, CollectorRegistry()),
    }
    return AdaptiveState(**fields | changes)


def make_http_request(state: AdaptiveState) -> SimpleNamespace:
    """What the routes look at of FastAPI's request, on a server with one LoRA adapter."""
    models = SimpleNamespace(lora_requests={ADAPTER: object()})
    app = SimpleNamespace(state=SimpleNamespace(adaptive=state, openai_serving_models=models))
    return SimpleNamespace(app=app)


def make_report(
    adaptive=None, num_choices=1, registry=None, takes_many_prompts=False, head=None, alias=None
) -> Report:
    """A report as admission makes it for this `adaptive` object."""
    request = parse_request(adaptive or {})
    options = resolve_options(request, HEADS, "tok", lambda marker: [7])
    metrics = AdaptiveMetrics(MODEL, HEADS, registry or CollectorRegistry())
    return Report(
        options,
        request.report,
        num_choices,
        metrics,
        takes_many_prompts=takes_many_prompts,
        head=head,
        alias=alias,
    )


def make_mask(micros: list[int], start=0) -> SamplingMask | None:
    """What an output carries whose tokens have these choices.

    Args:
        start: how many tokens of the answer came before.
    """
    mask = DecisionSender().send("r", [Decision(micro) for micro in micros])
    if mask is None:
        return None
    records = [record for record in mask.to_nested_list() if record]
    return SamplingMask([[start + position, *decision] for position, *decision in records])


def make_output(*completions: tuple, finished=False, prompt="p") -> RequestOutput:
    """An output of the engine's.

    Args:
        completions: (choice, temperatures of its new tokens, finish reason or None) each, and
            fourth how many of its tokens came before. A token is named after the temperature: 0.7
            makes token 700000.
    """
    outputs = []
    for index, temperatures, finish_reason, *start in completions:
        micros = [round(value * 1e6) for value in temperatures]
        outputs.append(
            CompletionOutput(
                index=index,
                text="".join(f"<{micro}>" for micro in micros),
                token_ids=micros,
                cumulative_logprob=None,
                logprobs=None,
                finish_reason=finish_reason,
                sampling_mask=make_mask(micros, *start),
            )
        )
    return RequestOutput(
        request_id="r",
        prompt=prompt,
        prompt_token_ids=[1, 2],
        prompt_logprobs=None,
        outputs=outputs,
        finished=finished,
    )


def feed(prompt_report: PromptReport, *completions: tuple, finished=False) -> RequestOutput:
    """Let a report read an output, whose tokens follow those that it has read."""
    output = make_output(*completions, finished=finished)
    for completion in output.outputs:
        start = sum(prompt_report._choices[completion.index].num_tokens.values())
        completion.sampling_mask = make_mask(completion.token_ids, start)
    prompt_report.read(output)
    return output


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """The sum of a metric's samples, over all labels that are not given."""
    return sum(
        found.value
        for family in registry.collect()
        for found in family.samples
        if found.name == name and labels.items() <= found.labels.items()
    )
