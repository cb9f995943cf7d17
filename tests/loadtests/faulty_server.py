"""The mock server, with the fault that a file names: mistakes that the load tests must find.

Usage: FAULT_FILE mock-server OPTION...
"""

import asyncio
import sys
from pathlib import Path

from fastapi import Request

from loadtests.cli import app

HESITATION_S = 2.5


def install(fault_file: Path) -> None:
    """Put faults into the front end and the mock engine, each on while the file has its name.

    - foreign: temperatures that no head has
    - misaligned: one temperature less than tokens
    - uncounted: /metrics miss a token
    - deaf: the engine does not hear that a client has left
    - hesitant: it takes longer to say what it serves than a short run lasts
    """
    from adaptive_head.vllm.wire import DecisionReader
    from loadtests.mock_engine import MockCore
    from server import routes
    from server.metrics import AdaptiveMetrics
    from server.report import ChoiceReport

    def is_on(fault: str) -> bool:
        return fault_file.read_text() == fault

    read, take_ready = DecisionReader.read, ChoiceReport.take_ready
    count_tokens, abort = AdaptiveMetrics.count_tokens, MockCore.abort_requests_async
    show_models = routes.show_models

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

    async def hesitant_show_models(raw_request: Request):
        await asyncio.sleep(HESITATION_S * is_on("hesitant"))
        return await show_models(raw_request)

    routes.show_models = hesitant_show_models
    DecisionReader.read, ChoiceReport.take_ready = wrong_read, wrong_take_ready
    AdaptiveMetrics.count_tokens, MockCore.abort_requests_async = wrong_count_tokens, wrong_abort


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    app(sys.argv[2:])
