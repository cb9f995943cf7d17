"""The losses against the same equations in Python numbers, loop by loop."""

import math

import pytest
import torch

from adaptive_head.lpo import losses
from adaptive_head.lpo.losses import (
    PackedSide,
    compare_sides,
    compute_cross_entropy,
    compute_mean_penalty,
    compute_nll,
    compute_token_losses,
    read_base_model,
    score_centred,
    score_eq9,
    score_eq10,
    score_eq11,
    soften_temperature,
    weigh_positions,
)
from tests.reference import softmax

LENGTHS = (3, 1, 4)
SCORES = {"eq10": score_eq10, "centred": score_centred, "eq9": score_eq9, "eq11": score_eq11}
TEMPERATURES = torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_logits(seed: int, num_rows: int, num_temperatures: int = 3) -> torch.Tensor:
    shape = (num_rows, num_temperatures)
    return 2 * torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)


def pack(logits: torch.Tensor, seed: int, lengths: tuple[int, ...] = LENGTHS) -> PackedSide:
    """Random choices and tokens; a third of the latter are impossible at the first temperature."""
    generator = make_generator(seed + 1000)
    num_rows, num_temperatures = logits.shape
    logprobs = -4 * torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    logprobs[torch.rand(num_rows, generator=generator) < 1 / 3, 0] = -math.inf
    return PackedSide(
        log_p=logits.log_softmax(dim=1),
        choices=torch.randint(num_temperatures, (num_rows,), generator=generator),
        logprobs=logprobs,
        segments=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        num_pairs=len(lengths),
    )


def log_sum(values) -> float:
    return math.log(math.fsum(values))


def score_slowly(name: str, side: PackedSide, normalised: bool) -> list[float]:
    terms: list[list[float]] = [[] for _ in range(side.num_pairs)]
    num_temperatures = side.log_p.shape[1]
    for row, segment in enumerate(side.segments.tolist()):
        p = [math.exp(value) for value in side.log_p[row].tolist()]
        chosen = p[int(side.choices[row])]
        likelihood = [math.exp(value) for value in side.logprobs[row].tolist()]
        mixed = math.fsum(a * b for a, b in zip(p, likelihood, strict=True))
        reference = math.fsum(likelihood) / num_temperatures
        term = {
            "eq10": lambda: math.log(chosen),  # noqa: B023
            "centred": lambda: math.log(chosen) - math.fsum(map(math.log, p)) / len(p),  # noqa: B023
            "eq9": lambda: math.log(chosen / (1 / num_temperatures)),  # noqa: B023
            "eq11": lambda: math.log(mixed / reference),  # noqa: B023
        }[name]()
        terms[segment].append(term)
    sums = [math.fsum(values) for values in terms]
    return [s / len(v) for s, v in zip(sums, terms, strict=True)] if normalised else sums


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_scores_agree_with_python_numbers(name, normalised, seed):
    side = pack(make_logits(seed, sum(LENGTHS)), seed)
    assert side.logprobs.isinf().any()
    found = SCORES[name](side, normalised=normalised)
    assert found.tolist() == pytest.approx(score_slowly(name, side, normalised), rel=1e-9)


@pytest.mark.parametrize("normalised", [False, True])
def test_nll_is_of_the_chosen_temperatures(normalised):
    side = pack(make_logits(2, sum(LENGTHS)), 2)
    expected = [-value for value in score_slowly("eq10", side, normalised)]
    assert compute_nll(side, normalised=normalised).tolist() == pytest.approx(expected)


def test_rows_of_a_pair_need_not_be_neighbours():
    side = pack(make_logits(3, sum(LENGTHS)), 3)
    order = torch.randperm(sum(LENGTHS), generator=make_generator(3))
    mixed = PackedSide(
        side.log_p[order], side.choices[order], side.logprobs[order], side.segments[order], 3
    )
    assert torch.allclose(score_eq10(mixed), score_eq10(side))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("normalised", [False, True])
def test_a_side_without_rows_scores_nothing(name, normalised):
    side = pack(make_logits(3, 2), 3, lengths=(2, 0))
    scores = SCORES[name](side, normalised=normalised)
    assert scores[0] != 0
    assert scores[1] == 0


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_two_scores_make_a_bradley_terry_loss(beta):
    chosen, rejected = torch.tensor([0.0, -2.5, 4.0]), torch.tensor([0.0, 1.5, -1.0])
    expected = [
        -math.log(1 / (1 + math.exp(-beta * (c - r))))
        for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert compare_sides(chosen, rejected, beta).tolist() == pytest.approx(expected, rel=1e-5)


def test_large_margins_neither_overflow_nor_vanish():
    scores = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    found = compare_sides(scores, torch.zeros(2), 1.0)
    found.sum().backward()
    assert found.tolist() == [1000.0, 0.0]
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, 0.0]


