"""The mock server, with the fault that a file names: mistakes that the load tests must find.

Usage: FAULT_FILE OPTION...
"""

import sys
from pathlib import Path

from loadtests.mock_server import serve

FAULTS: dict[str, str] = {
    "misaligned": "the temperatures that a client receives lack one",
    "foreign": "a temperature that no head has",
    "uncounted": "/metrics miss an adaptive token",
    "deaf": "the engine does not hear that a client has left",
}


def install(fault_file: Path) -> None:
    """Put the faults into the front end and the mock engine; without a name in the file they
    leave everything as it is."""
    from loadtests.mock_engine import MockCore
    from server.metrics import AdaptiveMetrics
    from server.report import ChoiceReport

    def is_on(fault: str) -> bool:
        return fault_file.read_text() == fault

    add, take_ready = ChoiceReport.add, ChoiceReport.take_ready
    count_tokens, abort = AdaptiveMetrics.count_tokens, MockCore.abort_requests_async

    def wrong_add(self, micros):
        add(self, [micro + 1000 for micro in micros] if is_on("foreign") else micros)

    def wrong_take_ready(self):
        return take_ready(self)[is_on("misaligned") :]

    def wrong_count_tokens(self, options, num_tokens):
        if is_on("uncounted"):
            micro = next(iter(num_tokens))
            num_tokens = {**num_tokens, micro: num_tokens[micro] - 1}
        count_tokens(self, options, num_tokens)

    async def wrong_abort(self, request_ids):
        if not is_on("deaf"):
            await abort(self, request_ids)

    ChoiceReport.add, ChoiceReport.take_ready = wrong_add, wrong_take_ready
    AdaptiveMetrics.count_tokens, MockCore.abort_requests_async = wrong_count_tokens, wrong_abort


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    serve(sys.argv[2:], ttft=0.01, itl=0.005, jitter=0.5, is_stock=False)
