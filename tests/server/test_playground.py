"""The playground in a browser, on the real server."""

import json
import subprocess

import pytest

from tests.playground.browser import Page, open_browser
from tests.programs import HANG_S
from tests.server.conftest import MODEL, TEMPERATURES

pytestmark = pytest.mark.engine

PROMPT = "Say “it's 5 o'clock”\nin \"two\" ways: $HOME"
NUM_TOKENS = 24
SEED = 3


@pytest.fixture(scope="module")
def page(tmp_path_factory, server):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield Page(browser, server.url)


def ask(server, **options) -> dict:
    """The same question without a browser."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    body |= {"seed": SEED, "max_tokens": NUM_TOKENS} | options
    response = server.post("/v1/chat/completions", body)
    assert response.is_success, response.text
    return response.json()["choices"][0]


def join(tokens: list[dict]) -> str:
    return "".join(token["text"] for token in tokens)


def test_an_answer_is_that_of_the_api_beside_a_fixed_temperature(page, server):
    page.open_ready()
    page.fill(prompt=PROMPT, seed=SEED, max_tokens=NUM_TOKENS, temperature=0.7)
    page.fill(adaptive__select="sample")
    page.run()
    adaptive, fixed = map(page.read_tokens, page.panes)
    options = {"head": "tok", "select": "sample", "report": "tokens"}
    expected = ask(server, temperature="adaptive", adaptive=options)
    temperatures = expected["adaptive"]["temperatures"]
    assert len(set(temperatures)) > 1
    assert [token["temperature"] for token in adaptive] == temperatures
    assert join(adaptive) == expected["message"]["content"]
    assert all(token["colour"] != "none" for token in adaptive)
    assert join(fixed) == ask(server, temperature=0.7)["message"]["content"]
    assert [token["temperature"] for token in fixed] == [0.7] * len(fixed)
    legend = [float(item.text) for item in page.find_all("#legend li")]
    assert legend == list(TEMPERATURES)
    assert float(page.read_part(page.panes[0], "mean")) == round(expected["adaptive"]["mean"], 2)
    assert {url for url in page.read_requests() if not url.startswith(server.url)} == set()
    assert page.read_console() == []


def test_every_policy_and_head_answers(page):
    page.open_ready()
    page.fill(prompt=PROMPT, max_tokens=3, compare=None)
    chosen = {}
    for chooser in page.find_all("[name=chooser] option"):
        value = chooser.get_attribute("value")
        page.fill(chooser=value)
        page.run()
        assert page.read_part(page.panes[0], "state") == "reached max tokens", value
        chosen[value] = [token["temperature"] for token in page.read_tokens(page.panes[0])]
    assert chosen["policy:constant"] == [0.7] * 3
    assert chosen["policy:two_phase"] == [1.0] * 3
    assert chosen["policy:list"] == [0.2, 0.7, 1.0]
    assert chosen["policy:schedule"] == pytest.approx([1.0, 0.997, 0.995], abs=0.001)
    assert len(set(chosen["head:seq"])) == 1
    assert all(0 < temperature < 1 for temperature in chosen["policy:entropy"])


def test_stop_ends_the_work_of_the_engine(page, server):
    page.open_ready()
    page.fill(prompt="Count from 1 to 1000.", max_tokens=1900)
    page.find("#run").click()
    page.wait(lambda: all(len(page.read_tokens(pane)) > 2 for pane in page.panes))
    assert server.sum_metric("vllm:num_requests_running") == 2
    page.find("#stop").click()
    page.wait_until_done()
    page.wait(lambda: server.sum_metric("vllm:num_requests_running") == 0)
    assert [page.read_part(pane, "state") for pane in page.panes] == ["stopped", "stopped"]
    assert all(2 < len(page.read_tokens(pane)) < 1000 for pane in page.panes)


def test_the_server_says_what_is_wrong(page, server):
    page.open_ready()
    page.fill(prompt=PROMPT, adaptive__min=1, adaptive__max=0.5, max_tokens=2)
    page.run()
    adaptive, fixed = page.panes
    assert "min 1 is above max 0.5" in page.read_part(adaptive, "error")
    assert page.find("[name='adaptive.min']").get_attribute("aria-invalid") == "true"
    # The one beside it had no fault.
    assert len(page.read_tokens(fixed)) == 2
    page.fill(adaptive__min="", adaptive__max="", temperature=-1)
    page.run()
    assert not adaptive.find_element("class name", "error").is_displayed()
    assert "temperature" in page.read_part(fixed, "error")
    assert page.find("[name='temperature']").get_attribute("aria-invalid") == "true"


def test_the_copied_command_gives_the_same_answer(page):
    page.open_ready()
    page.fill(prompt=PROMPT, seed=SEED, max_tokens=NUM_TOKENS, compare=None)
    page.run()
    command = page.read_part(page.panes[0], "command")
    result = subprocess.run(
        ["bash", "-c", command], check=True, capture_output=True, text=True, timeout=HANG_S
    )
    events = result.stdout.removesuffix("data: [DONE]\n\n").split("data: ")[1:]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == join(
        page.read_tokens(page.panes[0])
    )
