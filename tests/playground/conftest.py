from collections.abc import Iterator

import pytest

from tests.playground.browser import Page, open_browser
from tests.playground.scripted import ScriptedServer, scripted


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted() as server:
        yield server


@pytest.fixture
def page(browser, server) -> Page:
    page = Page(browser, server.url)
    page.use_theme("light")
    return page
