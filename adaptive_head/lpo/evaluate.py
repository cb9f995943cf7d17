"""Evaluation: heads and their controls answer held-out prompts, and are compared."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from transformers import AutoTokenizer

from adaptive_head.lpo import engine as engines
from adaptive_head.lpo.answers import AnswerBook
from adaptive_head.lpo.arms import (
    Arm,
    HeadUnderTest,
    make_arm_key,
    read_heads,
)
from adaptive_head.lpo.choices import describe_choices
from adaptive_head.lpo.controls import plan_arms, plan_controls, plan_tuned
from adaptive_head.lpo.engine import Engine, Generation, GenerationRequest, record_response
from adaptive_head.lpo.experiment import EngineConfig, Experiment
from adaptive_head.lpo.layout import ANSWERS_FOLDER, RESULTS_FILE
from adaptive_head.lpo.plots import draw_plots
from adaptive_head.lpo.progress import TokenProgress
from adaptive_head.lpo.records import Prompt, Response
from adaptive_head.lpo.report import build_results, write_report
from adaptive_head.lpo.rewards import score_responses
from adaptive_head.lpo.summaries import Rewards, summarise_arm
from adaptive_head.lpo.token_ranges import Decode
from adaptive_head.lpo.tuning import choose_best_fixed, choose_train_prompts, tune

Encode = Callable[[Prompt], tuple[int, ...]]
OpenEngine = Callable[
    [Path | str, EngineConfig, Mapping[str, Path]], AbstractContextManager[Engine]
]


def evaluate(
    experiment: Experiment,
    model: Path | str,
    heads: Mapping[str, Path],
    train_prompts: Sequence[Prompt],
    test_prompts: Sequence[Prompt],
    encode: Encode,
    rewards: Rewards,
    folder: Path,
    *,
    open_engine: OpenEngine = engines.open_engine,
    decode: Decode | None = None,
) -> None:
    """Compare trained heads with the controls of `lpo.controls` on held-out prompts.

    Writes `answers/ARM.jsonl`, `results.json`, `results.md` and plots. Answers are kept: after an
    interruption, and after a change of the settings of some arms only, the rest is generated; an
    arm whose settings changed starts over.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        heads: folders by name; a name that is one of the experiment's heads answers the tasks
            that it was trained for, any other all tasks. `arms.name_replicate` names the heads of
            further training seeds, which are counted together with the first.
        train_prompts: of each task the first `evaluation.num_train_prompts` tune its controls.
        test_prompts: each with its group.
        encode: a prompt's token ids.
        rewards: by task and name.
        decode: token ids -> text; None is the model's own tokenizer, read where it is needed.

    Raises:
        HeadError: a folder is not a head.
        DataError: a reward failed, an answers file is damaged, or another process writes there.
        OSError: the disk is full; every answer written so far is kept.
    """
    questions = Questions(
        {"train": choose_train_prompts(experiment, train_prompts), "test": tuple(test_prompts)},
        encode,
    )
    tested = read_heads(experiment, heads)
    has_spans = any(reward.has_spans for of_task in rewards.values() for reward in of_task.values())
    if decode is None and has_spans:
        decode = partial(AutoTokenizer.from_pretrained(model).decode, skip_special_tokens=True)
    with AnswerBook(folder / ANSWERS_FOLDER) as book:
        # Results speak of these answers only: there are none until all are there.
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        examiner = Examiner(experiment, model, tested, questions, rewards, book, open_engine)
        arms = plan_arms(experiment, tested)
        examiner.examine(arms, heads)
        tuning = [arm for arm in arms if arm.kind == "train"]
        tuning_answers = {arm.name: examiner.read_answers(arm) for arm in tuning}
        best = choose_best_fixed(experiment, tuning_answers, tuning)
        controls = plan_tuned(experiment, model, tested, tune(experiment, tuning_answers, tuning))
        fixed = {
            arm.temperature: examiner.read_answers(arm)
            for arm in arms
            if arm.kind == "fixed" and arm.temperature is not None
        }
        for name, head in tested.items():
            answers = examiner.read_answers(next(a for a in arms if a.name == f"head-{name}"))
            controls += plan_controls(experiment, head, answers, fixed)
        examiner.examine(controls, heads)

        summaries = {}
        chosen = {}
        for arm in [*arms, *controls]:
            answers = examiner.read_answers(arm)
            level = tested[arm.head].metadata.level if arm.head else "token"
            summaries[arm.name] = summarise_arm(arm, level, answers, experiment, rewards)
            if arm.kind == "head" and arm.head and arm.head == tested[arm.head].base:
                metadata = tested[arm.head].metadata
                chosen[arm.head] = describe_choices(
                    experiment, metadata, answers, questions.prompts["test"], rewards, decode
                )
        num_seconds = book.num_seconds
    results = build_results(
        experiment, tested, questions.prompts, summaries, best, chosen, rewards, num_seconds
    )
    write_report(results, folder, draw_plots(results, folder))


@dataclass(frozen=True)
class Questions:
    """What every arm is asked: each prompt of its split and its tasks, so many times."""

    prompts: Mapping[str, tuple[Prompt, ...]]
    encode: Encode

    @cached_property
    def token_ids(self) -> dict[str, tuple[int, ...]]:
        """By prompt."""
        return {p.id: self.encode(p) for of_split in self.prompts.values() for p in of_split}

    def list(self, arm: Arm) -> Iterator[tuple[Prompt, int]]:
        """Prompt and sample of each answer of an arm."""
        for prompt in self.prompts[arm.split]:
            if prompt.task in arm.settings:
                for sample in range(arm.num_samples):
                    yield prompt, sample


@dataclass(frozen=True)
class Job:
    """A request, and what it is for."""

    arm: Arm
    prompt: Prompt
    sample: int
    request: GenerationRequest


@dataclass(frozen=True)
class Examiner:
    """Gets the answers of arms. The fields are those of `evaluate`."""

    experiment: Experiment
    model: Path | str
    tested: Mapping[str, HeadUnderTest]
    questions: Questions
    rewards: Rewards
    book: AnswerBook
    open_engine: OpenEngine

    def examine(self, arms: Sequence[Arm], heads: Mapping[str, Path]) -> None:
        """Generate and score what these arms have not answered yet, in one go.

        Args:
            heads: that their requests name.
        """
        jobs: dict[str, Job] = {}
        for arm in arms:
            key = make_arm_key(self.experiment, self.tested, arm, self.questions.prompts[arm.split])
            done = self.book.open(arm.name, key)
            for prompt, sample in self.questions.list(arm):
                if (prompt.id, sample) not in done:
                    request = self._make_request(arm, prompt, sample)
                    jobs[request.id] = Job(arm, prompt, sample, request)
        if not jobs:
            return
        with (
            self.open_engine(self.model, self.experiment.engine, heads) as engine,
            TokenProgress("evaluation", len(jobs)) as progress,
        ):
            try:
                for generation in engine.generate(job.request for job in jobs.values()):
                    job = jobs[generation.id]
                    self.book.write(job.arm.name, self._score(job, generation))
                    progress.advance(len(generation.token_ids))
            finally:
                self.book.add_seconds(progress.num_seconds)

    def read_answers(self, arm: Arm) -> list[Response]:
        """All answers of an arm, in the order of its questions."""
        answers = self.book.read(arm.name)
        return [answers[prompt.id, sample] for prompt, sample in self.questions.list(arm)]

    def _make_request(self, arm: Arm, prompt: Prompt, sample: int) -> GenerationRequest:
        setting = arm.find_setting(prompt, sample)
        return GenerationRequest(
            id=f"{arm.name}|{prompt.id}|{sample}",
            prompt_token_ids=self.questions.token_ids[prompt.id],
            max_tokens=self.experiment.tasks[prompt.task].max_tokens,
            seed=arm.make_seed(self.experiment, prompt, sample),
            temperature=setting.temperature,
            filters=setting.filters,
        )

    def _score(self, job: Job, generation: Generation) -> Response:
        response = record_response(job.prompt, job.sample, job.request, generation)
        (scored,) = score_responses(self.rewards[job.prompt.task], [job.prompt], [response])
        return scored
