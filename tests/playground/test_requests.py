"""What the page sends, and how it tells what goes wrong."""

import asyncio
import json
import subprocess

import pytest
from fastapi.responses import JSONResponse

from tests.playground.browser import NASTY, Page
from tests.playground.scripted import make_chunks, scripted, stream
from tests.programs import HANG_S
from tests.server.fakes import MODEL


def test_fields_become_the_request(page, server):
    page.open_ready()
    page.fill(prompt="Hello", system="Be brief.", seed=7, max_tokens=5, temperature=0.4)
    page.fill(adaptive__min=0.1, adaptive__max=0.9, adaptive__scale=2, adaptive__select="sample")
    page.run()
    # Both are sent at once, and may arrive in either order.
    bodies = sorted(map(json.loads, server.bodies), key=lambda body: "adaptive" not in body)
    shared = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
        ],
        "seed": 7,
        "max_tokens": 5,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 5,
    }
    options = {"head": "tok", "select": "sample", "min": 0.1, "max": 0.9, "scale": 2}
    adaptive = {"temperature": "adaptive", "adaptive": {**options, "report": "tokens"}}
    assert bodies == [shared | adaptive, shared | {"temperature": 0.4}]


def test_how_a_head_selects_is_its_own_unless_the_page_is_told(page, server):
    page.open_ready()
    page.fill(compare=None, seed="", max_tokens="")
    page.run()
    (body,) = map(json.loads, server.bodies)
    assert body["adaptive"] == {"head": "tok", "report": "tokens"}


def test_a_policy_shows_its_own_fields_only(page, server):
    page.open_ready()
    page.fill(chooser="policy:schedule", adaptive__schedule__end=0, adaptive__schedule__tokens=9)
    assert not page.find("[name='adaptive.select']").is_displayed()
    assert not page.find("[name='adaptive.entropy.t0']").is_displayed()
    page.fill(compare=None, seed="", max_tokens="")
    page.run()
    (body,) = map(json.loads, server.bodies)
    schedule = {"end": 0, "tokens": 9}
    assert body["adaptive"] == {"policy": "schedule", "schedule": schedule, "report": "tokens"}
    assert not {"seed", "max_tokens"} & body.keys()
    assert [pane.is_displayed() for pane in page.panes] == [True, False]


def test_a_comma_at_the_end_of_a_list_is_no_temperature(page, server):
    page.open_ready()
    page.fill(chooser="policy:list", adaptive__list__temperatures="0.2, ,0.7, ")
    page.fill(compare=None, seed="", max_tokens="")
    page.run()
    (body,) = map(json.loads, server.bodies)
    assert body["adaptive"]["list"] == {"temperatures": [0.2, 0.7]}


def test_the_command_sends_the_very_bytes(page, server):
    server.key = "it's $HOME `id`"
    page.open()
    page.find("#key").send_keys(server.key)
    page.find("#prompt").click()
    page.wait(lambda: page.find_all("[name=model] option"))
    page.fill(prompt=NASTY, compare=None)
    page.run()
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.find(".pane details:last-child summary").click()
    page.find(".copy").click()
    page.wait(lambda: page.read(".copy") == "Copied")
    command = page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert command == page.read_part(page.panes[0], "command")
    environment = {"API_KEY": server.key, "PATH": "/usr/bin:/bin"}
    sent = subprocess.run(
        ["bash", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
    )
    assert sent.stdout.endswith("data: [DONE]\n\n")
    first, second = server.bodies
    assert first == second


def test_an_error_is_shown_as_the_server_says_it(page, server):
    error = {"message": "adaptive.max: must be <b>less</b>", "param": "adaptive.max", "code": 400}
    server.script = lambda body: JSONResponse({"error": error}, status_code=400)
    page.open_ready()
    page.fill(compare=None)
    page.run()
    assert page.read_part(page.panes[0], "error") == "adaptive.max: must be <b>less</b>"
    assert page.find("[name='adaptive.max']").get_attribute("aria-invalid") == "true"
    server.answer(["fine"])
    page.run()
    assert not page.find(".error").is_displayed()
    assert page.find_all("[aria-invalid]") == []


@pytest.mark.parametrize(
    ("make_stream", "message"),
    [
        (
            lambda: stream(iter([{"error": {"message": "Out of memory", "code": 500}}])),
            "Out of memory",
        ),
        (
            lambda: stream(make_chunks(["Half"], {"temperature": 1}), is_whole=False),
            "The server ended the stream before the answer was complete.",
        ),
        (lambda: JSONResponse(["?"], status_code=502), 'HTTP 502: ["?"]'),
    ],
    ids=["error in the stream", "cut off", "no JSON error"],
)
def test_a_failure_is_told(page, server, make_stream, message):
    server.script = lambda body: make_stream()
    page.open_ready()
    page.fill(compare=None)
    page.run()
    assert page.read_part(page.panes[0], "error") == message
    assert page.read_part(page.panes[0], "state") == "failed"


def test_a_server_that_goes_away_is_told(browser):
    async def wait_for_ever(body):
        async for event in stream(make_chunks(["Once", " upon"], body), is_whole=False):
            yield event
        await asyncio.Event().wait()

    with scripted() as server:
        page = Page(browser, server.url)
        server.script = wait_for_ever
        page.open_ready()
        page.find("#run").click()
        page.wait(lambda: len(page.read_tokens(page.panes[0])) == 2)
        server.stop()
        page.wait_until_done()
        errors = [page.read_part(pane, "error") for pane in page.panes]
        assert all("before the answer was complete" in error for error in errors)
        # What had come stays.
        assert [token["text"] for token in page.read_tokens(page.panes[0])] == ["Once", " upon"]
        page.run()
        gone = f"No answer from {page.url}: is the server running?"
        assert [page.read_part(pane, "error") for pane in page.panes] == [gone, gone]
