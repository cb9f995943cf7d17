"""The mock server, with the fault that a file names: mistakes that the load tests must find.

Usage: FAULT_FILE mock-server OPTION...
"""

import sys
from pathlib import Path

from loadtests.cli import app


def install(fault_file: Path) -> None:
    """Put faults into the front end and the mock engine, each on while the file has its name.

    - foreign: temperatures that no head has
    - misaligned: one temperature less than tokens
    - uncounted: /metrics miss a token
    - deaf: the engine does not hear that a client has left
    """
    from adaptive_head.vllm.wire import DecisionReader
    from loadtests.mock_engine import MockCore
    from server.metrics import AdaptiveMetrics
    from server.report import ChoiceReport

    def is_on(fault: str) -> bool:
        return fault_file.read_text() == fault

    read, take_ready = DecisionReader.read, ChoiceReport.take_ready
    count_tokens, abort = AdaptiveMetrics.count_tokens, MockCore.abort_requests_async

    def wrong_read(self, output):
        wrong_by = 1000 * is_on("foreign")
        return [
            (decision._replace(temperature=decision.temperature + wrong_by), count)
            for decision, count in read(self, output)
        ]

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

    DecisionReader.read, ChoiceReport.take_ready = wrong_read, wrong_take_ready
    AdaptiveMetrics.count_tokens, MockCore.abort_requests_async = wrong_count_tokens, wrong_abort


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    app(sys.argv[2:])
