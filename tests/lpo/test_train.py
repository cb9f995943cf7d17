"""Training on made-up features in which the right temperature is known."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adaptive_head.checkpoint import BaseModelIdentity, load_head
from adaptive_head.head import AdaptiveHead
from adaptive_head.lpo import pair_rows, trainer
from adaptive_head.lpo.experiment import HeadRecipe
from adaptive_head.lpo.feature_file import Features
from adaptive_head.lpo.probing import ProbeStates, make_probe
from adaptive_head.lpo.records import Pair, Side
from adaptive_head.lpo.train import TrainingResult, split_pairs, train_head
from adaptive_head.lpo.trainer import TrainingError

IDENTITY = BaseModelIdentity(name="tiny", fingerprint="0123456789abcdef")
TEMPERATURES = (0.2, 0.6, 1.0)
WIDTH, VOCAB = 4, 5
NUM_TOKENS = 5


@dataclass(frozen=True)
class Planted:
    """Features and pairs from which low is learned where h[0] > 0, and high elsewhere."""

    features: Features
    pairs: list[Pair]
    unembedding: torch.Tensor


def find_right(hidden: torch.Tensor) -> torch.Tensor:
    return torch.where(hidden[:, 0] > 0, 0, 2)


def draw_hidden(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    hidden = torch.randn(num_rows, WIDTH, generator=generator)
    # Away from the boundary, so that the rule is not a matter of precision.
    hidden[:, 0] += hidden[:, 0].sign()
    return hidden.bfloat16()


def plant_tokens(informative: str, num_prompts: int = 60, seed: int = 0) -> Planted:
    """Three responses a prompt: chosen, rejected, and one without a pair; the first token of each
    is outside its side and follows the opposite rule.

    Args:
        informative: `choices`, `logprobs` or `token_ids`, that which tells the chosen side.
    """
    generator = torch.Generator().manual_seed(seed)
    unembedding = torch.randn(VOCAB, WIDTH, generator=generator)
    starts, pairs, parts = {}, [], []
    for number in range(num_prompts):
        prompt = f"t/{number}"
        for sample in range(3):
            start = (3 * number + sample) * NUM_TOKENS
            starts[(prompt, sample)] = (start, start + NUM_TOKENS)
            hidden = draw_hidden(NUM_TOKENS, generator)
            right = find_right(hidden)
            right[0] = 2 - right[0]
            choices = torch.randint(3, (NUM_TOKENS,), generator=generator)
            logprobs = -2 * torch.rand(NUM_TOKENS, 3, generator=generator)
            logits = hidden.float() @ unembedding.T
            token_ids = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
            if sample == 1 and informative == "choices":
                lucky = torch.rand(NUM_TOKENS, generator=generator) < 0.8
                choices = torch.where(lucky, right, choices)
            if sample == 1 and informative == "logprobs":
                logprobs[torch.arange(NUM_TOKENS), right] += 3
            if sample == 1 and informative == "token_ids":
                token_ids = torch.where(right == 0, logits.argmax(1), logits.argmin(1))
            parts.append((hidden, choices, logprobs, token_ids))
        sides = [Side(prompt, sample, 1, NUM_TOKENS) for sample in (1, 2)]
        pairs.append(Pair("t", "r", *sides))
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return Planted(Features(TEMPERATURES, *columns, starts), pairs, unembedding)


def plant_sequences(informative: str, num_prompts: int = 120, seed: int = 0) -> Planted:
    """As `plant_tokens`, with one row a response, whose state is its prompt's."""
    generator = torch.Generator().manual_seed(seed)
    hidden = draw_hidden(num_prompts, generator).repeat_interleave(2, dim=0)
    right = find_right(hidden)
    chosen = torch.arange(2 * num_prompts) % 2 == 1
    choices = torch.randint(3, right.shape, generator=generator)
    logprobs = -50 - 2 * torch.rand(len(right), 3, generator=generator)
    lucky = chosen & (torch.rand(right.shape, generator=generator) < 0.8)
    if informative == "choices":
        choices = torch.where(lucky, right, choices)
    else:
        logprobs[torch.arange(len(right)), right] += 3 * chosen
    features = Features(
        TEMPERATURES,
        hidden,
        choices,
        logprobs,
        torch.zeros_like(choices),
        {(f"s/{row // 2}", row % 2): (row, row + 1) for row in range(len(right))},
    )
    pairs = [
        # A side's tokens are those of the response, of which there is no row each.
        Pair("s", "r", Side(f"s/{n}", 1, 0, 40), Side(f"s/{n}", 0, 0, 7))
        for n in range(num_prompts)
    ]
    return Planted(features, pairs, torch.zeros(VOCAB, WIDTH))


