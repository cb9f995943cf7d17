"""An arm's answers, reduced to what comparisons need."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_head.lpo.arms import Arm, list_choices
from adaptive_head.lpo.experiment import Experiment
from adaptive_head.lpo.records import Response
from adaptive_head.lpo.rewards import NumberReward, Reward
from adaptive_head.lpo.statistics import count_votes

Rewards = Mapping[str, Mapping[str, Reward]]


@dataclass(frozen=True)
class ArmSummary:
    """What comparisons need of an arm's answers.

    Args:
        scores: by prompt, of each sample, one stream after the other.
        votes: by prompt, the score of the majority vote in each stream; empty without a vote.
        temperatures: by task, the mean: over tokens, or over responses of a sequence-level head;
            a task without a token is missing.
    """

    arm: Arm
    scores: Mapping[str, tuple[Mapping[str, float], ...]]
    votes: Mapping[str, tuple[float, ...]]
    temperatures: Mapping[str, float]
    num_tokens: int
    finish_reasons: Mapping[str, int]


def summarise_arm(
    arm: Arm,
    level: str,
    answers: Sequence[Response],
    experiment: Experiment,
    rewards: Rewards,
) -> ArmSummary:
    """Reduce an arm's answers to what comparisons need.

    Args:
        level: of the head that the arm belongs to; `token` for arms of none.
        answers: in the order of samples.
    """
    by_prompt: dict[str, list[Response]] = defaultdict(list)
    by_task: dict[str, list[Response]] = defaultdict(list)
    for response in answers:
        by_prompt[response.prompt_id].append(response)
        by_task[response.task].append(response)
    votes = {}
    for prompt_id, responses in by_prompt.items():
        task = responses[0].task
        name = find_voted_reward(experiment, rewards, task)
        if arm.split == "test" and name is not None:
            votes[prompt_id] = _vote(experiment, rewards[task][name], name, responses)
    choices = {task: list_choices(level, responses) for task, responses in by_task.items()}
    return ArmSummary(
        arm=arm,
        scores={key: tuple(r.scores for r in responses) for key, responses in by_prompt.items()},
        votes=votes,
        temperatures={task: float(np.mean(chosen)) for task, chosen in choices.items() if chosen},
        num_tokens=sum(len(response.token_ids) for response in answers),
        finish_reasons=Counter(response.finish_reason for response in answers),
    )


def _vote(
    experiment: Experiment, reward: Reward, name: str, responses: Sequence[Response]
) -> tuple[float, ...]:
    """The score of the vote in each stream."""
    assert isinstance(reward, NumberReward)
    num = experiment.evaluation.num_responses
    found = [reward.find_answer(response.text) for response in responses]
    scores = [response.scores[name] for response in responses]
    starts = range(0, len(responses), num)
    return tuple(count_votes(found[i : i + num], scores[i : i + num]) for i in starts)


def find_voted_reward(experiment: Experiment, rewards: Rewards, task: str) -> str | None:
    """The reward whose answers are put to the vote: the first that compares numbers, if any."""
    evaluation = experiment.evaluation
    if not evaluation.majority or evaluation.num_responses == 1:
        return None
    names = experiment.tasks[task].metrics
    return next((n for n in names if isinstance(rewards[task][n], NumberReward)), None)
