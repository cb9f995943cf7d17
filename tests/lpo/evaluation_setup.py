"""An experiment, two heads and an engine without a model, for tests of the evaluation."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from adaptive_head.checkpoint import BaseModelIdentity, save_head
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.lpo import controls
from adaptive_head.lpo.arms import Setting, name_replicate
from adaptive_head.lpo.engine import Generation, GenerationRequest
from adaptive_head.lpo.evaluate import evaluate
from adaptive_head.lpo.experiment import EngineConfig, Experiment
from adaptive_head.lpo.records import Prompt
from adaptive_head.lpo.rewards import build_reward
from adaptive_head.options import AdaptiveRequest

TOKEN_TEMPERATURES = (0.0, 0.3, 0.9)
SEQUENCE_TEMPERATURES = (0.0, 0.6)
TASKS = {
    "sums": {
        "prompts": {"generate": "sums", "num_train": 30, "num_test": 30},
        "max_tokens": 32,
        "rewards": {"correct": {"kind": "number"}},
        "prefer": {"first": "correct"},
    },
    "stories": {
        "prompts": {"generate": "stories", "num_train": 30, "num_test": 30},
        "max_tokens": 64,
        "rewards": {
            "starts": {"kind": "sentence_start", "word": "She"},
            "varied": {"kind": "distinct"},
        },
        "prefer": {"first": "starts"},
    },
}


def make_experiment(**evaluation: Any) -> Experiment:
    """Two tasks; `evaluation` are settings of that part."""
    num_training_seeds = evaluation.pop("num_training_seeds", 1)
    token = {"level": "token", "temperatures": TOKEN_TEMPERATURES}
    sequence = {"level": "sequence", "temperatures": SEQUENCE_TEMPERATURES, "tasks": ["sums"]}
    settings = {"num_responses": 2, "num_train_prompts": 3, "num_bootstrap": 100, "fixed": [0.7]}
    return Experiment.model_validate(
        {
            "name": "test",
            "seed": 5,
            "num_training_seeds": num_training_seeds,
            # One per fixed temperature in each tuning arm.
            "rollouts": {"num_responses": 10},
            "tasks": TASKS,
            "heads": {"tok": token, "seq": sequence},
            "evaluation": settings | evaluation,
        }
    )


def make_prompts(split: str, num: int) -> list[Prompt]:
    """So many prompts of each task, each a group of its own."""
    sums = [
        Prompt(
            f"sums/{split}/{i}",
            "sums",
            text=f"{i} + {i}?",
            reference={"answer": 2 * i},
            group=f"{i} + {i}",
            kind="sums",
        )
        for i in range(num)
    ]
    stories = [
        Prompt(
            f"stories/{split}/{i}",
            "stories",
            text=f"{split} story {i}",
            group=f"story {i}",
            kind="stories",
        )
        for i in range(num)
    ]
    return sums + stories


def encode(prompt: Prompt) -> tuple[int, ...]:
    """The prompt's id, a character a token."""
    return tuple(map(ord, prompt.id))


def decode(token_ids: Iterable[int]) -> str:
    return "".join(map(chr, token_ids))


def save_heads(folder: Path, seed: int = 0, num_seeds: int = 1) -> dict[str, Path]:
    """A token-level head `tok` and a sequence-level head `seq`, of so many training seeds."""
    identity = BaseModelIdentity(name="small", fingerprint="0" * 16)
    heads = {}
    for name, level, temperatures in (
        ("tok", "token", TOKEN_TEMPERATURES),
        ("seq", "sequence", SEQUENCE_TEMPERATURES),
    ):
        for number in range(num_seeds):
            key = name_replicate(name, number)
            network = AdaptiveHead(HeadConfig(8, temperatures, (4,)), seed + number)
            save_head(folder / key, network, level=level, base_model=identity, trained=True)
            heads[key] = folder / key
    return heads