def make_recipe(**changes: Any) -> HeadRecipe:
    settings: dict[str, Any] = {
        "level": "token",
        "temperatures": TEMPERATURES,
        "layers": (16,),
        "learning_rate": 0.01,
        "batch_size": 16,
        "max_epochs": 4,
        "validation_share": 0.2,
    }
    return HeadRecipe(**settings | changes)


def fit(folder: Path, planted: Planted, recipe: HeadRecipe, **changes: Any) -> TrainingResult:
    arguments: dict[str, Any] = {
        "identity": IDENTITY,
        "provenance": {"from": "a test"},
        "unembedding": planted.unembedding,
        "progress": False,
    }
    return train_head(recipe, planted.features, planted.pairs, folder, **arguments | changes)


def read_weights(folder: Path) -> bytes:
    return (folder / "head" / "head.safetensors").read_bytes()


def read_history(folder: Path) -> list[dict[str, Any]]:
    training = load_head(folder / "head").metadata.training
    assert training is not None
    return training["history"]


def stop_after(monkeypatch, num_epochs: int) -> None:
    """As if the process were killed in the epoch after, some of its batches done."""
    original = trainer.Trainer.run_epoch

    def run_epoch(self, epoch, advance):
        def interrupt():
            if epoch > num_epochs:
                raise KeyboardInterrupt

        return original(self, epoch, interrupt)

    monkeypatch.setattr(trainer.Trainer, "run_epoch", run_epoch)


def forbid_training(monkeypatch) -> None:
    def run_epoch(self, epoch, advance):
        raise AssertionError("it trains")

    monkeypatch.setattr(trainer.Trainer, "run_epoch", run_epoch)


def check_rule(folder: Path) -> None:
    network = load_head(folder / "head").network
    hidden = draw_hidden(400, torch.Generator().manual_seed(99))
    found = network(hidden).argmax(dim=1)
    right = find_right(hidden)
    for expected in (0, 2):
        assert (found == expected)[right == expected].float().mean() > 0.9


INFORMATIVE = {
    "eq10": "choices",
    "centred": "choices",
    "eq9": "choices",
    "nll": "choices",
    "eq11": "logprobs",
    "cross_entropy": "token_ids",
}


@pytest.mark.parametrize("loss", INFORMATIVE)
def test_tokens_teach_the_planted_rule(tmp_path, loss):
    planted = plant_tokens(INFORMATIVE[loss])
    result = fit(tmp_path, planted, make_recipe(loss=loss, max_epochs=25))
    check_rule(tmp_path)
    assert result.validation_loss < result.untrained_loss


@pytest.mark.parametrize("loss", ["eq10", "centred", "eq9", "nll", "eq11"])
def test_sequences_teach_the_planted_rule(tmp_path, loss):
    planted = plant_sequences(INFORMATIVE[loss])
    fit(tmp_path, planted, make_recipe(loss=loss, level="sequence", max_epochs=25))
    check_rule(tmp_path)
    assert load_head(tmp_path / "head").level == "sequence"


@pytest.fixture(scope="module")
def tokens() -> Planted:
    return plant_tokens("choices", num_prompts=40)