def compute_pair_loss(name: str, chosen_logits, rejected_logits, normalised=False, beta=0.7):
    score = SCORES[name]
    chosen = pack(chosen_logits, 5, lengths=(2, 1))
    rejected = pack(rejected_logits, 6, lengths=(1, 3))
    return compare_sides(
        score(chosen, normalised=normalised), score(rejected, normalised=normalised), beta
    )


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_gradients_of_the_preference_losses(name, normalised):
    assert pack(make_logits(1, 4), 6, (1, 3)).logprobs.isinf().any()
    logits = [make_logits(1, 3).requires_grad_(), make_logits(2, 4).requires_grad_()]
    assert torch.autograd.gradcheck(lambda c, r: compute_pair_loss(name, c, r, normalised), logits)


def test_gradients_of_the_one_sided_losses():
    logits = make_logits(1, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: compute_nll(pack(x, 1)), logits)
    assert torch.autograd.gradcheck(lambda x: compute_mean_penalty(x.log_softmax(1)), logits)


def test_eq10_of_a_sequence_is_bradley_terry_on_the_logits():
    logits = make_logits(4, 5)
    segments, unused = torch.arange(5), torch.zeros(5, 3)
    sides = [
        PackedSide(logits.log_softmax(1), torch.tensor(choices), unused, segments, 5)
        for choices in ([0, 1, 2, 0, 2], [1, 2, 0, 2, 1])
    ]
    found = compare_sides(score_eq10(sides[0]), score_eq10(sides[1]), 0.5)
    for row, (c, r) in enumerate(zip([0, 1, 2, 0, 2], [1, 2, 0, 2, 1], strict=True)):
        margin = 0.5 * (logits[row, c] - logits[row, r]).item()
        assert found[row].item() == pytest.approx(math.log(1 + math.exp(-margin)))


def test_a_sequence_pair_of_one_temperature_teaches_eq10_nothing():
    for rejected_choice, is_zero in ((1, True), (2, False)):
        logits = make_logits(4, 1).requires_grad_()
        log_p = logits.log_softmax(1)
        segments, unused = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3)
        chosen = PackedSide(log_p, torch.tensor([1]), unused, segments, 1)
        rejected = PackedSide(log_p, torch.tensor([rejected_choice]), unused, segments, 1)
        compare_sides(score_eq10(chosen), score_eq10(rejected), 1.0).sum().backward()
        assert logits.grad is not None
        assert (logits.grad.abs().max() < 1e-15) == is_zero


def test_eq9_is_eq10_for_sides_of_one_length():
    chosen, rejected = (pack(make_logits(seed, 6), seed, lengths=(2, 4)) for seed in (7, 8))
    eq10, eq9 = (compare_sides(s(chosen), s(rejected), 1.0) for s in (score_eq10, score_eq9))
    assert torch.allclose(eq9, eq10)


def test_eq9_alone_does_not_mind_length_under_a_uniform_head():
    long, short = pack(torch.zeros(5, 3), 1, (5,)), pack(torch.zeros(2, 3), 1, (2,))
    assert score_eq9(long).item() == pytest.approx(score_eq9(short).item(), abs=1e-6)
    assert score_eq10(long).item() == pytest.approx(-5 * math.log(3))
    assert score_eq10(short).item() == pytest.approx(-2 * math.log(3))


def test_centred_is_eq10_for_sides_of_one_state():
    logits = make_logits(13, 4)
    chosen, rejected = (pack(logits, seed, lengths=(1, 1, 1, 1)) for seed in (13, 14))
    assert not torch.equal(chosen.choices, rejected.choices)
    eq10, centred = (s(chosen) - s(rejected) for s in (score_eq10, score_centred))
    assert torch.allclose(centred, eq10)


def test_uniform_choices_score_nothing_on_average_when_centred():
    log_p = make_logits(14, 1).log_softmax(1).expand(3, 3)
    segments = torch.zeros(3, dtype=torch.int64)
    side = PackedSide(log_p, torch.arange(3), torch.zeros(3, 3), segments, 1)
    assert score_centred(side).item() == pytest.approx(0, abs=1e-12)
    assert score_eq10(side).item() < -3 * math.log(3)


def test_eq11_is_zero_for_a_head_that_is_its_reference():
    assert score_eq11(pack(torch.zeros(8, 3).double(), 1)).tolist() == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("offset", [-50_000.0, 300.0])
