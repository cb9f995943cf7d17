"""The page itself: its files, settings, themes and keys."""

import json

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from server.playground import PLAYGROUND_PATH
from tests.playground.browser import NASTY, RUN_KEYS
from tests.playground.scripted import PREFIX, make_chunks, stream
from tests.server.fakes import HEADS, MODEL

SEE_AGAIN = "document.dispatchEvent(new Event('visibilitychange', {bubbles: true}))"
# Letters stand on the colour itself; the gradient over it is a strip at their feet.
PAINT_FLAT = """
for (const span of arguments[0])
  span.style.background = getComputedStyle(span).getPropertyValue('--colour')
"""


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


def test_it_works_behind_a_prefix(page, server):
    page.url += PREFIX
    page.open_ready()
    page.run()
    assert [token["text"] for token in page.read_tokens(page.panes[0])] == ["Hi"]
    assert f"{page.url}/v1/chat/completions" in page.read_part(page.panes[0], "command")
    assert page.read_console() == []


def test_lists_come_from_the_server_and_a_token_head_is_proposed(page):
    page.open_ready()
    assert [option.text for option in page.find_all("[name=model] option")] == [MODEL]
    values = [option.get_attribute("value") for option in page.find_all("[name=chooser] option")]
    policies = [
        f"policy:{name}" for name in ("entropy", "schedule", "two_phase", "constant", "list")
    ]
    assert values == ["head:tok", "head:seq", *policies]
    assert page.find("[name=chooser]").get_property("value") == "head:tok"


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


def test_a_page_without_its_key_says_so_and_recovers(page, server):
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


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_can_be_read(page, server, theme):
    temperatures = [step / 20 for step in range(21)]
    server.answer([" word"] * 21, temperatures=temperatures)
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


def test_a_narrow_page_does_not_scroll_sideways(page, server):
    server.answer(["long" * 60, " words"] * 20)
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