def test_the_head_says_how_it_was_made(tmp_path, tokens):
    recipe = make_recipe(loss="eq9", beta=0.5)
    result = fit(tmp_path, tokens, recipe)
    metadata = load_head(tmp_path / "head").metadata
    assert (metadata.level, metadata.trained, metadata.base_model) == ("token", True, IDENTITY)
    assert (metadata.temperatures, metadata.layer_sizes) == (TEMPERATURES, (16,))
    training = metadata.training
    assert training is not None
    assert training["loss"] == "eq9"
    assert HeadRecipe.model_validate(training["recipe"]) == recipe
    assert training["provenance"] == {"from": "a test"}
    assert (training["num_pairs"], training["num_validation_pairs"]) == (32, 8)
    assert (training["epochs"], training["best_epoch"]) == (result.epochs, result.best_epoch)
    assert training["validation_loss"] == result.validation_loss
    assert len(training["history"]) == result.epochs + 1
    assert training["history"][0]["train_loss"] is None
    assert training["temperature_shares"].keys() == {"0.2", "0.6", "1.0"}
    assert sum(training["expected_temperature_shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"length_normalised": True},
        {"beta": 3.0},
        {"mean_penalty": 5.0, "loss": "nll"},
        {"loss": "eq9"},
        {"loss": "centred"},
    ],
    ids=str,
)
def test_the_result_is_what_the_saved_head_does_on_validation(tmp_path, tokens, changes):
    shorter = [
        replace(pair, rejected=replace(pair.rejected, stop=NUM_TOKENS - 2)) for pair in tokens.pairs
    ]
    planted = replace(tokens, pairs=shorter)
    recipe = make_recipe(**changes)
    result = fit(tmp_path, planted, recipe)
    network = load_head(tmp_path / "head").network
    all_rows, losses, wins = [], [], []
    for index in split_pairs(shorter, 0.2, seed=0)[1]:
        scores = []
        for side in (shorter[index].chosen, shorter[index].rejected):
            first = planted.features.starts[side.key][0]
            rows = torch.arange(first + side.start, first + side.stop)
            log_p = network(planted.features.hidden[rows]).log_softmax(1)
            terms = log_p[torch.arange(len(rows)), planted.features.choices[rows]]
            if recipe.loss == "eq9":
                terms = terms + math.log(3)
            elif recipe.loss == "centred":
                terms = terms - log_p.mean(1)
            score = math.fsum(terms)
            scores.append(score / len(rows) if recipe.length_normalised else score)
            all_rows.append(log_p)
        margin = scores[0] - scores[1]
        wins.append(margin > 0)
        losses.append(
            -scores[0] if recipe.loss == "nll" else math.log1p(math.exp(-recipe.beta * margin))
        )
    log_p = torch.cat(all_rows)
    p = log_p.exp()
    penalty = (p * (p / p.mean(0)).log()).sum(1).mean().item()
    chosen = [TEMPERATURES[index] for index in log_p.argmax(1).tolist()]
    loss = sum(losses) / len(losses) + recipe.mean_penalty * penalty
    assert result.validation_loss == pytest.approx(loss, rel=1e-4)
    assert result.validation_accuracy == pytest.approx(sum(wins) / len(wins))
    assert result.mean_temperature == pytest.approx(sum(chosen) / len(chosen))
    for temperature, share in result.temperature_shares.items():
        assert share == pytest.approx(chosen.count(float(temperature)) / len(chosen))
    expected = (p @ torch.tensor(TEMPERATURES)).tolist()
    training, below = load_head(tmp_path / "head").metadata.training, -1.0
    for bound, share in training["expected_temperature_shares"].items():
        num = sum(below < mean <= float(bound) for mean in expected)
        assert share == pytest.approx(num / len(expected), abs=1 / len(expected))
        below = float(bound)


def test_ties_are_half_won(tmp_path):
    planted = plant_sequences("choices", num_prompts=20)
    same = replace(planted.features, choices=torch.ones_like(planted.features.choices))
    result = fit(tmp_path, replace(planted, features=same), make_recipe(level="sequence"))
    assert result.validation_accuracy == 0.5


def test_the_penalty_on_adaptation_makes_the_head_adapt_less(tmp_path, tokens):
    spreads = []
    for penalty in (0.0, 20.0):
        folder = tmp_path / str(penalty)
        fit(folder, tokens, make_recipe(max_epochs=10, mean_penalty=penalty))
        hidden = draw_hidden(100, torch.Generator().manual_seed(5))
        p = load_head(folder / "head").network(hidden).softmax(1)
        spreads.append(p.std(dim=0).max().item())
    assert spreads[1] < 0.2 * spreads[0]


@pytest.mark.parametrize("loss", INFORMATIVE)
def test_training_is_deterministic(tmp_path, tokens, loss):
    recipe = make_recipe(loss=loss, max_epochs=2)
    first = fit(tmp_path / "first", tokens, recipe)
    second = fit(tmp_path / "second", tokens, recipe)
    assert read_weights(tmp_path / "first") == read_weights(tmp_path / "second")
    assert replace(first, seconds=0) == replace(second, seconds=0)
    fit(tmp_path / "third", tokens, recipe.model_copy(update={"seed": 1}))
    assert read_weights(tmp_path / "first") != read_weights(tmp_path / "third")