def answer(request: GenerationRequest) -> Generation:
    """A sum, right the more often the colder, or a story of three sentences."""
    rng = random.Random(request.seed)
    wanted = request.temperature
    heat = wanted if isinstance(wanted, float) else 0.2
    prompt_id = decode(request.prompt_token_ids)
    if prompt_id.startswith("sums"):
        text = f"It is {2 * int(prompt_id.rsplit('/')[-1]) + (rng.random() < 0.2 + heat / 2)}."
    else:
        subjects = ["He" if rng.random() < 0.3 + heat / 3 else "She" for _ in range(3)]
        text = " ".join(f"{subject} {rng.choice(['ran', 'sat'])}." for subject in subjects)
    temperatures = tuple(choose_temperatures(wanted, text, rng))
    # Hotter tokens are less likely.
    logprobs = tuple(-0.1 - temperature for temperature in temperatures)
    return Generation(request.id, tuple(map(ord, text)), temperatures, text, "stop", logprobs)


def choose_temperatures(
    wanted: float | AdaptiveRequest, text: str, rng: random.Random
) -> Iterable[float]:
    """One for each character; the head `tok` takes 0.0 for capitals and 0.9 elsewhere."""
    if not isinstance(wanted, AdaptiveRequest):
        return [wanted] * len(text)
    if wanted.constant:
        return [wanted.constant.temperature] * len(text)
    if wanted.policy == "list":
        return list(wanted.list.temperatures)[: len(text)]
    if wanted.policy == "head" and wanted.head.startswith("seq"):
        return [rng.choice(SEQUENCE_TEMPERATURES)] * len(text)
    if wanted.policy == "head":
        return [0.0 if character.isupper() else 0.9 for character in text]
    return [rng.choice(TOKEN_TEMPERATURES) for _ in text]


class _List(BaseModel):
    temperatures: tuple[float, ...]


class _ListRequest(AdaptiveRequest):
    """A request with the policy `list`, where the options do not have it."""

    policy: str = "list"
    list: _List


@contextmanager
def list_policy() -> Iterator[None]:
    """Let controls ask for lists of temperatures, whatever the options know."""
    with pytest.MonkeyPatch.context() as patch:
        if "list" not in AdaptiveRequest.model_fields:
            patch.setattr(
                controls,
                "make_list",
                lambda temperatures: Setting(
                    _ListRequest(list=_List(temperatures=tuple(temperatures)))
                ),
            )
        yield


class FakeEngine:
    """Answers requests, `answer` by default, and remembers what it was asked.

    Args:
        fail_after: so many answers an engine start, it breaks down.
    """

    def __init__(
        self,
        answer: Callable[[GenerationRequest], Generation] = answer,
        fail_after: int | None = None,
    ) -> None:
        self._answer = answer
        self._fail_after = fail_after
        self.starts: list[Mapping[str, Path]] = []
        self.calls: list[list[GenerationRequest]] = []
        self.is_closed = False

    @contextmanager
    def open(
        self, model: Path | str, config: EngineConfig, heads: Mapping[str, Path]
    ) -> Iterator["FakeEngine"]:
        self.starts.append(dict(heads))
        yield self

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Generation]:
        # Out of order, as an engine finishes them.
        asked = list(requests)
        self.calls.append(asked)
        for number, request in enumerate(sorted(asked, key=lambda request: request.seed)):
            if number == self._fail_after:
                raise KeyboardInterrupt
            yield self._answer(request)

    def close(self) -> None:
        self.is_closed = True

    @property
    def ids(self) -> list[str]:
        """Of all requests so far."""
        return [request.id for call in self.calls for request in call]

    def get(self, arm: str) -> list[GenerationRequest]:
        """The requests of one arm."""
        found = (request for call in self.calls for request in call)
        return [request for request in found if request.id.startswith(f"{arm}|")]


def run(
    folder: Path,
    engine: FakeEngine,
    experiment: Experiment | None = None,
    heads: Mapping[str, Path] | None = None,
    num_prompts: int = 4,
) -> None:
    """Evaluate into a folder."""
    experiment = experiment or make_experiment()
    num_seeds = experiment.num_training_seeds
    rewards = {
        task: {name: build_reward(name, reward) for name, reward in config.rewards.items()}
        for task, config in experiment.tasks.items()
    }
    with list_policy():
        evaluate(
            experiment,
            "model",
            heads or save_heads(folder / "heads", num_seeds=num_seeds),
            make_prompts("train", num_prompts),
            make_prompts("test", num_prompts),
            encode,
            rewards,
            folder / "evaluation",
            open_engine=engine.open,
            decode=decode,
        )
