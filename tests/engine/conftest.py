from pathlib import Path

import pytest

from adaptive_head import AdaptiveHead, load_head
from tests.background import WAIT_S
from tests.engine.engines import ROOT, Engines, get_engines

HERE = ROOT / "tests" / "engine"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(WAIT_S))


@pytest.fixture(scope="session")
def run_engine(background) -> Engines:
    return get_engines(background)


@pytest.fixture(scope="session")
def tiny_model(run_engine) -> Path:
    return run_engine.model


@pytest.fixture(scope="session")
def heads(run_engine) -> dict[str, Path]:
    return run_engine.heads


@pytest.fixture(scope="session")
def networks(heads) -> dict[str, AdaptiveHead]:
    return {name: load_head(folder).network for name, folder in heads.items()}
