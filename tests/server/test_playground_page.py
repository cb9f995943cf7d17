"""The playground in a browser, with answers that a test makes up."""

import asyncio
import json
import subprocess

import httpx
import pytest
from fastapi.responses import JSONResponse
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from server.playground import PLAYGROUND_PATH
from tests.server.browser import RUN_KEYS, Page, open_browser
from tests.server.fakes import HEADS, MODEL
from tests.server.scripted import ScriptedServer, make_chunks, scripted, stream

pytestmark = pytest.mark.slow

NASTY = (
    "<img src=x onerror=alert(1)> & </pre> 'it''s' \"$HOME\" `id` \\n \\\n!! %s\n\t日本語 🦊 \u202e"
)
SEE_AGAIN = "document.dispatchEvent(new Event('visibilitychange', {bubbles: true}))"
# Letters stand on the colour itself; the gradient over it is a strip at their feet.
PAINT_FLAT = """
for (const span of arguments[0])
  span.style.background = getComputedStyle(span).getPropertyValue('--colour')
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def server():
    with scripted() as server:
        yield server


@pytest.fixture
def page(browser, server) -> Page:
    page = Page(browser, server.url)
    page.use_theme("light")
    return page


def answer(server: ScriptedServer, tokens: list, **options) -> None:
    server.script = lambda body: stream(make_chunks(tokens, body, **options))


def read_table(page: Page, selector: str) -> list[list[str]]:
    return [row.text.split() for row in page.find_all(f"{selector} tr")]


def test_files_are_served_strictly_and_kept_by_browsers(server):
    page = httpx.get(server.url + PLAYGROUND_PATH)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert "unsafe" not in " ".join(policy)
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    etag = {"If-None-Match": page.headers["etag"]}
    again = httpx.get(server.url + PLAYGROUND_PATH, headers=etag)
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.head(server.url + PLAYGROUND_PATH).status_code == 200
    assert httpx.get(server.url + PLAYGROUND_PATH + "/__init__.py").status_code == 404


def test_the_page_asks_its_own_server_only_and_breaks_no_policy(page):
    page.open_ready()
    page.run()
    urls = page.read_requests()
    assert sum("/v1/chat/completions" in url for url in urls) == 2
    assert {url for url in urls if not url.startswith(page.url + "/")} == set()
    assert page.read_console() == []


def test_lists_come_from_the_server_and_a_token_head_is_proposed(page):
    page.open_ready()
    assert [option.text for option in page.find_all("[name=model] option")] == [MODEL]
    values = [option.get_attribute("value") for option in page.find_all("[name=chooser] option")]
    policies = [f"policy:{name}" for name in ("entropy", "schedule", "two_phase", "constant")]
    assert values == ["head:tok", "head:seq", *policies]
    assert page.find("[name=chooser]").get_property("value") == "head:tok"


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


def test_tokens_are_coloured_counted_and_drawn(page, server):
    temperatures = [0.0, 0.7, 0.7, 1.0]
    answer(server, ["The", " sea", "\n\n", "shines"], temperatures=temperatures)
    page.open_ready()
    page.run()
    adaptive, fixed = page.panes
    tokens = page.read_tokens(adaptive)
    assert [token["text"] for token in tokens] == ["The", " sea", "\n\n", "shines"]
    assert [token["temperature"] for token in tokens] == temperatures
    colours = [token["colour"] for token in tokens]
    assert colours[1] == colours[2]
    assert len(set(colours)) == 3
    assert [token["temperature"] for token in page.read_tokens(fixed)] == [0.7] * 4
    # One scale for both.
    assert page.read_tokens(fixed)[0]["colour"] == colours[1]
    facts = [page.read_part(adaptive, name) for name in ("count", "mean", "min", "max")]
    assert facts == ["4", "0.6", "0", "1"]
    assert read_table(page, ".pane .histogram") == [
        ["0", "1"],
        ["0.7", "2"],
        ["1", "1"],
        ["0.7", "4"],
    ]
    sentence = "Temperature over position: 4 tokens, mean temperature 0.6, from 0 to 1."
    assert page.read_part(adaptive, "alternative") == sentence
    line = adaptive.find_element("css selector", ".line").get_attribute("d")
    assert line == "M0 0H1V0.7H2V0.7H3V1H4"
    assert [item.text for item in page.find_all("#legend li")] == ["0", "0.3", "0.7", "1"]
    assert "finished, 4 tokens, mean temperature 0.6" in page.read("#spoken")


def test_a_temperature_above_the_scale_widens_it(page, server):
    answer(server, ["a", "b"], temperatures=[0.5, 2.0])
    page.open_ready()
    page.fill(chooser="policy:entropy")
    page.run()
    labels = [item.text for item in page.find_all("#legend li")]
    assert labels == ["0", "0.4", "0.8", "1.2", "1.6", "2"]
    # The chart beside it has the same scale.
    page.wait(lambda: [page.read_part(pane, "top") for pane in page.panes] == ["2", "2"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_can_be_read(page, server, theme):
    temperatures = [step / 20 for step in range(21)]
    answer(server, [" word"] * 21, temperatures=temperatures)
    page.use_theme(theme)
    page.open_ready()
    page.fill(chooser="policy:entropy")
    page.run()
    spans = page.panes[0].find_elements("css selector", ".text span")
    page.browser.execute_script(PAINT_FLAT, spans)
    contrasts = page.measure_contrasts(spans)
    assert min(contrasts) >= 4.5
    # In one direction: without hues, hotter is still told from colder.
    assert contrasts == sorted(contrasts, reverse=True)
    assert contrasts[0] > 1.5 * contrasts[-1]


def test_the_switch_overrules_the_system_and_is_remembered(page):
    page.use_theme("light")
    page.open_ready()
    read = "return getComputedStyle(document.body).backgroundColor"
    light = page.browser.execute_script(read)
    page.find("#theme option[value=dark]").click()
    dark = page.browser.execute_script(read)
    assert dark != light
    page.open_ready()
    assert page.browser.execute_script(read) == dark
    page.find("#theme option[value=auto]").click()
    assert page.browser.execute_script(read) == light


def test_a_token_tells_what_is_known_of_it(page, server):
    answer(server, ["A", " fox"], temperatures=[0.0, 1.0])
    page.open_ready()
    page.run()
    span = page.panes[0].find_elements("css selector", ".text span")[1]
    ActionChains(page.browser).move_to_element(span).perform()
    page.wait(lambda: page.find("#card").is_displayed())
    assert [line.text for line in page.find_all("#card > p")] == [
        "␣fox\n1",
        "token 2 of 2 · probability 61 %",
    ]
    assert read_table(page, "#card") == [["␣fox", "61", "%"], ["an", "5.0", "%"]]
    assert page.find("#card .chosen th").text == "␣fox"
    # The chart points at it, and the other way round.
    assert page.panes[0].find_element("css selector", ".cursor").get_attribute("d") == "M1.5 0V1000"
    track = page.panes[0].find_element("class name", "track")
    left_edge = 1 - track.size["width"] // 2
    ActionChains(page.browser).move_to_element_with_offset(track, left_edge, 0).perform()
    page.wait(lambda: "token 1 of 2" in page.find("#card").text)
    assert page.find(".text .active").text == "A"


def test_keys_run_walk_and_stop(page, server):
    server.script = lambda body: stream(make_chunks(["a", "b", "c"] + ["d"] * 3000, body), 0.02)
    page.open_ready()
    page.find("#prompt").click()
    page.press(RUN_KEYS)
    page.wait(lambda: len(page.read_tokens(page.panes[0])) > 3)
    page.press(Keys.ESCAPE)
    page.wait_until_done()
    assert [page.read_part(pane, "state") for pane in page.panes] == ["stopped", "stopped"]
    page.browser.execute_script("arguments[0].focus()", page.find(".pane .text"))
    places = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.END, Keys.HOME):
        page.press(key)
        places.append(page.find(".text .active").text)
    assert places == ["a", "b", "a", "d", "a"]
    assert page.read("#spoken").startswith("“a”, temperature 0.3, token 1 of ")
    # The chart is a slider whose value is said in the same words.
    page.press(Keys.SHIFT + Keys.TAB)
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    track = page.browser.switch_to.active_element
    assert track.get_attribute("role") == "slider"
    assert track.get_attribute("aria-valuenow") == "2"
    assert track.get_attribute("aria-valuetext").startswith("“b”, temperature 0.3, token 2 of ")
    page.press(Keys.ESCAPE)
    assert not page.find("#card").is_displayed()


def test_everything_has_a_name_for_those_who_listen(page, server):
    page.open_ready()
    page.run()
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    used = ("button", "textbox", "spinbutton", "combobox", "checkbox", "slider", "heading", "table")
    named = [
        (node["role"]["value"].lower(), node["name"]["value"])
        for node in tree
        if not node["ignored"] and node["role"]["value"].lower() in used
    ]
    assert {role for role, _ in named} >= {"button", "textbox", "spinbutton", "slider", "table"}
    assert [role for role, name in named if not name.strip()] == []
    roles = {node["role"]["value"] for node in tree}
    assert {"banner", "main", "form"} & roles >= {"banner", "main"}


def test_nothing_is_markup(page, server):
    answer(server, ["<b>", NASTY, "</template>"])
    page.open_ready()
    page.fill(prompt=NASTY)
    page.run()
    tokens = page.read_tokens(page.panes[0])
    assert tokens[0]["text"] + tokens[2]["text"] == "<b></template>"
    # What turns the direction of the text round is made visible.
    assert tokens[1]["text"] == NASTY.replace("\u202e", "⟨202E⟩")
    assert page.find_all("img, .text b") == []
    assert json.loads(server.bodies[0])["messages"][-1]["content"] == NASTY
    assert page.read_console() == []


def test_parts_of_characters_wait_for_the_rest(page, server):
    fox = "🦊".encode()
    answer(server, [fox[:2], fox[2:], "é"[:1].encode(), b"\xff", " ok"])
    page.open_ready()
    page.run()
    tokens = page.read_tokens(page.panes[0])
    assert [token["text"] for token in tokens] == ["", "🦊", "é", "\ufffd", " ok"]
    assert [token["kind"] for token in tokens] == ["part", "", "", "", ""]
    assert all(token["colour"] != "none" for token in tokens)


def test_events_may_arrive_in_pieces(page, server):
    async def cut(body):
        whole = "".join([event async for event in stream(make_chunks(["🦊", "\n\n", "b"], body))])
        data = whole.replace("\n\n", "\r\n\r\n").replace("\\ud83e\\udd8a", "🦊").encode()
        for start in range(0, len(data), 23):
            yield data[start : start + 23]
            await asyncio.sleep(0.005)  # Pieces that come at once are put together again.

    server.script = cut
    page.open_ready()
    page.run()
    assert [token["text"] for token in page.read_tokens(page.panes[0])] == ["🦊", "\n\n", "b"]


def test_the_end_of_an_answer_is_no_text(page, server):
    def end(body):
        *chunks, last = make_chunks(["Yes", "<|im_end|>"], body)
        ending = chunks.pop()
        ending["choices"][0]["delta"]["content"] = ""
        ending["choices"][0]["finish_reason"] = last["choices"][0]["finish_reason"]
        return stream(iter([*chunks, ending]))

    server.script = end
    page.open_ready()
    page.run()
    tokens = page.read_tokens(page.panes[0])
    assert [(token["text"], token["kind"]) for token in tokens] == [("Yes", ""), ("", "end")]


def test_an_answer_without_tokens(page, server):
    answer(server, [])
    page.open_ready()
    page.run()
    states = {page.read_part(pane, "state") for pane in page.panes}
    assert states == {"the model said nothing"}
    assert not page.find(".measures").is_displayed()


def test_an_answer_without_log_probabilities_or_temperatures(page, server):
    chunk = {"choices": [{"index": 0, "delta": {"content": "plain"}}]}
    server.script = lambda body: stream(iter([chunk]))
    page.open_ready()
    page.run()
    (token,) = page.read_tokens(page.panes[0])
    assert (token["text"], token["temperature"]) == ("plain", None)
    assert page.read_part(page.panes[0], "mean") == "–"


def test_an_error_is_shown_as_the_server_says_it(page, server):
    error = {"message": "adaptive.max: must be <b>less</b>", "param": "adaptive.max", "code": 400}
    server.script = lambda body: JSONResponse({"error": error}, status_code=400)
    page.open_ready()
    page.fill(compare=None)
    page.run()
    assert page.read_part(page.panes[0], "error") == "adaptive.max: must be <b>less</b>"
    assert page.find("[name='adaptive.max']").get_attribute("aria-invalid") == "true"
    answer(server, ["fine"])
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


def test_a_page_without_its_server_says_so_and_recovers(page, server):
    server.key = "not yet"
    page.open()
    page.wait(lambda: "Unauthorized" in page.read("#notice"))
    assert "wants an API key" in page.read("#notice")
    assert page.find("#key").get_attribute("aria-invalid") == "true"
    page.fill(prompt="typed before the key")
    page.find("#key").send_keys("not yet")
    page.find("#run").click()
    page.wait(lambda: len(server.bodies) == 2)
    page.wait_until_done()
    assert json.loads(server.bodies[0])["messages"][0]["content"] == "typed before the key"
    assert [token["text"] for token in page.read_tokens(page.panes[0])] == ["Hi"]
    assert not page.find("#notice").is_displayed()
    assert page.find("#key").get_attribute("aria-invalid") != "true"
    # The key is in memory only.
    command = page.read_part(page.panes[0], "command")
    kept = page.browser.execute_script("return location.href + JSON.stringify({...localStorage})")
    assert "not yet" not in command + kept
    assert '"Authorization: Bearer $API_KEY"' in command


def test_the_head_that_answered_is_named(page, server):
    def answer_by_canary(body):
        chunks = list(make_chunks(["Hi"], body))
        chunks[-1]["choices"][0]["adaptive"] = {"head": "canary"}
        return stream(iter(chunks))

    server.script = answer_by_canary
    page.open_ready()
    page.fill(compare=None)
    page.run()
    assert page.read_part(page.panes[0], "title") == "Adaptive · tok (its canary canary)"


def test_lists_are_read_again_when_the_page_is_seen_again(page, server):
    page.open_ready()
    page.fill(chooser="head:seq", prompt="kept")
    server.heads = {"seq": HEADS["seq"], "new": HEADS["tok"]}
    page.browser.execute_script(SEE_AGAIN)
    page.wait(lambda: page.find_all("option[value='head:new']"))
    assert page.find("[name=chooser]").get_property("value") == "head:seq"
    assert page.find("#prompt").get_property("value") == "kept"
    server.heads = {"new": HEADS["tok"]}
    page.browser.execute_script(SEE_AGAIN)
    page.wait(lambda: not page.find_all("option[value='head:seq']"))
    assert page.find("[name=chooser]").get_property("value") == "head:new"


def test_the_address_holds_the_setup(page, server):
    page.open_ready()
    page.fill(prompt=NASTY, chooser="policy:entropy", adaptive__entropy__t0=1.5, compare=None)
    page.wait(lambda: "t0=1.5" in page.browser.current_url)
    page.wait(lambda: "compare=off" in page.browser.current_url)
    fragment = "#" + page.browser.current_url.partition("#")[2]
    page.open_ready(fragment)
    assert page.find("#prompt").get_property("value") == NASTY
    assert page.find("[name='adaptive.entropy.t0']").is_displayed()
    page.run()
    body = json.loads(server.bodies[-1])
    assert body["adaptive"] == {"policy": "entropy", "entropy": {"t0": 1.5}, "report": "tokens"}
    page.open_ready("#chooser=head%3Agone&nonsense=1")
    assert page.find("[name=chooser]").get_property("value") == "head:tok"


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
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert sent.stdout.endswith("data: [DONE]\n\n")
    first, second = server.bodies
    assert first == second


def test_a_new_run_takes_the_place_of_the_old(page, server):
    server.script = lambda body: stream(make_chunks(["old"] * 3000, body), 0.02)
    page.open_ready()
    page.find("#run").click()
    page.wait(lambda: page.read_tokens(page.panes[0]))
    answer(server, ["new"])
    page.find("#run").click()
    page.wait(lambda: page.read_part(page.panes[0], "state") == "finished")
    page.wait_until_done()
    assert [token["text"] for token in page.read_tokens(page.panes[0])] == ["new"]


def test_a_long_answer_arrives_whole(page, server):
    temperatures = [index % 500 / 500 for index in range(2000)]
    answer(server, [" long"] * 2000, temperatures=temperatures)
    page.open_ready()
    page.fill(chooser="policy:entropy")
    page.run()
    tokens = page.read_tokens(page.panes[0])
    assert [token["temperature"] for token in tokens] == temperatures
    # Many temperatures become bins.
    rows = page.panes[0].find_elements("css selector", ".histogram tr")
    assert sum(int(row.text.split()[-1]) for row in rows) == 2000
    assert len(rows) == 10


def test_a_narrow_page_does_not_scroll_sideways(page, server):
    answer(server, ["long" * 60, " words"] * 20)
    metrics = {"width": 340, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open_ready()
        page.run()
        page.browser.execute_script("arguments[0].focus()", page.find(".pane .text"))
        page.press(Keys.END)
        assert page.find("#card").is_displayed()
        widths = "return [document.documentElement.scrollWidth, innerWidth]"
        scrolled, shown = page.browser.execute_script(widths)
        assert scrolled <= shown
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