def test_epochs_differ_in_the_order_of_their_pairs(tmp_path, monkeypatch, tokens):
    packed: list[list[int]] = []
    original = pair_rows.PairRows.pack

    def pack(self, pairs, device):
        packed.append(list(pairs))
        return original(self, pairs, device)

    monkeypatch.setattr(pair_rows.PairRows, "pack", pack)
    fit(tmp_path, tokens, make_recipe(max_epochs=2))
    validation, *batches = packed
    assert [len(batch) for batch in batches] == [16, 16, 16, 16]
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert sorted(first) == sorted(second) == sorted(set(range(40)) - set(validation))
    assert first != second
    assert first != sorted(first)


def test_rows_that_stay_on_disk_train_the_same_head(tmp_path, monkeypatch, tokens):
    recipe = make_recipe(loss="cross_entropy")
    fit(tmp_path / "memory", tokens, recipe)
    monkeypatch.setattr(pair_rows, "_MAX_BYTES_IN_MEMORY", 0)
    fit(tmp_path / "disk", tokens, recipe)
    assert read_weights(tmp_path / "memory") == read_weights(tmp_path / "disk")


@pytest.mark.parametrize("loss", ["eq10", "cross_entropy"])
def test_a_killed_fit_starts_again_and_gives_the_same_head(tmp_path, monkeypatch, tokens, loss):
    recipe = make_recipe(loss=loss)
    whole = fit(tmp_path / "whole", tokens, recipe)
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "killed", tokens, recipe)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["tensorboard"]
    again = fit(tmp_path / "killed", tokens, recipe)
    assert read_weights(tmp_path / "whole") == read_weights(tmp_path / "killed")
    assert replace(whole, seconds=0) == replace(again, seconds=0)
    assert read_history(tmp_path / "whole") == read_history(tmp_path / "killed")


def test_a_finished_head_is_not_trained_again(tmp_path, monkeypatch, capsys, tokens):
    recipe = make_recipe()
    first = fit(tmp_path, tokens, recipe)
    forbid_training(monkeypatch)
    assert fit(tmp_path, tokens, recipe, provenance={"from": "elsewhere"}) == first
    assert capsys.readouterr().err == ""


def test_a_head_gets_a_probe_once_it_is_trained(tmp_path, tokens):
    generator = torch.Generator().manual_seed(0)
    precise = torch.randn(3, WIDTH, generator=generator)
    states = ProbeStates(((1,), (2, 3), (4,)), precise, precise.bfloat16())
    read = []

    def read_probe_states() -> ProbeStates:
        read.append(True)
        return states

    for _ in range(2):
        fit(tmp_path, tokens, make_recipe(), read_probe_states=read_probe_states)
    assert len(read) == 1, "the model was loaded for a finished head"
    head = load_head(tmp_path / "head")
    assert head.metadata.probe == make_probe(head.network, states)
    fit(tmp_path / "large", tokens, make_recipe(), read_probe_states=lambda: None)
    assert load_head(tmp_path / "large" / "head").metadata.probe is None


@pytest.mark.parametrize("change", ["recipe", "pairs", "model", "features", "width", "damage"])
def test_anything_else_is_trained_anew(tmp_path, capsys, tokens, change):
    recipe, planted, identity = make_recipe(max_epochs=1), tokens, IDENTITY
    fit(tmp_path, planted, recipe)
    features = planted.features
    if change == "recipe":
        recipe = recipe.model_copy(update={"learning_rate": 0.02})
    elif change == "pairs":
        first, *others = planted.pairs
        turned = replace(first, chosen=first.rejected, rejected=first.chosen)
        planted = replace(planted, pairs=[turned, *others])
    elif change == "model":
        identity = BaseModelIdentity(name="tiny", fingerprint="fedcba9876543210")
    elif change == "features":
        choices = features.choices.clone()
        choices[features.starts["t/0", 1][0] + 1] += 1
        planted = replace(planted, features=replace(features, choices=choices % 3))
    elif change == "width":
        hidden = torch.cat([features.hidden, features.hidden], dim=1)
        planted = replace(planted, features=replace(features, hidden=hidden))
    else:
        (tmp_path / "head" / "head.safetensors").write_bytes(b"")
    before = read_weights(tmp_path)
    fit(tmp_path, planted, recipe, identity=identity)
    noted = "trained again" if change == "damage" else "will be replaced"
    assert noted in capsys.readouterr().err
    after = load_head(tmp_path / "head").metadata
    assert after.base_model == identity
    assert (read_weights(tmp_path) != before) == (change != "model")


