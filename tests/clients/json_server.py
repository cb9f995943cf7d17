"""The mock server, with answers that are JSON and end by themselves a token before they must."""

import sys

from vllm.v1.engine import EngineCoreRequest

from loadtests import mock_engine
from loadtests.cli import app

# An object, and blanks for as long as an answer lasts.
TEXT = '{"name": "Paris"}' + "\n" * 200


def install() -> None:
    add_request = mock_engine.MockCore.add_request_async

    async def add_whole(self: mock_engine.MockCore, request: EngineCoreRequest) -> None:
        await add_request(self, request)
        name = request.request_id
        answer = self._running.get(name) or self._waiting[name]
        # So that the last chunk of a stream has no text.
        answer.num_tokens = max(1, answer.params.max_tokens - 1)

    mock_engine.TEXT = TEXT
    mock_engine.MockCore.add_request_async = add_whole


if __name__ == "__main__":
    install()
    app(sys.argv[1:])
