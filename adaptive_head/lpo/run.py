"""A whole experiment: prompts, rollouts, pairs, features, heads, evaluation."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adaptive_head.files import replace_file
from adaptive_head.language_model import LanguageModel
from adaptive_head.lpo.arms import name_replicate
from adaptive_head.lpo.evaluate import evaluate
from adaptive_head.lpo.experiment import Experiment, HeadRecipe
from adaptive_head.lpo.features import compute_features
from adaptive_head.lpo.frozen_model import read_unembedding
from adaptive_head.lpo.layout import (
    EVALUATION_FOLDER,
    EXPERIMENT_FILE,
    OUTSIDE_FOLDER,
    PROMPTS_FOLDER,
)
from adaptive_head.lpo.pair_report import write_report
from adaptive_head.lpo.pairs import PairSet, make_pairs
from adaptive_head.lpo.probing import ProbeStates, read_probe_states
from adaptive_head.lpo.records import Prompt, Response, write_records
from adaptive_head.lpo.rewards import Reward, build_reward
from adaptive_head.lpo.rollouts import roll_out
from adaptive_head.lpo.tasks import Split, encode_prompt, make_prompts
from adaptive_head.lpo.train import train_head
from adaptive_head.options import Level

Stage = Literal["rollouts", "pairs", "train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Group = tuple[Level, tuple[float, ...]]


@dataclass(frozen=True)
class Run:
    """An experiment, its model, and the folder of its results; each stage skips what is there.

    ```
    experiment.json
    prompts/     train.jsonl, test.jsonl
    rollouts/    for each level and set of temperatures: shards, and the features of their pairs
    heads/NAME/  pairs.jsonl with report and plot, training logs, head/
    seeds/N/     rollouts/ and heads/ of a further training seed, from 2
    evaluation/  answers, results.json, results.md, plots
    outside/     experiment.json, prompts/ and evaluation/ of the outside tasks
    ```

    The heads of the first training seed are those that ship, whatever the others' are worth.
    """

    experiment: Experiment
    model: LanguageModel
    folder: Path

    def execute(self, until: Stage = "evaluate") -> None:
        """Every stage up to one.

        Raises:
            DataError: an input is wrong; names the file and line, or the setting.
        """
        last = STAGES.index(until)
        self.write_inputs()
        if self.outside is not None:
            self.outside.write_inputs()
        replicates = range(self.experiment.num_training_seeds)
        for replicate, (group, recipes) in product(replicates, self.groups.items()):
            responses = self.roll_out(group, replicate)
            if last == STAGES.index("rollouts"):
                continue
            pairs = {
                name: self.pair(name, recipe, responses, replicate)
                for name, recipe in recipes.items()
            }
            if last >= STAGES.index("train"):
                self.train(group, recipes, responses, pairs, replicate)
        if last >= STAGES.index("evaluate"):
            self.evaluate(self.heads)
            if self.outside is not None:
                self.outside.evaluate(self.heads)

    def write_inputs(self) -> None:
        """Check the prompts, and write them and the experiment down."""
        (self.folder / PROMPTS_FOLDER).mkdir(parents=True, exist_ok=True)
        for split, prompts in self.prompts.items():
            for prompt in prompts:
                for reward in self.rewards[prompt.task].values():
                    reward.check_prompt(prompt)
            write_records(self.folder / PROMPTS_FOLDER / f"{split}.jsonl", prompts)
        content = self.experiment.model_dump_json(indent=2, exclude_defaults=True)
        replace_file(self.folder / EXPERIMENT_FILE, content + "\n")

    @cached_property
    def outside(self) -> "Run | None":
        """The evaluation on kinds that no head was trained on, if the experiment has such."""
        experiment = self.experiment.look_outside()
        return Run(experiment, self.model, self.folder / OUTSIDE_FOLDER) if experiment else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model.folder)

    @cached_property
    def prompts(self) -> dict[Split, list[Prompt]]:
        seed = self.experiment.derive_seed("prompts")
        return {
            split: make_prompts(self.experiment.tasks, split, seed, self.tokenizer)
            for split in get_args(Split)
        }

    @cached_property
    def rewards(self) -> dict[str, dict[str, Reward]]:
        """By task and name."""
        return {
            task: {name: build_reward(name, reward) for name, reward in config.rewards.items()}
            for task, config in self.experiment.tasks.items()
        }

    @cached_property
    def probe_states(self) -> ProbeStates | None:
        """For the feature probes of all heads; None where the device has no room for the model in
        float32."""
        try:
            return read_probe_states(self.model.folder)
        except torch.OutOfMemoryError:
            Console(file=sys.stderr).print(
                "There is no room for the model in float32, so the heads get no feature probe; "
                "`adaptive-head probe` adds one on a larger machine."
            )
            return None

    @property
    def groups(self) -> dict[Group, dict[str, HeadRecipe]]:
        """The heads by what they share rollouts by: level and temperatures."""
        groups: dict[Group, dict[str, HeadRecipe]] = {}
        for name, recipe in self.experiment.heads.items():
            groups.setdefault((recipe.level, recipe.temperatures), {})[name] = recipe
        return groups

    def roll_out(self, group: Group, replicate: int) -> list[Response]:
        """The rollouts of a group for one training seed, by its number from 0."""
        level, temperatures = group
        return roll_out(
            self.experiment,
            level,
            temperatures,
            model=self.model,
            prompts=self.prompts["train"],
            encode=partial(encode_prompt, self.tokenizer),
            rewards=self.rewards,
            folder=self.group_folder(group, replicate),
            replicate=replicate,
        )

    def pair(
        self, name: str, recipe: HeadRecipe, responses: Sequence[Response], replicate: int
    ) -> PairSet:
        """The pairs of one head, with their report."""
        pairs = make_pairs(
            {prompt.id: prompt for prompt in self.prompts["train"]},
            responses,
            self.experiment.tasks,
            recipe,
            self.rewards,
            partial(self.tokenizer.decode, skip_special_tokens=True),
            self.experiment.derive_seed("pairs", replicate),
        )
        folder = self.head_folder(name, replicate)
        folder.mkdir(parents=True, exist_ok=True)
        write_records(folder / "pairs.jsonl", pairs.pairs)
        write_report(pairs, responses, recipe, folder)
        return pairs

    def train(
        self,
        group: Group,
        recipes: Mapping[str, HeadRecipe],
        responses: Sequence[Response],
        pairs: Mapping[str, PairSet],
        replicate: int,
    ) -> None:
        """The heads of a group, all on one computation of the features."""
        level, temperatures = group
        sides = (
            s for p in pairs.values() for pair in p.pairs for s in (pair.chosen, pair.rejected)
        )
        used = {side.key for side in sides}
        paired = [response for response in responses if response.key in used]
        features = compute_features(
            self.model.folder,
            paired,
            level,
            temperatures,
            self.group_folder(group, replicate) / "features",
            needs_logprobs=any(recipe.loss == "eq11" for recipe in recipes.values()),
        )
        for name, recipe in recipes.items():
            needs_logits = recipe.loss == "cross_entropy"
            train_head(
                self.experiment.seed_recipe(recipe, replicate),
                features,
                pairs[name].pairs,
                self.head_folder(name, replicate),
                identity=self.model.identity,
                provenance={
                    "experiment": self.experiment.model_dump(mode="json"),
                    "training_seed": replicate + 1,
                    "num_responses": len(responses),
                    "num_tokens": sum(len(response.token_ids) for response in responses),
                },
                read_probe_states=lambda: self.probe_states,
                unembedding=read_unembedding(self.model.folder) if needs_logits else None,
            )

    def evaluate(self, heads: Mapping[str, Path]) -> None:
        """Heads on the held-out prompts, by their folders."""
        evaluate(
            self.experiment,
            self.model.folder,
            heads,
            self.prompts["train"],
            self.prompts["test"],
            partial(encode_prompt, self.tokenizer),
            self.rewards,
            self.folder / EVALUATION_FOLDER,
        )

    @property
    def heads(self) -> dict[str, Path]:
        """The folders of all heads, those of further training seeds among them."""
        trained = {
            name_replicate(name, replicate): self.head_folder(name, replicate) / "head"
            for name in self.experiment.heads
            for replicate in range(self.experiment.num_training_seeds)
        }
        return trained | self.experiment.ready_heads

    def seed_folder(self, replicate: int) -> Path:
        return self.folder if replicate == 0 else self.folder / "seeds" / str(replicate + 1)

    def head_folder(self, name: str, replicate: int) -> Path:
        return self.seed_folder(replicate) / "heads" / name

    def group_folder(self, group: Group, replicate: int) -> Path:
        level, temperatures = group
        folder = self.seed_folder(replicate) / "rollouts"
        return folder / "-".join([level, *(f"{t:g}" for t in temperatures)])
