"""The mock server, which also writes down how many asyncio tasks it has.

Usage: TASKS_FILE mock-server OPTION...
"""

import asyncio
import sys
from pathlib import Path

from loadtests.cli import app

_PAUSE_S = 0.2


def watch_tasks(file: Path) -> None:
    """Let the mock engine write the number of its process's tasks into a file, again and again."""
    from loadtests.mock_engine import MockCore

    stock_init = MockCore.__init__

    async def write() -> None:
        while True:
            # Whole at any time: a reader must not find half of it.
            part = file.with_suffix(".part")
            part.write_text(str(len(asyncio.all_tasks())))
            part.replace(file)
            await asyncio.sleep(_PAUSE_S)

    def init(self: MockCore, *args: object) -> None:
        stock_init(self, *args)
        self.writer = asyncio.get_running_loop().create_task(write())

    MockCore.__init__ = init


if __name__ == "__main__":
    watch_tasks(Path(sys.argv.pop(1)))
    app()
