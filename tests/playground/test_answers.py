"""What the page makes of a stream."""

import asyncio
import json

from selenium.webdriver.common.action_chains import ActionChains

from tests.playground.browser import NASTY
from tests.playground.scripted import make_chunks, stream


def test_tokens_are_coloured_counted_and_drawn(page, server):
    temperatures = [0.0, 0.7, 0.7, 1.0]
    server.answer(["The", " sea", "\n\n", "shines"], temperatures=temperatures)
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
    assert page.read_table(".pane .histogram") == [
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
    server.answer(["a", "b"], temperatures=[0.5, 2.0])
    page.open_ready()
    page.fill(chooser="policy:entropy")
    page.run()
    labels = [item.text for item in page.find_all("#legend li")]
    assert labels == ["0", "0.4", "0.8", "1.2", "1.6", "2"]
    # The chart beside it has the same scale.
    page.wait(lambda: [page.read_part(pane, "top") for pane in page.panes] == ["2", "2"])


def test_a_token_tells_what_is_known_of_it(page, server):
    server.answer(["A", " fox"], temperatures=[0.0, 1.0])
    page.open_ready()
    page.run()
    span = page.panes[0].find_elements("css selector", ".text span")[1]
    ActionChains(page.browser).move_to_element(span).perform()
    page.wait(lambda: page.find("#card").is_displayed())
    assert [line.text for line in page.find_all("#card > p")] == [
        "␣fox\n1",
        "token 2 of 2 · probability 61 %",
    ]
    assert page.read_table("#card") == [["␣fox", "61", "%"], ["an", "5.0", "%"]]
    assert page.find("#card .chosen th").text == "␣fox"
    # The chart points at it, and the other way round.
    assert page.panes[0].find_element("css selector", ".cursor").get_attribute("d") == "M1.5 0V1000"
    track = page.panes[0].find_element("class name", "track")
    left_edge = 1 - track.size["width"] // 2
    ActionChains(page.browser).move_to_element_with_offset(track, left_edge, 0).perform()
    page.wait(lambda: "token 1 of 2" in page.find("#card").text)
    assert page.find(".text .active").text == "A"


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


def test_parts_of_characters_wait_for_the_rest(page, server):
    fox = "🦊".encode()
    server.answer([fox[:2], fox[2:], "é"[:1].encode(), b"\xff", " ok"])
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
    server.answer([])
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


def test_nothing_is_markup(page, server):
    server.answer(["<b>", NASTY, "</template>"])
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


def test_a_long_answer_arrives_whole(page, server):
    temperatures = [index % 500 / 500 for index in range(2000)]
    server.answer([" long"] * 2000, temperatures=temperatures)
    page.open_ready()
    page.fill(chooser="policy:entropy")
    page.run()
    tokens = page.read_tokens(page.panes[0])
    assert [token["temperature"] for token in tokens] == temperatures
    # Many temperatures become bins.
    rows = page.panes[0].find_elements("css selector", ".histogram tr")
    assert sum(int(row.text.split()[-1]) for row in rows) == 2000
    assert len(rows) == 10


def test_a_new_run_takes_the_place_of_the_old(page, server):
    server.script = lambda body: stream(make_chunks(["old"] * 3000, body), 0.02)
    page.open_ready()
    page.find("#run").click()
    page.wait(lambda: page.read_tokens(page.panes[0]))
    server.answer(["new"])
    page.find("#run").click()
    page.wait(lambda: page.read_part(page.panes[0], "state") == "finished")
    page.wait_until_done()
    assert [token["text"] for token in page.read_tokens(page.panes[0])] == ["new"]
