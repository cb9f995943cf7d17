"""Processes that tests wait for: two at a time, begun before the first test.

An engine's start keeps one core busy for most of a minute, and light tests leave another one idle.
So a module with such processes has a function `begin_processes`. It is called before the first test
of the session with what runs them, unless the session has a few tests only. Processes that slow
tests alone wait for are begun by `begin_slow_processes`, if the session has one of these tests.
"""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

NUM_AT_ONCE = 2
# A process that takes longer hangs. Most take a minute or two, and far longer on a busy machine.
HANG_S = 1500
# Whoever waits for one may wait for one that runs before it, too.
WAIT_S = 2 * HANG_S
# Whoever runs fewer tests does not want to wait for all processes of their modules.
MIN_TESTS = 4


class Background:
    """Calls functions that run processes in other threads, in the order in which they are begun.

    Attributes:
        folder: for their files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(NUM_AT_ONCE)
        self._calls: dict[Hashable, Future] = {}

    def begin(self, key: Hashable, function: Callable, *arguments: object) -> None:
        """Call a function when its turn comes, if none was begun by this key.

        Other tests run meanwhile: it must not depend on `os.environ` or the working directory, and
        starts processes by `leftovers.run`.
        """
        if key not in self._calls:
            self._calls[key] = self._pool.submit(function, *arguments)

    def wait(self, key: Hashable) -> Any:
        """What a function returned that was begun by this key, or its error."""
        return self._calls[key].result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="session")
def background(tmp_path_factory) -> Iterator[Background]:
    background = Background(tmp_path_factory.mktemp("background"))
    yield background
    background.close()


@pytest.fixture(scope="session", autouse=True)
def begin_all(request, background) -> None:
    items = request.session.items
    if len(items) < MIN_TESTS:
        return
    slow = [item.module for item in items if item.get_closest_marker("slow")]
    for name, modules in (
        ("begin_processes", [item.module for item in items]),
        ("begin_slow_processes", slow),
    ):
        for module in dict.fromkeys(modules):
            if hasattr(module, name):
                getattr(module, name)(background)