def test_eq11_keeps_its_precision_when_a_whole_response_is_one_row(offset):
    side = pack(make_logits(9, 3).float(), 9, lengths=(1, 1, 1))
    # In steps that float32 still resolves beside the offset.
    logprobs = (side.logprobs.float() * 256).round() / 256
    plain = PackedSide(side.log_p, side.choices, logprobs, side.segments, 3)
    shifted = PackedSide(side.log_p, side.choices, logprobs + offset, side.segments, 3)
    assert torch.allclose(score_eq11(shifted), score_eq11(plain), atol=1e-6)


def test_an_impossible_token_says_nothing_to_eq11():
    logits = make_logits(10, 3).requires_grad_()
    side = pack(logits, 10, lengths=(2, 1))
    logprobs = side.logprobs.clone()
    logprobs[0] = -math.inf
    logprobs[2] = -math.inf
    odd = PackedSide(side.log_p, side.choices, logprobs, side.segments, 2)
    scores = score_eq11(odd)
    scores.sum().backward()
    only = PackedSide(side.log_p[1:2], side.choices[1:2], logprobs[1:2], torch.tensor([0]), 1)
    assert scores[0].item() == pytest.approx(score_slowly("eq11", only, False)[0])
    assert scores[1].item() == pytest.approx(0, abs=1e-12)
    assert logits.grad is not None
    assert logits.grad[[0, 2]].abs().max() < 1e-12
    assert logits.grad[1].abs().max() > 1e-3


def test_eq11_of_a_token_that_one_temperature_alone_allows():
    logits = make_logits(11, 1).requires_grad_()
    logprobs = torch.tensor([[-math.inf, -7.0, -math.inf]])
    segments = torch.tensor([0])
    side = PackedSide(logits.log_softmax(1), torch.tensor([0]), logprobs, segments, 1)
    score = score_eq11(side)
    score.sum().backward()
    p = softmax(logits[0].tolist())
    assert score.item() == pytest.approx(math.log(3 * p[1]))
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-p[0], 1 - p[1], -p[2]])


