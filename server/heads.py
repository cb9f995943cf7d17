"""The heads that the server answers with: which, by what name, and who takes a canary's share."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from vllm.exceptions import VLLMNotFoundError

from adaptive_head.abstention import Abstention
from adaptive_head.checkpoint import HeadMetadata
from adaptive_head.options import AdaptiveRequest, Level, Options, Selection, resolve_abstention


@dataclass(eq=False)
class ServedHead:
    """One head in the engine.

    A replaced head and its successor serve side by side until the last request of the old one ends.

    Attributes:
        generation: 0 for the heads of the start, and a new number for each that comes later.
        num_holders: how many requests have it that are not over; see `Report.hold`.
    """

    name: str
    generation: int
    metadata: HeadMetadata
    num_holders: int = field(default=0, init=False)

    @property
    def level(self) -> Level:
        return self.metadata.level

    @property
    def select(self) -> Selection:
        return self.metadata.select

    @property
    def abstain(self) -> Abstention | None:
        return self.metadata.abstain


@dataclass(frozen=True)
class Canary:
    """The head that answers `percent` of another one's requests."""

    name: str
    percent: float


def choose_default(heads: Mapping[str, HeadMetadata]) -> str | None:
    """Choose the head of requests that name none; None if there are no heads.

    Trained heads come first, then those that have not failed the gate, then the order given.
    """

    def rank(name: str) -> tuple[bool, bool]:
        return not heads[name].trained, heads[name].gate == "failed"

    return min(heads, key=rank, default=None)


class HeadRegistry:
    """The heads by name. Each change is one assignment: a request sees all of it or none.

    Args:
        heads: those that the engine has loaded at its start.
        default: the head of requests that name none.

    Attributes:
        override: the options, of a constant, that answer every request instead of its own; None
            while that is off.
    """

    def __init__(self, heads: Mapping[str, HeadMetadata], default: str | None = None) -> None:
        self._heads: dict[str, ServedHead] = {}
        self._canaries: dict[str, Canary] = {}
        self._last_generation = 0
        self.default = default
        self.override: Options | None = None
        for name, metadata in heads.items():
            self._heads[name] = ServedHead(name, 0, metadata)

    def __len__(self) -> int:
        return len(self._heads)

    def __iter__(self) -> Iterator[ServedHead]:
        return iter(self._heads.values())

    @property
    def by_name(self) -> Mapping[str, ServedHead]:
        return MappingProxyType(self._heads)

    @property
    def canaries(self) -> Mapping[str, Canary]:
        """The canaries by the heads whose requests they share."""
        return MappingProxyType(self._canaries)

    @property
    def override_temperature(self) -> float | None:
        """The temperature that answers every request; None while that is off."""
        return None if self.override is None else self.override.parameters[0]

    def find(self, name: str) -> ServedHead:
        """The head of that name.

        Raises:
            VLLMNotFoundError: there is none.
        """
        if (head := self._heads.get(name)) is None:
            loaded = ", ".join(sorted(self._heads)) or "none"
            raise VLLMNotFoundError(f"no head {name!r:.80}; loaded: {loaded}")
        return head

    def next_generation(self) -> int:
        """A number that no head has had."""
        self._last_generation += 1
        return self._last_generation

    def put(self, head: ServedHead) -> None:
        """Serve a head from the next request on, instead of one of its name."""
        self._heads = self._heads | {head.name: head}

    def remove(self, name: str) -> None:
        """Stop serving a head. It may be neither the default nor part of a canary."""
        assert name != self.default and not self.find_canaries(name)
        self._heads = {other: head for other, head in self._heads.items() if other != name}

    def set_canary(self, name: str, canary: Canary | None) -> None:
        """Let another head answer a share of a head's requests, or none."""
        others = {other: found for other, found in self._canaries.items() if other != name}
        self._canaries = others | {name: canary} if canary else others

    def find_canaries(self, name: str) -> dict[str, Canary]:
        """The canaries that a head is part of, as the one or the other."""
        return {
            head: canary for head, canary in self._canaries.items() if name in (head, canary.name)
        }

    def choose(
        self, options: Options, request: AdaptiveRequest, seed: int | None
    ) -> tuple[Options, ServedHead | None]:
        """Decide which head answers a request.

        Args:
            options: resolved against `by_name`.
            request: completed by the operator's policy. A canary of another level, or without a
                fallback where `abstain` is true, does not answer it.
            seed: the request's own: the same seed is answered by the same head.

        Returns:
            The options with that head's name, generation and own ways, and the head, which the
            request must hold until it is over; None for a policy without one. `override` itself
            where there is one.
        """
        if self.override is not None:
            return self.override, None
        if options.policy != "head":
            return options, None
        head = self._heads[options.name]
        if (canary := self._canaries.get(head.name)) is not None:
            other = self._heads[canary.name]
            draw = (
                random.random() if seed is None else random.Random(f"{head.name} {seed}").random()
            )
            has_level = request.level in (None, other.level)
            can_answer = has_level and (other.abstain is not None or not request.abstain)
            if 100 * draw < canary.percent and can_answer:
                head = other
        if (head.name, head.generation) != (options.name, options.generation):
            options = replace(
                options,
                name=head.name,
                level=head.level,
                select=request.select or head.select,
                parameters=resolve_abstention(request, head.name, head),
                generation=head.generation,
            )
        return options, head
