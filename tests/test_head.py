import math

import numpy as np
import pytest
import torch

from adaptive_head.head import (
    AdaptiveHead,
    HeadConfig,
    gumbel_noise,
    select_argmax,
    select_sample,
)
from tests.reference import chi_square, gumbel, mlp, softmax

SIX = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
INT64 = torch.iinfo(torch.int64)


def realistic_hidden_states(num_rows: int, width: int, std: float) -> torch.Tensor:
    """Like a small model's last hidden state: one width has values far above all others."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(num_rows, width, generator=generator) * std
    hidden[:, 5] += 40 * std
    return hidden


@pytest.mark.parametrize("layer_sizes", [(), (24,), (24, 40), (24, 40, 8)])
def test_forward_agrees_with_numpy(layer_sizes):
    head = AdaptiveHead(HeadConfig(16, SIX, layer_sizes), seed=3)
    for layer in head.layers:
        torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(1))
    hidden = realistic_hidden_states(32, 16, std=1.0)
    expected = mlp(head.state_dict(), hidden.numpy())
    np.testing.assert_allclose(head(hidden).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_there_is_one_linear_layer_a_width_and_one_for_the_temperatures():
    head = AdaptiveHead(HeadConfig(576, SIX, (256, 128)))
    assert [tuple(layer.weight.shape) for layer in head.layers] == [
        (256, 576),
        (128, 256),
        (6, 128),
    ]


def test_the_paper_s_layer_sizes_are_the_default():
    assert HeadConfig(8, SIX).layer_sizes == (2048, 2048)


@pytest.mark.parametrize("std", [0.1, 2.0, 5.0])
@pytest.mark.parametrize("layer_sizes", [(256, 256), (2048, 2048)])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_head_is_close_to_uniform(layer_sizes, std, seed):
    head = AdaptiveHead(HeadConfig(576, SIX, layer_sizes), seed=seed)
    with torch.inference_mode():
        probabilities = head(realistic_hidden_states(16, 576, std)).softmax(dim=-1)
    assert (probabilities - 1 / 6).abs().max() < 0.01


def test_an_untrained_head_still_tells_hidden_states_apart():
    head = AdaptiveHead(HeadConfig(64, SIX, (32,)))
    logits = head(realistic_hidden_states(64, 64, std=2.0))
    assert len(logits.argmax(dim=-1).unique()) > 1


def test_the_seed_decides_the_weights():
    first, same, other = (AdaptiveHead(HeadConfig(8, SIX, (4,)), seed=s) for s in (5, 5, 6))
    assert torch.equal(first.layers[0].weight, same.layers[0].weight)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_making_a_head_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    AdaptiveHead(HeadConfig(8, SIX, (4,)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bfloat16_hidden_state_is_computed_in_the_precision_of_the_weights():
    head = AdaptiveHead(HeadConfig(16, SIX, (24,)))
    hidden = realistic_hidden_states(8, 16, std=2.0).bfloat16()
    logits = head(hidden)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(hidden.float()))


def test_a_bfloat16_head_returns_float32():
    head = AdaptiveHead(HeadConfig(16, SIX, (24,))).bfloat16()
    assert head(torch.ones(2, 16)).dtype == torch.float32


def test_no_rows_give_no_logits():
    assert AdaptiveHead(HeadConfig(16, SIX, (4,)))(torch.zeros(0, 16)).shape == (0, 6)


def test_argmax_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [-9.0, -8.0, -7.0]])
    assert select_argmax(logits).tolist() == [1, 0, 2]


def test_sample_adds_the_noise_before_it_takes_the_largest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    noise = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    assert select_sample(logits, noise).tolist() == [1, 0]


def test_gumbel_noise_agrees_with_python_integers():
    seeds = [0, 1, -1, 42, 123456789, 2**62 + 11, INT64.max, INT64.min]
    positions = [0, 1, 2, 31, 4095, 131071, 2**31, 7]
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor(positions), 64)
    expected = [
        [gumbel(seed, position, choice) for choice in range(64)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_gumbel_noise_depends_on_nothing_else_in_the_batch():
    seeds, positions = torch.arange(50) * 977, torch.arange(50) % 7
    batch = gumbel_noise(seeds, positions, 6)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel_noise(seeds[order], positions[order], 6), batch[order])
    alone = gumbel_noise(seeds[13:14], positions[13:14], 6)
    assert torch.equal(alone, batch[13:14])
    # A head with more temperatures draws the same for those that both have.
    assert torch.equal(gumbel_noise(seeds, positions, 9)[:, :6], batch)


def kolmogorov_smirnov(samples: np.ndarray) -> float:
    """sqrt(n) times the distance from the standard Gumbel distribution."""
    samples = np.sort(samples)
    cdf = np.exp(-np.exp(-samples))
    rank = np.arange(len(samples))
    distance = max(np.max((rank + 1) / len(samples) - cdf), np.max(cdf - rank / len(samples)))
    return math.sqrt(len(samples)) * distance


# 1.95 is the 0.1 % point of the Kolmogorov distribution.
def test_gumbel_noise_of_consecutive_seeds_is_standard_gumbel():
    noise = gumbel_noise(torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64), 2)
    assert kolmogorov_smirnov(noise.flatten().numpy()) < 1.95


def test_gumbel_noise_of_consecutive_positions_is_standard_gumbel():
    noise = gumbel_noise(torch.full((20_000,), 42), torch.arange(20_000), 2)
    assert kolmogorov_smirnov(noise.flatten().numpy()) < 1.95


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([first, second]))[0, 1].item()


def test_neighbouring_seeds_positions_and_choices_are_uncorrelated():
    seeds = torch.arange(200).repeat_interleave(200)
    positions = torch.arange(200).repeat(200)
    noise = gumbel_noise(seeds, positions, 3).view(200, 200, 3)
    bound = 4 / math.sqrt(200 * 200)
    assert abs(correlation(noise[1:].flatten(), noise[:-1].flatten())) < bound
    assert abs(correlation(noise[:, 1:].flatten(), noise[:, :-1].flatten())) < bound
    assert abs(correlation(noise[..., 0].flatten(), noise[..., 1].flatten())) < bound


def test_seed_and_position_are_not_interchangeable():
    first = gumbel_noise(torch.tensor([3]), torch.tensor([4]), 6)
    assert not torch.equal(first, gumbel_noise(torch.tensor([4]), torch.tensor([3]), 6))


def test_gumbel_noise_is_always_finite():
    noise = gumbel_noise(torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64), 10)
    assert noise.isfinite().all()


def test_samples_follow_the_softmax():
    logits = torch.tensor([1.0, -0.5, 0.0, 2.0, -3.0, 0.7])
    noise = gumbel_noise(torch.full((40_000,), 9), torch.arange(40_000), 6)
    counts = torch.bincount(select_sample(logits.expand(40_000, -1), noise), minlength=6)
    expected = [40_000 * p for p in softmax(logits.tolist())]
    # 20.5 is the 0.1 % point of chi-square with 5 degrees of freedom.
    assert chi_square(counts.tolist(), expected) < 20.5


def test_choosing_a_temperature_first_samples_tokens_from_the_mixture():
    """Eq. 5 of arXiv 2411.09661 has the law of its Eq. 6."""
    num_draws, temperatures = 60_000, (0.0, 0.5, 1.0, 2.0)
    head_logits = torch.tensor([0.3, -0.2, 0.9, 0.1])
    token_logits = [1.2, 0.4, -0.3, -1.5, 0.9]

    def token_distribution(temperature: float) -> list[float]:
        if temperature == 0:
            return [1.0, 0.0, 0.0, 0.0, 0.0]
        return softmax([logit / temperature for logit in token_logits])

    table = np.array([token_distribution(t) for t in temperatures])
    mixture = np.array(softmax(head_logits.tolist())) @ table

    noise = gumbel_noise(torch.full((num_draws,), 2026), torch.arange(num_draws), 4)
    choices = select_sample(head_logits.expand(num_draws, -1), noise).numpy()
    uniform = np.random.default_rng(0).random((num_draws, 1))
    tokens = (uniform > table[choices].cumsum(axis=1)).sum(axis=1)
    # 18.5 is the 0.1 % point of chi-square with 4 degrees of freedom.
    assert chi_square(np.bincount(tokens, minlength=5), mixture * num_draws) < 18.5


@pytest.mark.parametrize(
    ("hidden_size", "temperatures", "layer_sizes", "message"),
    [
        (0, SIX, (4,), "positive"),
        (-1, SIX, (4,), "positive"),
        (8, SIX, (4, 0), "positive"),
        (8, (), (4,), "2 to 64 are needed, got 0"),
        (8, (0.5,), (4,), "got 1"),
        (8, tuple(i / 10 for i in range(65)), (4,), "got 65"),
        (8, (0.0, math.nan), (4,), "nan is not in"),
        (8, (0.0, math.inf), (4,), "inf is not in"),
        (8, (-0.1, 1.0), (4,), "-0.1 is not in"),
        (8, (0.0, 10.1), (4,), "10.1 is not in"),
        (8, (0.0, 1.0, 1.0), (4,), "strictly increasing"),
        (8, (1.0, 0.0), (4,), "strictly increasing"),
    ],
)
def test_an_impossible_config_is_refused(hidden_size, temperatures, layer_sizes, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(hidden_size, temperatures, layer_sizes)


def test_the_widest_config_is_accepted():
    assert len(HeadConfig(1, tuple(i * 10 / 63 for i in range(64)), ()).temperatures) == 64
