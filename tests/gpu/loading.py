"""Heads that come and go while steps run; and steps that wait for nothing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from adaptive_head.head import AdaptiveHead
from adaptive_head.options import Options
from adaptive_head.vllm.selector_v2 import DeviceSelector
from tests.gpu.steps import Record, Walk, can_capture, make_selector, run_step
from tests.gpu.texts import (
    Texts,
    find_tolerances,
    list_options,
    make_heads,
    make_options,
    make_texts,
    pick_sizes,
    run_plain,
)

DTYPE = torch.bfloat16
MAX_ROWS = 128
NUM_ROUNDS = 2


class Scene:
    """Requests of two heads, and what each of their tokens must get.

    Attributes:
        requests: by the head's name; "" for ordinary ones.
    """

    def __init__(self, device: str) -> None:
        where = torch.device(device)
        sizes, options = pick_sizes(where), list[Options | None]([None])
        for name, level, select in product(
            ("first", "second"), ("token", "sequence"), ("argmax", "sample")
        ):
            options.append(make_options("head", name=name, level=level, select=select))
        heads = make_heads(sizes)
        self.texts: Texts = make_texts(heads, options, sizes, DTYPE, where)
        expected, self.counts = run_plain(self.texts, heads)
        self.record = Record(expected, find_tolerances(options, is_coarse=True))
        self.requests: dict[str, list[int]] = {"": [], "first": [], "second": []}
        for request, one in enumerate(options):
            self.requests["" if one is None else one.name].append(request)

    def make_selector(self, *names: str) -> DeviceSelector:
        """A selector that has these heads."""
        return make_selector(self.texts, can_capture(self.texts.device), MAX_ROWS, names)

    def step(self, walk: Walk) -> None:
        """Lead every request one token further."""
        step = walk.prepare([walk.place(request) for request in walk.unfinished])
        self.record.add(step, run_step(walk.selector, step))

    def serve(self, selector: DeviceSelector, name: str) -> None:
        """Lead the requests of one head, and the ordinary ones, from begin to end."""
        walk = Walk(self.texts, selector)
        walk.admit(self.requests[name] + self.requests[""])
        while walk.unfinished:
            self.step(walk)


def load_between_steps(device: str) -> dict[str, Any]:
    """A head is loaded and removed between two steps of another one's requests, without waiting
    for them, while a thread copies from the device as vLLM's does."""
    scene = Scene(device)
    selector = scene.make_selector("first")
    walk = Walk(scene.texts, selector)
    walk.admit(scene.requests["first"] + scene.requests[""])
    scene.step(walk)
    with _copying(scene.texts.device):
        selector.add_head("second", 0, scene.texts.networks["second"])
        scene.step(walk)
        walk.admit(scene.requests["second"])
        while walk.unfinished:
            scene.step(walk)
        # Between two steps of a second round of the first head's requests.
        again = Walk(scene.texts, selector, seed=1)
        again.admit(scene.requests["first"])
        scene.step(again)
        assert selector.count_choices()[1].counts == scene.counts[1].counts
        selector.remove_head("second", 0)
        while again.unfinished:
            scene.step(again)
    return scene.record.compare()


def load_after_last(device: str) -> dict[str, Any]:
    """A head is loaded where there was none before, and after the last one was removed."""
    scene = Scene(device)
    selector = scene.make_selector()
    for _ in range(NUM_ROUNDS):
        for name in ("first", "second"):
            selector.add_head(name, 0, scene.texts.networks[name])
            scene.serve(selector, name)
            selector.remove_head(name, 0)
    return scene.record.compare() | {"rounds": NUM_ROUNDS}


class BrokenHead(AdaptiveHead):
    """A head whose graph cannot be captured: by an error, or by waiting for the device."""

    waits = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = super().forward(hidden)
        if torch.cuda.is_current_stream_capturing():
            if not self.waits:
                raise RuntimeError("this head is broken")
            scores.sum().item()
        return scores


class WaitingHead(BrokenHead):
    """As above; CUDA itself ends the capture."""

    waits = True


