"""Loads, replaces and removes heads while the server runs, and overrides them all.

A head is read and verified here, then loaded by every worker alongside those that serve; only when
all of them have it does it take its name. A head that fails on the way changes nothing.
"""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import EllipsisType
from typing import Any, TypeVar

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from adaptive_head.checkpoint import HeadError, LoadedHead
from adaptive_head.library import HeadLibrary, LoadedHeads
from adaptive_head.operator_policy import make_constant
from adaptive_head.vllm import LOADING
from adaptive_head.vllm.heads import HeadVerifier
from adaptive_head.vllm.settings import check_head_name
from server.feature_probe import check_features
from server.heads import Canary, HeadRegistry, ServedHead
from server.metrics import AdaptiveMetrics

# Each poll is a pause of well below a millisecond between two of the engine's steps.
POLL_INTERVAL_S = 0.05
# For a disk that does not answer: other changes wait meanwhile.
MAX_LOADING_S = 120.0
# How often to look whether a head that is no longer served still has requests.
RELEASE_INTERVAL_S = 1.0
# Until a head that is gone leaves the metrics: longer than between any two scrapes.
SERIES_KEPT_S = 900.0
# No separator of paths, no name that a folder cannot have or that a label would need quotes for.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

logger = init_logger("vllm.adaptive")

T = TypeVar("T")


class HeadConflictError(Exception):
    """A change that another role of the head forbids (a 409). The message says what to do first."""


class WorkerError(Exception):
    """A verified head that a worker could not load (a 500)."""


