"""A span for every request to an inference route, where vLLM traces (`--otlp-traces-endpoint`).

vLLM's own span `llm_request` ends in the engine's client and takes no attributes of ours. So ours
stands around the request: it is the child of the caller's span, and its context replaces the
caller's in the request's headers, from where vLLM takes the parent of its own. Whether a request
is sampled stays the caller's decision.

OpenTelemetry's own ASGI middleware does not fit: it ends its span with the response's last byte,
before the tokens of a background response are known; it exports the client's address and the query;
and it fails requests whose headers it cannot decode.
"""

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from server.record import Observer, RequestRecord

# By the end of a path; the names are those of OpenTelemetry's conventions for generative AI.
OPERATIONS = {"/v1/completions": "text_completion"}
DEFAULT_OPERATION = "chat"
_PROPAGATOR = TraceContextTextMapPropagator()
_HEADERS = frozenset(name.encode() for name in _PROPAGATOR.fields)


class Tracer(Observer):
    """Observes requests, and makes a span of each."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        # vLLM sets the global provider when it starts the engine's client, and flushes it.
        self._tracer = trace.get_tracer("adaptive-head-server", tracer_provider=provider)
        self._spans: dict[RequestRecord, Span] = {}

    def begin(self, record: RequestRecord, scope: Scope) -> None:
        """Start the span and put its context into the request's headers."""
        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in _HEADERS
        }
        operation = OPERATIONS.get(record.path, DEFAULT_OPERATION)
        span = self._tracer.start_span(
            operation,
            _PROPAGATOR.extract(carrier),
            SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "http.request.method": record.method,
                "url.path": record.path,
            },
        )
        self._spans[record] = span
        record.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        carrier = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        scope["headers"] = [
            *((name, value) for name, value in scope["headers"] if name not in _HEADERS),
            *((name.encode(), value.encode("latin-1")) for name, value in carrier.items()),
        ]

    def end(self, record: RequestRecord) -> None:
        """Say what became of the request, and end its span."""
        span = self._spans.pop(record)
        try:
            if span.is_recording():
                describe(span, record)
        finally:
            span.end()


def describe(span: Span, record: RequestRecord) -> None:
    """Set name, attributes and status of a request's span."""
    is_served = record.status is not None and record.status < 400
    # Names are few: what a client invents is an attribute only.
    if record.model is not None and is_served:
        span.update_name(f"{OPERATIONS.get(record.path, DEFAULT_OPERATION)} {record.model}")
    attributes = {
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "http.response.status_code": record.status,
    }
    for key, value in (record.adaptive or {}).items():
        name = f"temperature.{key}" if key in ("mean", "min", "max") else key
        attributes[f"adaptive.{name}"] = value
    span.set_attributes({key: value for key, value in attributes.items() if value is not None})
    if record.is_aborted:
        span.set_attribute("error.type", "client_disconnected")
        span.set_status(StatusCode.ERROR, "the client left before the response was complete")
    elif record.is_failed:
        span.set_attribute("error.type", (record.error or {}).get("type") or str(record.status))
        span.set_status(StatusCode.ERROR)