def make_noise() -> tuple[Planted, HeadRecipe]:
    """Pairs that teach nothing, and a head that learns them by heart."""
    planted = plant_tokens("nothing", num_prompts=24, seed=3)
    return planted, make_recipe(max_epochs=60, patience=3, learning_rate=0.03)


def test_training_stops_when_validation_stops_improving(tmp_path):
    planted, recipe = make_noise()
    result = fit(tmp_path, planted, recipe)
    assert result.epochs == result.best_epoch + 3 < 60
    history = read_history(tmp_path)
    losses = [epoch["validation_loss"] for epoch in history]
    assert min(losses) == losses[result.best_epoch] == result.validation_loss
    assert history[-1]["train_loss"] < history[1]["train_loss"]


def test_the_head_is_that_of_the_best_epoch(tmp_path):
    planted, recipe = make_noise()
    result = fit(tmp_path / "whole", planted, recipe)
    assert result.best_epoch < result.epochs
    fit(tmp_path / "best", planted, recipe.model_copy(update={"max_epochs": result.best_epoch}))
    assert read_weights(tmp_path / "whole") == read_weights(tmp_path / "best")


def test_a_head_that_learnt_nothing_is_saved_untrained(tmp_path, capsys, tokens):
    """Validation prefers the opposite of training, so that every epoch is worse than none."""
    held_out = set(split_pairs(tokens.pairs, 0.2, seed=0)[1])
    pairs = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if index in held_out else pair
        for index, pair in enumerate(tokens.pairs)
    ]
    recipe = make_recipe(patience=2)
    result = fit(tmp_path, replace(tokens, pairs=pairs), recipe)
    assert (result.best_epoch, result.epochs) == (0, 2)
    assert result.untrained_loss == result.validation_loss
    assert "nothing was learnt" in capsys.readouterr().err
    head = load_head(tmp_path / "head")
    assert not head.metadata.trained
    for name, weights in AdaptiveHead(head.network.config, recipe.seed).state_dict().items():
        assert torch.allclose(head.network.state_dict()[name], weights)
    # A finished run says so again.
    assert fit(tmp_path, replace(tokens, pairs=pairs), recipe) == result
    assert "nothing was learnt" in capsys.readouterr().err


def test_the_training_loss_is_a_mean_over_pairs(tmp_path, tokens):
    fit(tmp_path, tokens, make_recipe(max_epochs=1, batch_size=10, learning_rate=1e-9))
    assert read_history(tmp_path)[1]["train_loss"] == pytest.approx(math.log(2), abs=0.02)


def test_training_starts_from_the_head_of_the_seed(tmp_path, tokens):
    recipe = make_recipe(seed=7, max_epochs=1, learning_rate=1e-9)
    fit(tmp_path, tokens, recipe)
    network = load_head(tmp_path / "head").network
    for name, weights in AdaptiveHead(network.config, seed=7).state_dict().items():
        assert torch.allclose(network.state_dict()[name], weights, atol=1e-6)


def test_weights_decay(tmp_path, tokens):
    sizes = []
    for decay in (0.0, 30.0):
        fit(tmp_path / str(decay), tokens, make_recipe(weight_decay=decay))
        network = load_head(tmp_path / str(decay) / "head").network
        sizes.append(sum(weights.square().sum().item() for weights in network.parameters()))
    assert sizes[1] < 0.5 * sizes[0]