BROKEN_HEADS = (BrokenHead, WaitingHead)


def load_after_failure(device: str) -> dict[str, Any]:
    """A head is loaded after another one's capture has failed: where there was none, and next to
    one that serves, which goes on."""
    scene = Scene(device)
    good = scene.texts.networks["second"]
    messages = []
    for kind, names in product(BROKEN_HEADS, ((), ("first",))):
        selector = scene.make_selector(*names)
        broken = kind.from_weights(good.config, good.state_dict())
        try:
            selector.add_head("broken", 0, broken)
        except RuntimeError as error:
            messages.append(str(error).split("\n")[0][:60])
        else:
            raise AssertionError(f"{kind.__name__} was captured: this check cannot fail")
        assert not selector.has_head("broken", 0)
        _check_allocator(scene.texts.device)
        for name in names:
            scene.serve(selector, name)
        selector.add_head("second", 0, good)
        scene.serve(selector, "second")
    return scene.record.compare() | {"errors": sorted(set(messages))}


def _check_allocator(device: torch.device) -> None:
    """Memory that two streams have used comes back. While a capture is under way it does not."""
    side = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    num_bytes = 64 << 20
    for _ in range(12):
        block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        block.record_stream(side)
        del block
        torch.cuda.synchronize()
    grown = torch.cuda.memory_reserved() - before
    assert grown <= 3 * num_bytes, f"the allocator keeps what was freed: {grown >> 20} MiB"


def step_unsynchronised(device: str) -> dict[str, Any]:
    """No step, and nothing that happens between steps, waits for the device."""
    where = torch.device(device)
    # All steps are prepared beforehand: a small vocabulary.
    sizes = replace(pick_sizes(where), vocab_size=1000)
    heads = make_heads(sizes)
    texts = make_texts(heads, list_options(heads, sizes), sizes, DTYPE, where)
    expected, _ = run_plain(texts, heads)
    num_steps = 0
    record = Record(expected, find_tolerances(texts.options, is_coarse=True))
    for has_graphs, has_drafts in product((True, False), (False, True)):
        selector = make_selector(texts, has_graphs, 6 * texts.num_requests)
        walk = Walk(texts, selector)
        walk.admit(range(texts.num_requests))
        steps = []
        while walk.unfinished:
            places = [walk.place(request, has_drafts) for request in walk.unfinished]
            steps.append(walk.prepare(places, has_drafts))
        # The first round compiles, and fills the caches of memory.
        for is_watched in (False, True):
            with _refusing_to_wait(is_watched):
                walk.restart()
                for step in steps:
                    # The logits are scaled in place.
                    again = replace(step, logits=step.logits.clone())
                    record.add(step, run_step(selector, again))
                last, slot = texts.num_requests - 1, walk.slots[texts.num_requests - 1]
                walk.move(last)
                # Back to the slot for which the steps were prepared.
                walk.move(last, slot)
            num_steps += len(steps)
    _check_refusal(where)
    return record.compare() | {"steps": num_steps}


@contextmanager
def _refusing_to_wait(is_watched: bool) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _check_refusal(device: torch.device) -> None:
    """This check can fail: what waits is refused."""
    tensor = torch.ones(1, device=device)
    with _refusing_to_wait(True):
        try:
            tensor.item()
        except RuntimeError:
            return
    raise AssertionError("torch does not see that .item() waits")


@contextmanager
def _copying(device: torch.device) -> Iterator[None]:
    """A thread that waits for copies from the device all the time."""
    if not can_capture(device):
        yield
        return
    is_over = threading.Event()
    errors: list[RuntimeError] = []
    source = torch.ones(1024, device=device)
    target = _allocate_pinned(len(source))
    stream, event = torch.cuda.Stream(device), torch.cuda.Event()

    def copy() -> None:
        try:
            while not is_over.is_set():
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
                    event.record()
                event.synchronize()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if errors:
        raise errors[0]


def _allocate_pinned(num_floats: int) -> torch.Tensor:
    return torch.empty(num_floats, pin_memory=True)
