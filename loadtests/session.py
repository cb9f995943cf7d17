"""A run from its first user to its last, and what must hold at its end."""

from collections.abc import Iterator
from itertools import count

import numpy as np

from loadtests.accounts import Accounts, close_accounts
from loadtests.checks import WrongAnswerError
from loadtests.client import REQUEST, TTFT
from loadtests.scenario import Scenario
from loadtests.target import Target, TargetError, find_target, read_counters


class Session:
    """What the users of a run share."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._target: Target | None = None
        self._forget()

    def _forget(self) -> None:
        self.accounts = Accounts()
        self.summary = ""
        self._numbers = count()
        self._before: dict[str, float] = {}
        self._ttfts: list[float] = []
        self._num_requests = self._num_failed = self._num_wrong = 0

    @property
    def is_running(self) -> bool:
        """Whether the server has been found and its run has not ended."""
        return self._target is not None

    @property
    def target(self) -> Target:
        """The server; only during a run."""
        assert self._target is not None
        return self._target

    def begin(self, url: str) -> None:
        """Find the server, and remember what it has counted so far.

        Raises:
            TargetError: it cannot be load-tested.
        """
        self._forget()
        self._target = None
        target = find_target(url, self.scenario.styles)
        self._before = read_counters(target.url)
        self._target = target

    def number_user(self) -> int:
        """A number that no other user of the run has."""
        return next(self._numbers)

    def hear(
        self, request_type: str, response_time: float, exception: Exception | None, **_: object
    ) -> None:
        """A listener for locust's `request` event."""
        if request_type == TTFT:
            self._ttfts.append(response_time / 1000)
        if request_type != REQUEST:
            return
        self._num_requests += 1
        if isinstance(exception, WrongAnswerError):
            self._num_wrong += 1
        elif exception is not None:
            self._num_failed += 1

    def end(self) -> list[str]:
        """Wait until the server is idle, and see whether all is as it must be.

        Returns:
            A sentence for each thing that is not.
        """
        if self._target is None:
            return ["the run was over before the server had said what it serves"]
        url, self._target = self._target.url, None
        wrong = list(self.find_broken_limits())
        max_wait = self.scenario.limits.max_idle_wait
        try:
            wrong_tokens, self.summary = close_accounts(self.accounts, url, self._before, max_wait)
        except TargetError as error:
            return [*wrong, f"the server did not survive the run: {error}"]
        return wrong + wrong_tokens

    def find_broken_limits(self) -> Iterator[str]:
        limits = self.scenario.limits
        if not self._num_requests:
            yield "no request came to its end"
        if self._num_wrong:
            yield f"{self._num_wrong} of {self._num_requests} answers were wrong"
        if self._num_failed > limits.max_failed * self._num_requests:
            yield (
                f"{self._num_failed} of {self._num_requests} requests failed, and "
                f"{limits.max_failed:.2%} may (limits.max_failed)"
            )
        if limits.max_ttft is not None and self._ttfts:
            ttft = float(np.quantile(self._ttfts, 0.95))
            if ttft > limits.max_ttft:
                yield (
                    f"5 % of the streams took {ttft:.2f} s or more to begin, and may take "
                    f"{limits.max_ttft:g} (limits.max_ttft)"
                )
