"""Requests with their whole texts, and what a model would show at each of their tokens.

A stand-in for a model: both selectors, torch's and the device's, can be led through the same texts
in batches of any composition, and must choose the same temperatures.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import get_args

import numpy as np
import torch

from adaptive_head.decision import MILLION
from adaptive_head.head import AdaptiveHead, HeadConfig, gumbel_noise
from adaptive_head.options import Options, Selection
from adaptive_head.selector import Step, TemperatureSelector
from adaptive_head.slots import ORDINARY, HeadCounts, to_micro
from adaptive_head.vllm.head_runner import convert

PROMPT_LEN = 5
MARKER, START = 7, 6
# Scale, min and max.
BOUNDS = ((1.0, 0.0, 10.0), (0.5, 0.2, 0.6), (1.7, 0.3, 1.0))
# Candidates for each hidden state, of which the one with the clearest choice is taken.
NUM_CANDIDATES = 8


@dataclass(frozen=True)
class Sizes:
    """Of the model that the texts stand for, and of the texts.

    Attributes:
        bounds: scale, min and max of the requests.
    """

    num_tokens: int
    vocab_size: int
    hidden_size: int
    layer_sizes: tuple[int, ...]
    bounds: tuple[tuple[float, float, float], ...]


LARGE = Sizes(30, 128_256, 1024, (512, 512), BOUNDS)
# For Triton's interpreter.
SMALL = Sizes(7, 70, 24, (16,), ((0.9, 0.1, 1.1),))


def pick_sizes(device: torch.device) -> Sizes:
    """The sizes that a device can take in seconds."""
    return SMALL if device.type == "cpu" else LARGE


def make_head(sizes: Sizes, temperatures: tuple[float, ...], seed: int) -> AdaptiveHead:
    """A head that chooses all of its temperatures, which an untrained one does not."""
    config = HeadConfig(sizes.hidden_size, temperatures, sizes.layer_sizes)
    head = AdaptiveHead(config, seed)
    with torch.no_grad():
        for layer in head.layers:
            layer.weight.mul_(3)
        head.layers[-1].weight.mul_(100)
    return head.requires_grad_(False).eval()


def make_heads(sizes: Sizes) -> dict[str, AdaptiveHead]:
    """Two heads with different numbers of temperatures."""
    return {
        "first": make_head(sizes, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), seed=1),
        "second": make_head(sizes, (0.0, 0.35, 1.2), seed=2),
    }


# Of each policy; see `Options.parameters`.
PARAMETERS = {
    "head": (),
    "entropy": (1.0, 1.0),
    "schedule": (1.0, 0.3, 8.0),
    "two_phase": (1.0, 0.3),
    "constant": (0.7,),
    "list": (),
}


def make_options(policy: str, **changes: object) -> Options:
    """Options of a policy, complete with its parameters."""
    values = {
        "name": policy,
        "level": "token",
        "select": "argmax",
        "scale": 1.0,
        "min": 0.0,
        "max": 10.0,
        "parameters": PARAMETERS[policy],
    }
    if policy == "list":
        values["temperatures"] = (0.3, 0.0, 1.7, 0.2, 0.4)
    if policy == "two_phase":
        values |= {"marker_token_ids": (1, MARKER), "start_token_ids": (START,)}
    return Options(policy=policy, **values | changes)


def list_options(heads: dict[str, AdaptiveHead], sizes: Sizes) -> list[Options | None]:
    """Every policy, level, selection and kind of bounds, and ordinary requests among them."""
    levels = ("token", "sequence")
    found: list[Options | None] = [None] * 4
    for scale, low, high in sizes.bounds:
        bounds = {"scale": scale, "min": low, "max": high}
        for name, level, select in product(heads, levels, get_args(Selection)):
            found.append(make_options("head", name=name, level=level, select=select, **bounds))
        for policy, level in product(("entropy", "constant"), levels):
            found.append(make_options(policy, level=level, **bounds))
        for policy in ("schedule", "two_phase", "list"):
            found.append(make_options(policy, **bounds))
        markers = {"marker_token_ids": (MARKER,), "start_token_ids": ()}
        found += [
            make_options("two_phase", num_written=count, **markers) for count in (0, PROMPT_LEN)
        ]
    return found


@dataclass(frozen=True)
class Texts:
    """What a model would show of every request.

    Attributes:
        options, seeds: by request.
        tokens: int64 [requests, tokens], the first PROMPT_LEN of them the prompt; on the host.
        hidden: [requests, tokens, d].
        logits: float32 [requests, tokens, vocabulary].
        networks: the heads, computing in the dtype in which they will on the device.
        min_margin: how far the two best scores of a head are apart, at least, as a share of the
            largest one.
    """

    options: list[Options | None]
    seeds: list[int]
    tokens: np.ndarray
    hidden: torch.Tensor
    logits: torch.Tensor
    networks: dict[str, AdaptiveHead]
    min_margin: float

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def num_requests(self) -> int:
        return len(self.options)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[1])


def make_texts(
    heads: dict[str, AdaptiveHead],
    options: list[Options | None],
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Texts:
    """Draw texts. No choice of a head is a close one, so that rounding cannot change it."""
    rng = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    shape = len(options), sizes.num_tokens
    seeds = [rng.randrange(-(1 << 63), 1 << 63) for _ in options]
    tokens = np.array([[rng.choice([1, 2, START, MARKER]) for _ in range(shape[1])] for _ in seeds])
    logits = torch.randn(*shape, sizes.vocab_size, generator=generator, device=device)
    logits *= torch.tensor([0.5, 2.0, 8.0], device=device)[torch.arange(shape[1]) % 3][:, None]
    candidates = torch.randn(
        *shape, NUM_CANDIDATES, sizes.hidden_size, generator=generator, device=device
    )
    candidates = (candidates * 3).to(dtype)
    computed = torch.float32 if device.type == "cpu" else dtype
    networks = {
        name: convert(copy.deepcopy(head), computed).to(device) for name, head in heads.items()
    }
    hidden = candidates[:, :, 0].clone()
    margins = []
    for request, one in enumerate(options):
        if one is not None and one.policy == "head":
            scores = _score_exactly(candidates[request], networks[one.name], one, seeds[request])
            top = scores.topk(2, dim=-1).values
            margin = (top[..., 0] - top[..., 1]) / scores.abs().amax(dim=-1)
            clearest = margin.argmax(dim=1)
            every = torch.arange(len(clearest), device=device)
            hidden[request] = candidates[request, every, clearest]
            margins.append(margin[every, clearest].min().item())
    return Texts(options, seeds, tokens, hidden, logits, networks, min(margins, default=1.0))


def _score_exactly(
    hidden: torch.Tensor, network: AdaptiveHead, options: Options, seed: int
) -> torch.Tensor:
    """A request's scores [tokens, candidates, K] for candidates [tokens, candidates, d], with its
    noise if it has any. Computed in float64; `AdaptiveHead` rounds its result to float32."""
    scores: torch.Tensor = copy.deepcopy(network).double()(hidden.double())
    if options.select == "sample":
        positions = torch.arange(len(scores), device=scores.device)
        seeds = torch.full_like(positions, seed)
        scores = scores + gumbel_noise(seeds, positions, scores.shape[-1])[:, None]
    return scores


def run_plain(texts: Texts, heads: dict[str, AdaptiveHead]) -> tuple[np.ndarray, list[HeadCounts]]:
    """Lead torch's selector through the texts, all requests in each step.

    Returns:
        int32 [requests, tokens], millionths, ORDINARY also where nothing is sampled; and the
        counts of the heads.
    """
    num_requests, device = texts.num_requests, texts.device
    networks = {name: copy.deepcopy(texts.networks[name]) for name in heads}
    selector = TemperatureSelector(networks, num_requests, device)
    for slot, (options, seed) in enumerate(zip(texts.options, texts.seeds, strict=True)):
        selector.add(slot, options, seed)
    selector.flush()
    for slot in range(num_requests):
        selector.start_phase(slot, texts.tokens[slot, :PROMPT_LEN].tolist(), PROMPT_LEN)
    slots_np = np.arange(num_requests)
    slots = torch.from_numpy(slots_np).to(device)
    found = np.full(texts.tokens.shape, ORDINARY, dtype=np.int32)
    for position in range(PROMPT_LEN - 1, texts.num_tokens):
        step = Step(
            slots=slots,
            slots_np=slots_np,
            hidden=texts.hidden[:, position],
            logits=texts.logits[:, position],
            input_ids=torch.from_numpy(texts.tokens[:, position]).to(device),
            positions=torch.full_like(slots, position),
            prompt_lens=torch.full_like(slots, PROMPT_LEN),
            is_ready=torch.ones_like(slots, dtype=torch.bool),
        )
        temperatures = selector.select(step)
        if temperatures is not None:
            found[:, position] = to_micro(temperatures).cpu().numpy()
    return found, selector.count_choices()


def find_tolerances(options: list[Options | None], is_coarse: bool) -> np.ndarray:
    """By how many millionths, and which share of the value, each request's temperatures may differ:
    float64 [requests, 2]. Nothing where a temperature is one of a table."""
    coarse = (MILLION / 20, 0.0) if is_coarse else (200.0, 1e-3)
    tolerances = []
    for one in options:
        is_head = one is not None and one.policy == "head"
        is_mean = is_head and one.select not in ("argmax", "sample")
        is_continuous = one is not None and one.policy in ("entropy", "schedule")
        tolerances.append(coarse if is_mean else (20.0, 2e-4) if is_continuous else (0.0, 0.0))
    return np.array(tolerances)


def split_steps(rng: random.Random, unfinished: list[int], texts: Texts) -> Iterator[list[int]]:
    """Requests for a few steps: all, some, one head's alone, ordinary ones, a single one."""

    def choose(is_chosen: Callable[[Options | None], bool]) -> list[int]:
        return [request for request in unfinished if is_chosen(texts.options[request])]

    yield rng.sample(unfinished, len(unfinished))
    yield rng.sample(unfinished, (len(unfinished) + 1) // 2)
    yield choose(lambda one: one is not None and one.name == "first")
    yield choose(lambda one: one is None)
    yield choose(lambda one: one is not None and one.policy == "entropy")
    yield [rng.choice(unfinished)]
