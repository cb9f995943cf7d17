"""An engine without a model: it answers from a table, in an order of its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adaptive_head.lpo.engine import Generation, GenerationRequest
from adaptive_head.lpo.experiment import EngineConfig

Answer = Callable[[GenerationRequest], str]


class FakeEngine:
    """Answers with `answer(request)`, a token a word; the last of each eight requests first."""

    def __init__(self, answer: Answer, fail_after: int | None = None) -> None:
        self.answer = answer
        self.fail_after = fail_after
        self.requests: list[GenerationRequest] = []
        self.num_starts = 0
        self.is_open = False

    @contextmanager
    def open(
        self, model: Path | str, config: EngineConfig, heads: Mapping[str, Path]
    ) -> Iterator["FakeEngine"]:
        self.num_starts += 1
        self.is_open = True
        try:
            yield self
        finally:
            self.is_open = False

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Generation]:
        waiting: list[GenerationRequest] = []
        for request in requests:
            waiting.append(request)
            if len(waiting) == 8:
                yield from self._answer(waiting)
        yield from self._answer(waiting)

    def close(self) -> None:
        self.is_open = False

    def _answer(self, waiting: list[GenerationRequest]) -> Iterator[Generation]:
        while waiting:
            request = waiting.pop()
            if self.fail_after is not None and len(self.requests) >= self.fail_after:
                raise KeyboardInterrupt
            self.requests.append(request)
            text = self.answer(request)
            num = len(text.split())
            fixed = request.temperature
            temperature = fixed if isinstance(fixed, float | int) else 0.4
            yield Generation(
                request.id,
                tuple(range(num)),
                (float(temperature),) * num,
                text,
                "stop",
                (-0.5,) * num,
            )