def test_normalisation_takes_length_away():
    logits = make_logits(12, 3)
    once = pack(logits, 12, lengths=(3,))
    twice = PackedSide(
        once.log_p.repeat(2, 1),
        once.choices.repeat(2),
        once.logprobs.repeat(2, 1),
        once.segments.repeat(2),
        1,
    )
    for score in SCORES.values():
        assert torch.allclose(score(twice), 2 * score(once))
        assert torch.allclose(score(twice, normalised=True), score(once, normalised=True))
        assert torch.allclose(score(once, normalised=True), score(once) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_penalty_agrees_with_python_numbers(seed):
    log_p = make_logits(seed, 6).log_softmax(1)
    rows = [[math.exp(value) for value in row] for row in log_p.tolist()]
    mean = [math.fsum(column) / 6 for column in zip(*rows, strict=True)]
    divergences = [
        math.fsum(p * math.log(p / m) for p, m in zip(row, mean, strict=True)) for row in rows
    ]
    assert compute_mean_penalty(log_p).item() == pytest.approx(math.fsum(divergences) / 6)


def test_the_mean_penalty_is_zero_without_adaptation_and_log_k_with_all_of_it():
    same = make_logits(1, 1).log_softmax(1).expand(5, 3)
    assert compute_mean_penalty(same).item() == pytest.approx(0, abs=1e-12)
    apart = (1000 * torch.eye(3)).log_softmax(1)
    assert compute_mean_penalty(apart).item() == pytest.approx(math.log(3))


def make_tokens(seed: int, num_rows: int = 7, width: int = 4, vocab: int = 5):
    generator = make_generator(seed)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    unembedding = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(vocab, (num_rows,), generator=generator)
    return hidden, token_ids, unembedding


def unembed_slowly(hidden, unembedding) -> list[list[float]]:
    return [
        [math.fsum(a * b for a, b in zip(h, w, strict=True)) for w in unembedding.tolist()]
        for h in hidden.tolist()
    ]


def test_token_losses_agree_with_python_numbers():
    hidden, token_ids, unembedding = make_tokens(1)
    temperature = torch.linspace(0.2, 2.0, 7, dtype=torch.float64)
    expected = [
        -math.log(softmax([value / t for value in logits])[token])
        for logits, t, token in zip(
            unembed_slowly(hidden, unembedding),
            temperature.tolist(),
            token_ids.tolist(),
            strict=True,
        )
    ]
    found = compute_token_losses(temperature, hidden, token_ids, unembedding)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("num_elements", [1, 10, 14])
def test_chunks_change_nothing(monkeypatch, num_elements):
    hidden, token_ids, unembedding = make_tokens(2)
    temperature = torch.linspace(0.2, 2.0, 7, dtype=torch.float64)
    whole = compute_token_losses(temperature, hidden, token_ids, unembedding)
    base = read_base_model(hidden, token_ids, unembedding)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", num_elements)
    assert torch.allclose(
        compute_token_losses(temperature, hidden, token_ids, unembedding), whole, rtol=1e-12
    )
    chunked = read_base_model(hidden, token_ids, unembedding)
    assert torch.allclose(chunked[0], base[0])
    assert torch.equal(chunked[1], base[1])


def test_the_gradient_of_token_losses():
    hidden, token_ids, unembedding = make_tokens(3)
    temperature = torch.linspace(0.2, 2.0, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: compute_token_losses(t, hidden, token_ids, unembedding), temperature
    )


def test_token_losses_are_finite_at_the_lowest_temperature():
    hidden, token_ids, unembedding = (tensor * 20 for tensor in make_tokens(4))
    temperature = torch.full((7,), 0.01, requires_grad=True)
    found = compute_token_losses(temperature, hidden, token_ids // 20, unembedding)
    found.sum().backward()
    assert found.isfinite().all()
    assert temperature.grad is not None
    assert temperature.grad.isfinite().all()


def test_the_soft_temperature_is_the_mean_and_not_zero():
    log_p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).double().log()
    assert soften_temperature(log_p, TEMPERATURES).tolist() == pytest.approx([0.5, 0.01])


def test_the_base_model_is_read_at_temperature_one():
    hidden, token_ids, unembedding = make_tokens(5, num_rows=40)
    probabilities, right = read_base_model(hidden, token_ids, unembedding)
    assert 0 < right.sum() < 40
    for row, logits in enumerate(unembed_slowly(hidden, unembedding)):
        token = int(token_ids[row])
        assert probabilities[row].item() == pytest.approx(softmax(logits)[token], rel=1e-5)
        assert right[row].item() == (logits[token] == max(logits))


def test_sixty_percent_of_what_is_right_is_dropped():
    right = torch.arange(20_000) % 2 == 0
    weights = weigh_positions(right, make_generator(1))
    assert weights[~right].unique().tolist() == [1.0]
    assert weights[right].unique().tolist() == [0.0, 1.0]
    assert weights[right].mean().item() == pytest.approx(0.4, abs=0.02)
    assert torch.equal(weights, weigh_positions(right, make_generator(1)))
    assert not torch.equal(weights, weigh_positions(right, make_generator(2)))


def test_without_draws_positions_have_their_expected_weight():
    weights = weigh_positions(torch.tensor([True, False]), None)
    assert weights.tolist() == pytest.approx([0.4, 1.0])


def test_cross_entropy_agrees_with_python_numbers():
    hidden, token_ids, unembedding = make_tokens(6)
    log_p = make_logits(6, 7).log_softmax(1)
    weights = torch.tensor([1.0, 0.0, 0.4, 1.0, 0.0, 0.4, 1.0], dtype=torch.float64)
    base = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    expected = 0.0
    for row, logits in enumerate(unembed_slowly(hidden, unembedding)):
        p = [math.exp(value) for value in log_p[row].tolist()]
        t = max(0.01, math.fsum(a * b for a, b in zip(p, [0.0, 0.5, 1.5], strict=True)))
        label = softmax([value / t for value in logits])[int(token_ids[row])]
        expected -= weights[row].item() * base[row].item() * math.log(label)
    expected /= math.fsum(weights.tolist())
    found = compute_cross_entropy(
        log_p, TEMPERATURES, hidden, token_ids, unembedding, base, weights
    )
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("weights", [[1.0] * 7, [0.0, 1.0, 0.4, 1.0, 0.0, 1.0, 1.0], [0.0] * 7])
def test_the_gradient_of_cross_entropy(weights):
    hidden, token_ids, unembedding = make_tokens(7)
    arguments = (
        TEMPERATURES,
        hidden,
        token_ids,
        unembedding,
        torch.linspace(0.1, 0.9, 7, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
    )
    logits = make_logits(7, 7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: compute_cross_entropy(x.log_softmax(1), *arguments), logits
    )


def test_cross_entropy_of_nothing_is_zero():
    hidden, token_ids, unembedding = make_tokens(8)
    ones = torch.ones(7, dtype=torch.float64)
    log_p = make_logits(8, 7).log_softmax(1)
    found = compute_cross_entropy(
        log_p, TEMPERATURES, hidden, token_ids, unembedding, ones, 0 * ones
    )
    assert found.item() == 0