class HeadControl:
    """Changes the heads of a running engine, one change at a time.

    Args:
        engine_client: vLLM's asynchronous one, with the workers behind it. It must be the only one
            of its engine: no other API process would hear of a change.
        registry: the heads that requests find.
        heads_dir: heads are loaded from below this folder only.
        admin_key: what a request for a change must show.
        max_temperature: the highest temperature of an override; None for no such bound.
    """

    def __init__(
        self,
        engine_client: EngineClient,
        registry: HeadRegistry,
        metrics: AdaptiveMetrics,
        heads_dir: Path,
        admin_key: str,
        max_temperature: float | None = None,
    ) -> None:
        self._engine_client = engine_client
        self._registry = registry
        self._metrics = metrics
        self._library = HeadLibrary(heads_dir)
        self._loaded = LoadedHeads()
        self.admin_key = admin_key
        self._verifier = HeadVerifier(engine_client.vllm_config)
        self._max_temperature = max_temperature
        self._lock = asyncio.Lock()
        self._writing = threading.Lock()
        self._num_snapshots = 0
        self._last_written = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def restore(self) -> None:
        """Repeat the changes of before a restart. What fails is logged, and tried again after the
        next one: no head on a disk keeps the server from starting."""
        try:
            self._loaded = await _in_thread(self._library.read_loaded)
        except (HeadError, TimeoutError) as error:
            logger.error("Neither heads nor the override are restored: %s", error)
        saved = self._loaded.model_copy(deep=True)
        if (override := saved.override) is not None:
            # Bounded, not refused: the switch must hold where the bound is lower than before.
            highest = self._max_temperature
            self._apply_override(override if highest is None else min(override, highest))
        for name, folder in saved.heads.items():
            await self._attempt(name, self.load(name, folder, is_default=False))
        for name, canary in saved.canaries.items():
            change = self.change(name, make_default=False, canary=Canary(*canary))
            await self._attempt(name, change)
        if saved.default is not None:
            await self._attempt(saved.default, self.change(saved.default, make_default=True))

    async def _attempt(self, name: str, change: Coroutine[Any, Any, object]) -> None:
        try:
            await change
        except Exception as error:
            logger.error("Head %s is not restored: %s", name, error)

    async def load(self, name: str, folder: str | None, *, is_default: bool) -> ServedHead:
        """Serve a head from the next request on, also instead of one of its name.

        Args:
            folder: below the heads' folder; the head's name where it is None.

        Raises:
            VLLMValidationError: the name or the folder is wrong, or the head cannot be used.
            WorkerError: a worker could not load it.
        """
        check_name(name)
        folder = folder or name
        async with self._lock:
            generation = self._registry.next_generation()
            try:
                loaded = await _in_thread(self._read, folder)
                await self._load_in_workers(name, generation, loaded.path, loaded.digest)
                head = ServedHead(name, generation, loaded.metadata)
                await check_features(self._engine_client, head)
            except BaseException as error:
                self._begin(self._forget(name, generation))
                if isinstance(error, HeadError):
                    raise VLLMValidationError(str(error), parameter="folder") from None
                if isinstance(error, TimeoutError):
                    raise WorkerError(str(error)) from None
                raise
            if (replaced := self._registry.by_name.get(name)) is not None:
                self._metrics.remove_head(name, replaced.metadata)
                self._begin(self._release(replaced))
            self._metrics.add_head(name, loaded.metadata)
            self._registry.put(head)
            if is_default or self._registry.default is None:
                self._registry.default = name
            self._loaded.heads[name] = folder
            if is_default:
                self._loaded.default = name
            await self._remember()
        logger.info("Head %s is now that of %s (generation %d)", name, loaded.path, generation)
        return head

    async def remove(self, name: str) -> None:
        """Stop serving a head. Requests already using it finish with it.

        Raises:
            VLLMNotFoundError: there is no such head.
            HeadConflictError: it is the default, or part of a canary.
        """
        async with self._lock:
            head = self._registry.find(name)
            if name == self._registry.default:
                raise HeadConflictError(
                    f"head {name!r} is the default; make another one that first"
                )
            for source, canary in self._registry.find_canaries(name).items():
                raise HeadConflictError(
                    f"head {canary.name!r} is the canary of head {source!r}; end that first"
                )
            self._registry.remove(name)
            self._metrics.remove_head(name, head.metadata)
            self._begin(self._release(head))
            self._loaded.heads.pop(name, None)
            await self._remember()
        logger.info("Head %s is no longer served", name)

    async def change(
        self, name: str, *, make_default: bool, canary: Canary | EllipsisType | None = ...
    ) -> None:
        """Change what a head is for: all that is asked, or nothing.

        Args:
            make_default: whether it gets the requests that name no head from now on.
            canary: answers a share of its requests; None, or a share of 0, ends that. Left out,
                it stays as it is.

        Raises:
            VLLMNotFoundError: there is no head `name`.
            VLLMValidationError: there is no such canary, or it is the head itself.
        """
        async with self._lock:
            self._registry.find(name)
            if not isinstance(canary, EllipsisType):
                self._set_canary(name, canary if canary and canary.percent else None)
                logger.info("The canary of head %s is now %s", name, canary)
            if make_default:
                self._registry.default = self._loaded.default = name
                logger.info("Head %s is now the default", name)
            await self._remember()

    async def set_override(self, temperature: float | None) -> None:
        """Give every adaptive request one constant temperature from the next one on; None ends it.

        Does not wait for a head that is being loaded.

        Raises:
            VLLMValidationError: the temperature is above the highest.
        """
        highest = self._max_temperature
        if temperature is not None and highest is not None and temperature > highest:
            raise VLLMValidationError(
                f"temperature: at most {highest:g} (--adaptive-max of the server), "
                f"got {temperature:g}",
                parameter="temperature",
            )
        self._apply_override(temperature)
        self._loaded.override = temperature
        await self._remember()

    def _apply_override(self, temperature: float | None) -> None:
        self._registry.override = None if temperature is None else make_constant(temperature)
        self._metrics.set_override(temperature is not None)
        if temperature is None:
            logger.info("Adaptive requests are no longer overridden")
        else:
            logger.info("Every adaptive request now gets temperature %g", temperature)

    def _set_canary(self, name: str, canary: Canary | None) -> None:
        others = self._registry.by_name.keys() - {name}
        if canary is not None and canary.name not in others:
            raise VLLMValidationError(
                f"the canary of {name!r} must be another loaded head "
                f"({', '.join(sorted(others)) or 'none is loaded'}), got {canary.name!r:.80}",
                parameter="canary.head",
            )
        if (ended := self._registry.canaries.get(name)) is not None:
            self._metrics.set_canary(name, ended.name, 0)
        self._loaded.canaries.pop(name, None)
        if canary is not None:
            self._metrics.set_canary(name, canary.name, canary.percent / 100)
            self._loaded.canaries[name] = canary.name, canary.percent
        self._registry.set_canary(name, canary)

    def _read(self, folder: str) -> LoadedHead:
        return self._verifier.load(self._library.find(folder), self._library.roots)

    async def _remember(self) -> None:
        """Write down what a restart is to repeat. The change stands where that fails."""
        self._num_snapshots += 1
        snapshot = self._loaded.model_copy(deep=True)
        try:
            await _in_thread(self._write, self._num_snapshots, snapshot)
        except OSError as error:
            logger.warning("This change will not survive a restart: %s", error)

    def _write(self, number: int, snapshot: LoadedHeads) -> None:
        """Write a snapshot unless a newer one is written; one thread at a time.

        Threads that nobody waits for any longer still write, in any order.
        """
        with self._writing:
            if number > self._last_written:
                self._library.write_loaded(snapshot)
                self._last_written = number

    async def _load_in_workers(self, name: str, generation: int, path: Path, digest: str) -> None:
        deadline = time.monotonic() + MAX_LOADING_S
        while True:
            states = await self._call_workers("add_head", name, generation, str(path), digest)
            for reason in set(states) - {LOADING, None}:
                raise WorkerError(f"a worker could not load head {name!r}: {reason}")
            if LOADING not in states:
                return
            if time.monotonic() > deadline:
                raise WorkerError(f"a worker has not read head {name!r} within {MAX_LOADING_S:g} s")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker of every data-parallel engine; their results."""
        # `collective_rpc` of the client itself returns those of the first engine only.
        core: Any = self._engine_client.engine_core
        # No timeout: vLLM would take a late reply for the answer to its next call.
        engines = await core.call_utility_all_async("collective_rpc", method, None, args, None)
        return [result for workers in engines for result in workers]

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, head: ServedHead) -> None:
        """Let the workers forget a head that is no longer served, once no request has it."""
        # First a pause: a background response holds it from a moment after its route has let go.
        await asyncio.sleep(RELEASE_INTERVAL_S)
        while head.num_holders:
            await asyncio.sleep(RELEASE_INTERVAL_S)
        await self._forget(head.name, head.generation)
        await asyncio.sleep(SERIES_KEPT_S)
        served = self._registry.by_name.get(head.name)
        if served is None or served.level != head.level:
            self._metrics.forget_head(head.name, head.level)

    async def _forget(self, name: str, generation: int) -> None:
        try:
            await self._call_workers("remove_head", name, generation)
        except Exception:
            # It costs memory until the restart that a broken engine needs anyway.
            logger.exception("The workers keep head %s, generation %d", name, generation)


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call what reads or writes the folder of heads.

    Raises:
        TimeoutError: the disk has not answered. It may still do so, and nobody waits for it.
    """
    try:
        return await asyncio.wait_for(asyncio.to_thread(function, *args), MAX_LOADING_S)
    except TimeoutError:
        raise TimeoutError(f"--heads-dir has not answered within {MAX_LOADING_S:g} s") from None


def check_name(name: str) -> None:
    """Raise VLLMValidationError for a name that a head cannot have."""
    if not _NAME.fullmatch(name):
        raise VLLMValidationError(
            "name must be 1 to 64 letters, digits, dots, dashes or underscores, the first of them "
            f"a letter or digit, got {name!r:.80}",
            parameter="name",
        )
    try:
        check_head_name(name)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="name") from None
