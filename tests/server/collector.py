"""A receiver of traces: OTLP over HTTP, as `--otlp-traces-endpoint` wants it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TIMEOUT_S = 120
# What the server needs in its environment to send here, soon.
ENVIRONMENT = {
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
}


class Collector:
    """The spans that have arrived, on `endpoint`."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}/v1/traces"
        self.spans: list[Span] = []

    def wait_for(self, name: str, **attributes: Any) -> Span:
        """The first span with this name and these attributes, `_` in the place of a dot."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for span in list(self.spans):
                found = read_attributes(span)
                wanted = {key.replace("__", "."): value for key, value in attributes.items()}
                if span.name == name and wanted.items() <= found.items():
                    return span
            time.sleep(0.1)
        raise AssertionError(f"no span {name} {attributes}: {[span.name for span in self.spans]}")


def read_attributes(span: Span) -> dict[str, Any]:
    """A span's attributes, lists as tuples."""
    found = {}
    for attribute in span.attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        if kind == "array_value":
            value = tuple(item.string_value for item in value.values)
        found[attribute.key] = value
    return found


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            request = ExportTraceServiceRequest.FromString(content)
            collector.spans += [
                span
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        collector = Collector(receiver.server_port)
        thread = Thread(target=receiver.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            receiver.shutdown()
            thread.join()