def test_cross_entropy_drops_at_random_in_training_and_in_expectation_in_validation(
    tmp_path, monkeypatch, tokens
):
    calls = []
    original = trainer.weigh_positions

    def weigh_positions(right, generator):
        calls.append(generator)
        return original(right, generator)

    monkeypatch.setattr(trainer, "weigh_positions", weigh_positions)
    result = fit(tmp_path, tokens, make_recipe(loss="cross_entropy", max_epochs=1))
    assert [generator is None for generator in calls] == [True, False, False, True]
    network = load_head(tmp_path / "head").network
    total, weights = 0.0, 0.0
    for index in split_pairs(tokens.pairs, 0.2, seed=0)[1]:
        side = tokens.pairs[index].chosen
        first = tokens.features.starts[side.key][0]
        for row in range(first + side.start, first + side.stop):
            hidden, token = tokens.features.hidden[row], tokens.features.token_ids[row]
            p = network(hidden.unsqueeze(0)).softmax(1)[0].tolist()
            soft = math.fsum(a * b for a, b in zip(p, TEMPERATURES, strict=True))
            logits = tokens.unembedding @ hidden.float()
            weight = 0.4 if logits.argmax() == token else 1.0
            weights += weight
            loss = -(logits / soft).log_softmax(0)[token].item()
            total += weight * logits.softmax(0)[token].item() * loss
    assert result.validation_loss == pytest.approx(total / weights, rel=1e-4)


def test_training_lasts_max_epochs_at_most(tmp_path, tokens):
    assert fit(tmp_path, tokens, make_recipe(max_epochs=3)).epochs == 3


def read_logs(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_epoch_is_in_the_logs_once(tmp_path, monkeypatch, tokens):
    recipe = make_recipe(max_epochs=4)
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, tokens, recipe)
    fit(tmp_path, tokens, recipe)
    logs = read_logs(tmp_path)
    history = read_history(tmp_path)
    for tag, name in {
        "loss/training": "train_loss",
        "loss/validation": "validation_loss",
        "pair_accuracy": "accuracy",
        "mean_temperature": "mean_temperature",
        "entropy_of_mean": "entropy_of_mean",
    }.items():
        assert [step for step, _ in logs[tag]] == [1, 2, 3, 4]
        assert [value for _, value in logs[tag]] == pytest.approx([e[name] for e in history[1:]])
    assert [value for _, value in logs["argmax/0.6"]] == pytest.approx(
        [epoch["shares"][1] for epoch in history[1:]]
    )


def test_the_mean_distribution_of_an_untrained_head_has_the_entropy_of_a_uniform_one(
    tmp_path, tokens
):
    fit(tmp_path, tokens, make_recipe(max_epochs=1))
    untrained = read_history(tmp_path)[0]
    assert untrained["entropy_of_mean"] == pytest.approx(math.log(3), abs=1e-3)


def test_the_bar_goes_to_stderr_and_can_be_off(tmp_path, capsys, tokens):
    fit(tmp_path / "on", tokens, make_recipe(max_epochs=1), progress=True)
    shown = capsys.readouterr()
    assert "validation" in shown.err
    assert shown.out == ""
    fit(tmp_path / "off", tokens, make_recipe(max_epochs=1), progress=False)
    assert capsys.readouterr() == ("", "")


def make_pair(prompt: int, number: int) -> Pair:
    sides = [Side(f"p{prompt}", sample, number, number + 1) for sample in (0, 1)]
    return Pair("t", "r", *sides)


@pytest.mark.parametrize("num_prompts", [2, 3, 10, 50])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_no_prompt_is_both_trained_and_validated_on(num_prompts, share):
    pairs = [make_pair(prompt, number) for number in range(4) for prompt in range(num_prompts)]
    training, validation = split_pairs(pairs, share, seed=1)
    assert sorted(training + validation) == list(range(len(pairs)))
    prompts = [{pairs[i].chosen.prompt_id for i in part} for part in (training, validation)]
    assert prompts[0].isdisjoint(prompts[1])
    assert prompts[0]
    assert prompts[1]
    expected = min(max(round(share * num_prompts), 1), num_prompts - 1)
    assert len(prompts[1]) == expected


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_pairs():
    pairs = [make_pair(prompt, 0) for prompt in range(30)]

    def held_out(pairs, seed):
        return {pairs[index].chosen.prompt_id for index in split_pairs(pairs, 0.3, seed)[1]}

    assert held_out(pairs, 1) == held_out(pairs[::-1], 1)
    assert held_out(pairs, 1) != held_out(pairs, 2)


