"""The span of a request, without an engine; with one and a receiver: test_faults.py."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.record import RequestRecord
from server.tracing import Tracer
from tests.server.fakes import make_output, make_report

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = 1
PARENT_ID = "b7ad6b7169203331"


@pytest.fixture
def trace():
    """Traces a record, and returns its span (None where it is not sampled) and the headers."""

    def run(record, *headers):
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        tracer, scope = Tracer(provider), {"headers": [(b"host", b"here"), *headers]}
        tracer.begin(record, scope)
        tracer.end(record)
        (span,) = exporter.get_finished_spans() or [None]
        return span, dict(scope["headers"])

    return run


def make_record(path="/v1/chat/completions", **fields) -> RequestRecord:
    return RequestRecord("POST", path, **{"status": 200, "is_complete": True} | fields)


def traceparent(flags: str) -> tuple[bytes, bytes]:
    return b"traceparent", f"00-{TRACE_ID}-{PARENT_ID}-{flags}".encode()


def test_the_span_is_the_callers_child_and_the_engines_parent(trace):
    record = make_record()
    span, headers = trace(record, traceparent("01"), (b"tracestate", b"vendor=1"))
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == record.trace_id == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert headers == {
        b"host": b"here",
        b"traceparent": f"00-{TRACE_ID}-{span.context.span_id:016x}-01".encode(),
        b"tracestate": b"vendor=1",
    }


def test_a_request_without_a_caller_begins_a_trace(trace):
    record = make_record()
    span, headers = trace(record)
    assert span.parent is None
    context, flags = headers[b"traceparent"].rsplit(b"-", 1)
    assert context.decode() == f"00-{record.trace_id}-{span.context.span_id:016x}"
    assert int(flags, 16) & SAMPLED


def test_what_the_caller_does_not_sample_is_not_sampled(trace):
    span, headers = trace(make_record(), traceparent("00"))
    assert span is None
    assert headers[b"traceparent"].endswith(b"-00")
    assert TRACE_ID.encode() in headers[b"traceparent"]


@pytest.mark.parametrize(
    "header", [b"", b"nonsense", b"00-\xff-1-01", b"\xff\\x", b"00-0-0-00" * 1000]
)
def test_a_wrong_header_begins_a_trace(trace, header):
    span, headers = trace(make_record(), (b"traceparent", header))
    assert span.parent is None
    assert int(headers[b"traceparent"][-2:], 16) & SAMPLED


def test_attributes_say_what_was_asked_and_answered(trace):
    record = make_record(model="smol", request_id="chatcmpl-1", is_stream=True)
    report = make_report({"head": "seq"}).begin_prompt()
    record.begin(report)
    output = make_output((0, [0.3, 0.7, 0.7, 1.0], "stop"), finished=True)
    record.read(output, is_first=True)
    report.read(output)
    span, _ = trace(record)
    assert span.name == "chat smol"
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "smol",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 4,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "adaptive.policy": "head",
        "adaptive.head": "seq",
        "adaptive.level": "sequence",
        "adaptive.report": "summary",
        "adaptive.temperature.mean": 0.675,
        "adaptive.temperature.min": 0.3,
        "adaptive.temperature.max": 1.0,
    }


def test_an_ordinary_request_has_no_adaptive_attributes(trace):
    span, _ = trace(make_record("/v1/completions"))
    assert span.name == "text_completion"
    assert not [name for name in span.attributes if name.startswith("adaptive.")]


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"status": 500}, StatusCode.ERROR, "500"),
        ({"error": {"type": "InternalServerError"}}, StatusCode.ERROR, "InternalServerError"),
        ({"status": None, "is_aborted": True}, StatusCode.ERROR, "client_disconnected"),
        ({"status": 400, "error": {"type": "BadRequestError"}}, StatusCode.UNSET, None),
    ],
)
def test_the_status_says_whether_it_went_wrong(trace, fields, status, error):
    span, _ = trace(make_record(**fields))
    assert span.status.status_code is status
    assert span.attributes.get("error.type") == error
