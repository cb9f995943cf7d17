"""The plot is drawn, whatever was measured."""

import pytest
from matplotlib.image import imread

from benchmarks.plot import draw_ratios


def make_result(num_comparisons, sizes, has_intervals):
    share = {
        "mean": 1.001,
        "interval_95": [0.999, 1.003] if has_intervals else None,
        "median": 1.0,
        "quartiles": [0.998, 1.004],
    }
    by_size = {size: dict.fromkeys(("ttft_s", "tpot_s", "tokens_per_s"), share) for size in sizes}
    return {
        "config": "tiny",
        "device": "a device",
        "model_runner": "V2",
        "num_pairs": 10,
        "ratios": {f"arm {number} / base": by_size for number in range(num_comparisons)},
    }


@pytest.mark.parametrize(
    ("num_comparisons", "sizes", "has_intervals"),
    [
        pytest.param(8, [1, 8, 32, 128, 256], True, marks=pytest.mark.slow),
        (5, [1], False),
    ],
)
def test_the_plot_has_ink_of_every_comparison(tmp_path, num_comparisons, sizes, has_intervals):
    path = tmp_path / "x.png"
    draw_ratios(make_result(num_comparisons, sizes, has_intervals), path)
    pixels = (imread(path)[..., :3].reshape(-1, 3) * 255).round().astype(int)
    colors = set((pixels @ (1 << 16, 1 << 8, 1)).tolist())
    # The first and the last colour of matplotlib's cycle that are used.
    assert 0x1F77B4 in colors
    assert {5: 0x9467BD, 8: 0x7F7F7F}[num_comparisons] in colors
