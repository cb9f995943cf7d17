"""Responses from many vLLM engines: one in each of several Ray actors, on one machine or many."""

import os
import socket
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive_head.lpo.engine import Generation, GenerationRequest, LocalEngine
from adaptive_head.lpo.experiment import EngineConfig

# How long a replica computes before it says what has finished, in seconds: long beside the
# milliseconds of a call, short beside a response.
SLICE = 0.2
# Calls that a replica has before it: it begins the next one while the driver reads the last.
CALLS_AHEAD = 2
# Requests that a replica has before it, for each that it runs at once: a slot that becomes free
# between two calls has a request waiting for it.
REQUESTS_AHEAD = 2
# In seconds.
CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 20.0


class RayEngine:
    """`num_replicas` engines, each an actor with the GPUs of its tensor and pipeline ranks.

    Without `ray_address` Ray starts on this machine and ends with the engine. With one, such as
    `10.0.0.1:6379`, the engine joins the cluster that `ray start` made, each of whose machines
    needs this package with its `ray` extra, the model and the folders of the heads under the paths
    that they have here, and its environment variables (`HF_HOME`, `VLLM_*`) set before `ray start`.

    All ranks of a replica are on one machine: vLLM starts them as processes of the actor. Where no
    machine has a GPU, replicas share the cores.

    A request's seed goes along with it, so that responses do not depend on which replica, or how
    many, compute them, up to what other batches do to the last bits.
    """

    def __init__(self, model: Path | str, config: EngineConfig, heads: Mapping[str, Path]) -> None:
        """Start the replicas, and wait until all are ready.

        Raises:
            ValueError: Ray is not installed, no cluster is there or it is too small, or vLLM
                refuses an option.
            RuntimeError: a replica died.
        """
        self._ray = import_ray()
        self._max_requests = REQUESTS_AHEAD * config.max_num_seqs
        self._seats: list[_Seat] = []
        self._is_owner = not self._ray.is_initialized()
        if self._is_owner:
            connect(self._ray, config.ray_address)
        try:
            self._start_replicas(model, config, heads)
        except BaseException:
            self.close()
            raise

    def _start_replicas(
        self, model: Path | str, config: EngineConfig, heads: Mapping[str, Path]
    ) -> None:
        resources = find_resources(self._ray.nodes(), config)
        actor_class = self._ray.remote(**resources)(Replica)
        self._seats = [
            _Seat(f"replica {number}", actor_class.remote())
            for number in range(config.num_replicas)
        ]
        local = config.model_copy(
            update={"backend": "local", "num_replicas": 1, "ray_address": None}
        )
        # Actors have working folders of their own.
        model = Path(model).resolve() if Path(model).is_dir() else model
        heads = {name: folder.resolve() for name, folder in heads.items()}
        places = [seat.actor.start.remote(model, local, heads) for seat in self._seats]
        for seat, place in zip(self._seats, places, strict=True):
            seat.name += f" ({self._get(seat, place)})"

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Generation]:
        """See `Engine`.

        Raises:
            ValueError: vLLM refuses a request.
            RuntimeError: a replica died. The message names it.
        """
        waiting = iter(requests)
        finished: list[Generation] = []
        try:
            while True:
                # Before the caller takes its time over what has finished.
                self._hand_out(waiting)
                yield from finished
                if not any(seat.calls for seat in self._seats):
                    return
                finished = self._collect()
        finally:
            self._abandon()

    def _hand_out(self, waiting: Iterator[GenerationRequest]) -> None:
        """Send every replica that takes a further call its share of the requests."""
        free = [seat for seat in self._seats if len(seat.calls) < CALLS_AHEAD]
        shares: list[list[GenerationRequest]] = [[] for _ in free]
        while free:
            least = min(range(len(free)), key=lambda index: free[index].num_requests)
            if free[least].num_requests >= self._max_requests:
                break
            if (request := next(waiting, None)) is None:
                break
            shares[least].append(request)
            free[least].num_requests += 1
        for seat, share in zip(free, shares, strict=True):
            while seat.num_requests and len(seat.calls) < CALLS_AHEAD:
                seat.calls.append(seat.actor.advance.remote(share))
                share = []

    def _collect(self) -> list[Generation]:
        """Wait for a call to return, then read all that have: a slow reader starves no replica."""
        seats = {seat.calls[0]: seat for seat in self._seats if seat.calls}
        self._ray.wait(list(seats), num_returns=1)
        ready, _ = self._ray.wait(list(seats), num_returns=len(seats), timeout=0)
        finished: list[Generation] = []
        for call in ready:
            seat = seats[call]
            seat.calls.popleft()
            answers = self._get(seat, call)
            seat.num_requests -= len(answers)
            finished += answers
        return finished

    def _get(self, seat: "_Seat", call: Any) -> Any:
        """What a call returned, or its error in terms of the replica."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.RayTaskError as error:
            kind = ValueError if isinstance(error.cause, ValueError) else RuntimeError
            raise kind(f"{seat.name}: {error.cause}") from error
        except errors.RayError as error:
            raise RuntimeError(
                f"{seat.name} died; its log is in /tmp/ray/session_latest/logs of that machine: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _abandon(self) -> None:
        for seat in self._seats:
            if seat.calls or seat.num_requests:
                seat.actor.abandon.remote()
                seat.calls.clear()
                seat.num_requests = 0

    def close(self) -> None:
        """See `Engine`."""
        if not self._ray.is_initialized():
            return
        # An engine that closes ends the processes of its ranks; one that is killed leaves that to
        # them.
        closings = [seat.actor.close.remote() for seat in self._seats]
        if closings:
            self._ray.wait(closings, num_returns=len(closings), timeout=CLOSE_TIMEOUT)
        for seat in self._seats:
            self._ray.kill(seat.actor)
        self._seats = []
        if self._is_owner:
            self._ray.shutdown()


@dataclass
class _Seat:
    """A replica as the driver sees it.

    Args:
        calls: of `advance` whose results were not read, the oldest first.
        num_requests: sent and not answered.
    """

    name: str
    actor: Any
    calls: deque[Any] = field(default_factory=deque)
    num_requests: int = 0


class Replica:
    """What runs in an actor: an engine that computes in slices.

    One call at a time and no thread of its own: CUDA's current device and the threads of OpenMP
    belong to the thread that started the engine.
    """

    def start(self, model: Path | str, config: EngineConfig, heads: Mapping[str, Path]) -> str:
        """Start the engine; returns which process on which machine it is in.

        Not in `__init__`, whose errors reach the driver as the text of a dead actor only.
        """
        self._inbox = Inbox()
        self._engine = LocalEngine(model, config, heads)
        self._answers = self._answer()
        return f"process {os.getpid()} on {socket.gethostname()}"

    def advance(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Take further requests, compute for a slice, return what finished in it.

        It returns earlier when nothing is left to do, and later when nothing has finished.
        """
        self._inbox.extend(requests)
        finished: list[Generation] = []
        end = time.monotonic() + SLICE
        while not finished or time.monotonic() < end:
            generation = next(self._answers, None)
            if generation is None:
                self._answers = self._answer()
                break
            finished.append(generation)
        return finished

    def abandon(self) -> None:
        """Forget all requests."""
        self._inbox.clear()
        self._answers.close()
        self._answers = self._answer()

    def _answer(self) -> Generator[Generation, None, None]:
        """What becomes of the inbox, until nothing is left to do."""
        yield from self._engine.generate(self._inbox)

    def close(self) -> None:
        """End the engine."""
        self.abandon()
        self._engine.close()


