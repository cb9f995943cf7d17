"""Rollouts: N responses to each training prompt, with temperatures from a near-uniform head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from adaptive_head.checkpoint import save_head
from adaptive_head.head import AdaptiveHead, HeadConfig
from adaptive_head.language_model import LanguageModel
from adaptive_head.lpo.engine import Engine, GenerationRequest, open_engine, record_response
from adaptive_head.lpo.experiment import Experiment, digest
from adaptive_head.lpo.progress import TokenProgress
from adaptive_head.lpo.records import Prompt, Response
from adaptive_head.lpo.rewards import Reward, score_responses
from adaptive_head.lpo.shards import ShardWriter, read_manifest, read_shards
from adaptive_head.options import AdaptiveRequest, Level

Encode = Callable[[Prompt], tuple[int, ...]]
HEAD_NAME = "uniform"


def roll_out(
    experiment: Experiment,
    level: Level,
    temperatures: tuple[float, ...],
    *,
    model: LanguageModel,
    prompts: Sequence[Prompt],
    encode: Encode,
    rewards: Mapping[str, Mapping[str, Reward]],
    folder: Path,
    replicate: int = 0,
) -> list[Response]:
    """Sample and score `rollouts.num_responses` responses to each prompt (Eq. 5, arXiv 2411.09661).

    Goes on where an earlier run was interrupted; returns at once where nothing is missing.

    Args:
        rewards: by task and name.
        folder: of the shards, and of the head that samples.
        replicate: number of the training seed; each has rollouts of its own.

    Raises:
        DataError: the folder belongs to other settings, or a reward failed.
        OSError: the disk is full; everything written so far is kept.
    """
    seeds = [experiment.name, experiment.seed, replicate]
    own = [model.identity.model_dump(), level, temperatures, seeds]
    key = digest([*own, *describe(experiment, prompts)])
    manifest = read_manifest(folder)
    if not (manifest and manifest["key"] == key and manifest["is_complete"]):
        head = folder / "head"
        if not (head / "head.json").exists():
            config = HeadConfig(model.hidden_size, temperatures, (64,))
            network = AdaptiveHead(config, experiment.derive_seed("uniform", replicate))
            save_head(head, network, level=level, base_model=model.identity, trained=False)
        with ShardWriter(folder, key, experiment.rollouts.shard_size) as writer:
            requests = dict(
                prepare_requests(experiment, level, prompts, encode, writer.keys, replicate)
            )
            if requests:
                with open_engine(model.folder, experiment.engine, {HEAD_NAME: head}) as engine:
                    sample(engine, requests, rewards, writer)
            writer.finish()
    return read_shards(folder)


def describe(experiment: Experiment, prompts: Sequence[Prompt]) -> list[object]:
    """What responses depend on, beside the model and the head."""
    limits = {name: task.max_tokens for name, task in experiment.tasks.items()}
    rewards = {
        name: {r: config.model_dump(mode="json") for r, config in task.rewards.items()}
        for name, task in experiment.tasks.items()
    }
    return [
        experiment.rollouts.num_responses,
        limits,
        rewards,
        [[prompt.id, prompt.messages, prompt.text, prompt.reference] for prompt in prompts],
    ]


def prepare_requests(
    experiment: Experiment,
    level: Level,
    prompts: Sequence[Prompt],
    encode: Encode,
    done: set[tuple[str, int]],
    replicate: int,
) -> Iterator[tuple[GenerationRequest, tuple[Prompt, int]]]:
    """The requests that are still missing, each with its prompt and sample."""
    adaptive = AdaptiveRequest(head=HEAD_NAME, select="sample")
    for prompt in prompts:
        for number in range(experiment.rollouts.num_responses):
            if (prompt.id, number) not in done:
                request = GenerationRequest(
                    id=f"{prompt.id}#{number}",
                    prompt_token_ids=encode(prompt),
                    max_tokens=experiment.tasks[prompt.task].max_tokens,
                    seed=experiment.derive_seed("rollout", replicate, level, prompt.id, number),
                    temperature=adaptive,
                )
                yield request, (prompt, number)


def sample(
    engine: Engine,
    requests: Mapping[GenerationRequest, tuple[Prompt, int]],
    rewards: Mapping[str, Mapping[str, Reward]],
    writer: ShardWriter,
) -> None:
    """Generate, score and write, response by response."""
    by_id = {request.id: (request, *about) for request, about in requests.items()}
    with TokenProgress("rollouts", len(by_id)) as progress:
        for generation in engine.generate(iter(requests)):
            request, prompt, number = by_id[generation.id]
            response = record_response(prompt, number, request, generation)
            (scored,) = score_responses(rewards[prompt.task], [prompt], [response])
            writer.write(scored)
            progress.advance(len(generation.token_ids))
