"""Rollouts with a fake engine: every response once, whatever interrupts them."""

from pathlib import Path

import pytest

from adaptive_head.checkpoint import BaseModelIdentity, read_metadata
from adaptive_head.language_model import LanguageModel
from adaptive_head.lpo import rollouts
from adaptive_head.lpo.engine import GenerationRequest
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.records import DataError, Prompt, Response
from adaptive_head.lpo.rewards import build_reward
from adaptive_head.options import AdaptiveRequest
from tests.lpo.fakes import FakeEngine
from tests.lpo.test_experiment import make_content

MODEL = LanguageModel(Path("model"), BaseModelIdentity(name="model", fingerprint="f"), 8)
PROMPTS = [
    Prompt(f"sums/train/{n}", "sums", text=f"{n} + 1?", reference={"answer": n + 1})
    for n in range(5)
]
TEMPERATURES = (0.0, 0.4, 1.0)


def encode(prompt: Prompt) -> tuple[int, ...]:
    return (int(prompt.id.rpartition("/")[2]), 9)


def answer(request: GenerationRequest) -> str:
    number = request.prompt_token_ids[0]
    return f"it is {number + 1 if request.seed % 2 else 0}"


def roll_out(folder: Path, replicate: int = 0, **changes: object) -> list[Response]:
    experiment = Experiment.model_validate(
        make_content(rollouts={"num_responses": 4, "shard_size": 3}, **changes)
    )
    task = experiment.tasks["sums"]
    rewards = {"sums": {name: build_reward(name, r) for name, r in task.rewards.items()}}
    return rollouts.roll_out(
        experiment,
        "token",
        TEMPERATURES,
        model=MODEL,
        prompts=PROMPTS,
        encode=encode,
        rewards=rewards,
        folder=folder,
        replicate=replicate,
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine(answer)
    monkeypatch.setattr(rollouts, "open_engine", engine.open)
    return engine


def test_every_response_is_recorded_whole(engine: FakeEngine, tmp_path: Path) -> None:
    responses = roll_out(tmp_path)
    assert [r.key for r in responses] == [(p.id, n) for p in PROMPTS for n in range(4)]
    assert len({r.seed for r in responses}) == 20
    for response in responses:
        assert response.temperatures == (0.4, 0.4, 0.4)
        assert response.logprobs == (-0.5, -0.5, -0.5)
        assert response.scores == {"correct": float(response.seed % 2)}
        assert response.finish_reason == "stop"
        assert response.prompt_token_ids == encode(PROMPTS[int(response.prompt_id[-1])])
    assert {r.max_tokens for r in engine.requests} == {8}
    assert {r.temperature for r in engine.requests} == {
        AdaptiveRequest(head="uniform", select="sample")
    }


def test_the_head_that_samples_is_near_uniform(engine: FakeEngine, tmp_path: Path) -> None:
    roll_out(tmp_path)
    metadata = read_metadata(tmp_path / "head")
    assert (metadata.trained, metadata.level) == (False, "token")
    assert metadata.temperatures == TEMPERATURES
    assert metadata.base_model == MODEL.identity


@pytest.mark.parametrize("fail_after", [0, 1, 7, 19])
def test_an_interrupted_run_goes_on(engine: FakeEngine, tmp_path: Path, fail_after: int) -> None:
    engine.fail_after = fail_after
    with pytest.raises(KeyboardInterrupt):
        roll_out(tmp_path)
    assert not engine.is_open
    engine.fail_after = None
    responses = roll_out(tmp_path)
    assert len(responses) == len({r.key for r in responses}) == 20
    # Nothing that was written before is asked again.
    assert len({request.id for request in engine.requests}) == len(engine.requests) == 20
    assert engine.num_starts == 2
    assert roll_out(tmp_path) == responses
    assert engine.num_starts == 2


def test_a_seed_is_its_own_whatever_was_done_before(engine: FakeEngine, tmp_path: Path) -> None:
    engine.fail_after = 6
    with pytest.raises(KeyboardInterrupt):
        roll_out(tmp_path / "interrupted")
    engine.fail_after = None
    assert roll_out(tmp_path / "interrupted") == roll_out(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"seed": 1}, {"name": "other"}, {"replicate": 1}])
def test_other_settings_are_refused(engine: FakeEngine, tmp_path: Path, changes: dict) -> None:
    roll_out(tmp_path)
    with pytest.raises(DataError, match="other settings"):
        roll_out(tmp_path, **changes)


def test_every_experiment_and_training_seed_draws_its_own(
    engine: FakeEngine, tmp_path: Path
) -> None:
    runs = [
        {response.seed for response in roll_out(tmp_path / str(n), **changes)}
        for n, changes in enumerate([{}, {"name": "other"}, {"replicate": 1}, {"seed": 1}])
    ]
    assert len(set.union(*runs)) == sum(map(len, runs))


def test_a_reward_that_raises_keeps_what_is_finished(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: GenerationRequest) -> str:
        return "boom" if len(engine.requests) == 10 else answer(request)

    content = make_content()["tasks"]["sums"]
    content["rewards"] = {"mine": {"kind": "python", "entry": "tests.lpo.test_rollouts:explode"}}
    content["prefer"] = {"first": "mine"}
    engine.answer = fail
    with pytest.raises(DataError, match=r"rewards\.mine: .*sums/train/\d.*no score for boom"):
        roll_out(tmp_path, tasks={"sums": content})
    engine.answer = answer
    assert len(roll_out(tmp_path, tasks={"sums": content})) == 20
    assert len(engine.requests) == 21


def explode(prompt: Prompt, response: Response) -> float:
    if response.text == "boom":
        raise RuntimeError("no score for boom")
    return 1.0
