"""The progress bar of everything that generates."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TokenProgress:
    """Responses done, tokens a second and the time left, on stderr."""

    def __init__(self, name: str, num_responses: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self._bar = self._progress.add_task(name, total=num_responses, rate=0.0)
        self.num_tokens = 0
        self._start = time.monotonic()

    def advance(self, num_tokens: int) -> None:
        """One response of so many tokens is done."""
        self.num_tokens += num_tokens
        rate = self.num_tokens / max(self.num_seconds, 1e-9)
        self._progress.update(self._bar, advance=1, rate=rate)

    @property
    def num_seconds(self) -> float:
        return time.monotonic() - self._start

    def __enter__(self) -> Self:
        self._progress.start()
        self._start = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