class Inbox(deque[GenerationRequest]):
    """Requests that are there now. It ends for the moment when it is empty, so that the engine
    goes on with those that run rather than wait, and asks again."""

    def __iter__(self) -> Iterator[GenerationRequest]:
        return self

    def __next__(self) -> GenerationRequest:
        if not self:
            raise StopIteration
        return self.popleft()


def import_ray() -> Any:
    """The module `ray`; ValueError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray announces at every start that it will no longer hide GPUs from who reserves none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Else its processes give way to all others, and a replica that waits for a core idles its GPU.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError:
        raise ValueError(
            "the backend ray needs Ray: pip install 'adaptive-head-server[ray]'"
        ) from None
    return ray


def connect(ray: Any, address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine; ValueError if none is there."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Requests and responses are small. The default would reserve a third of the memory.
        ray.init(address="local", include_dashboard=False, object_store_memory=1 << 28, **quiet)
        return
    host, _, port = address.rpartition(":")
    try:
        # Ray itself goes on trying for many minutes.
        if port.isdigit() and "//" not in host:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
        ray.init(address=address, **quiet)
    except OSError as error:
        raise ValueError(f"ray_address: no Ray cluster answers at {address}: {error}") from error


def find_resources(nodes: Iterable[Mapping[str, Any]], config: EngineConfig) -> dict[str, float]:
    """What an actor reserves: the GPUs of all its ranks, or its share of the cores.

    GPUs that somebody else has reserved are waited for.

    Args:
        nodes: as `ray.nodes()` describes them.

    Raises:
        ValueError: the cluster is too small.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [int(resources.get("GPU", 0)) for resources in alive]
    if any(gpus):
        options = config.options
        needed = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
        if sum(count // needed for count in gpus) < config.num_replicas:
            raise ValueError(
                f"num_replicas: {config.num_replicas} with {needed} GPUs each, all on one machine, "
                f"do not fit the cluster's machines of {', '.join(map(str, gpus))} GPUs"
            )
        return {"num_gpus": needed}
    cores = [int(resources.get("CPU", 0)) for resources in alive]
    for share in range(max(cores), 0, -1):
        if sum(count // share for count in cores) >= config.num_replicas:
            return {"num_cpus": share}
    raise ValueError(
        f"num_replicas: {config.num_replicas} do not fit the cluster's {sum(cores)} cores"
    )