def test_too_few_prompts(tmp_path, tokens):
    for pairs in ([], tokens.pairs[:1], tokens.pairs[:1] * 3):
        with pytest.raises(ValueError, match=rf"two prompts.*there are {len(pairs)} pairs"):
            fit(tmp_path, replace(tokens, pairs=pairs), make_recipe())
    fit(tmp_path, replace(tokens, pairs=tokens.pairs[:2]), make_recipe(max_epochs=1))


def test_features_of_other_temperatures(tmp_path, tokens):
    recipe = make_recipe(temperatures=(0.0, 0.6, 1.0))
    with pytest.raises(ValueError, match=r"\(0.2, 0.6, 1.0\).*\(0.0, 0.6, 1.0\)"):
        fit(tmp_path, tokens, recipe)


def test_cross_entropy_needs_tokens_and_an_unembedding(tmp_path, tokens):
    recipe = make_recipe(loss="cross_entropy")
    for unembedding in (None, torch.zeros(VOCAB, WIDTH + 1), torch.zeros(WIDTH)):
        with pytest.raises(ValueError, match=r"needs the unembedding, a matrix \[vocab, 4\]"):
            fit(tmp_path, tokens, recipe, unembedding=unembedding)
    with pytest.raises(ValueError, match="the level must be token"):
        fit(tmp_path, plant_sequences("choices"), recipe.model_copy(update={"level": "sequence"}))


def forget_logprobs(planted: Planted) -> Planted:
    logprobs = torch.full_like(planted.features.logprobs, math.nan)
    return replace(planted, features=replace(planted.features, logprobs=logprobs))


@pytest.mark.parametrize("loss", sorted(INFORMATIVE.keys() - {"eq11"}))
def test_only_eq11_reads_log_probabilities(tmp_path, tokens, loss):
    recipe = make_recipe(loss=loss, max_epochs=1)
    fit(tmp_path / "with", tokens, recipe)
    fit(tmp_path / "without", forget_logprobs(tokens), recipe)
    assert read_weights(tmp_path / "with") == read_weights(tmp_path / "without")


def test_eq11_needs_log_probabilities(tmp_path, tokens):
    with pytest.raises(ValueError, match="eq11 needs features that hold log-probabilities"):
        fit(tmp_path, forget_logprobs(tokens), make_recipe(loss="eq11"))


def test_pairs_of_responses_without_features(tmp_path, tokens):
    stranger = replace(tokens.pairs[0], rejected=Side("t/0", 7, 1, NUM_TOKENS))
    with pytest.raises(ValueError, match="no features of sample 7 of prompt t/0"):
        fit(tmp_path, replace(tokens, pairs=[stranger, *tokens.pairs]), make_recipe())


@pytest.mark.parametrize(("start", "stop"), [(0, NUM_TOKENS + 1), (-1, 2), (2, 2)])
def test_pairs_of_tokens_without_features(tmp_path, tokens, start, stop):
    beyond = replace(tokens.pairs[0], chosen=Side("t/0", 1, start, stop))
    with pytest.raises(ValueError, match=rf"tokens \[{start}, {stop}\) of sample 1 of prompt t/0"):
        fit(tmp_path, replace(tokens, pairs=[beyond, *tokens.pairs]), make_recipe())


def test_features_of_tokens_do_not_train_a_sequence_level_head(tmp_path, tokens):
    with pytest.raises(ValueError, match="has 5 rows"):
        fit(tmp_path, tokens, make_recipe(level="sequence"))


def break_hidden(planted: Planted, index: int) -> Planted:
    pair = planted.pairs[index]
    hidden = planted.features.hidden.clone()
    hidden[planted.features.starts[pair.chosen.key][0] + 1] = math.nan
    return replace(planted, features=replace(planted.features, hidden=hidden))


def test_a_loss_that_is_not_a_number_names_the_epoch(tmp_path, tokens):
    training, validation = split_pairs(tokens.pairs, 0.2, seed=0)
    with pytest.raises(TrainingError, match="training loss is nan in epoch 1"):
        fit(tmp_path, break_hidden(tokens, training[0]), make_recipe())
    with pytest.raises(TrainingError, match="validation loss is nan in epoch 0"):
        fit(tmp_path, break_hidden(tokens, validation[0]), make_recipe())
    assert not (tmp_path / "head").exists()
