"""Many mixed requests leave the server as they found it, and its metrics as the clients count."""

import pytest

from tests.endurance.__main__ import find_faults, run


@pytest.mark.parametrize(
    ("num_requests", "block"),
    [
        (400, 400),
        pytest.param(100_000, 5000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_mixed_requests(tmp_path, num_requests, block):
    figures = run(num_requests, block, num_clients=16, seed=14, out=tmp_path / "endurance.json")
    print(f"\n{figures['summary']}")
    assert not find_faults(figures)
    assert figures["summary"]["requests"] == num_requests
