import re
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from adaptive_head.lpo.coloring import (
    DARK,
    LIGHT,
    NUM_LEVELS,
    choose_ink,
    count_temperatures,
    describe,
    find_luminance,
    group_tokens,
    make_page,
    print_answer,
    split_tokens,
)

PIECES = ["The <b>", " answer", " &", "\n\n", "", "", "😀", " 42", ""]
TEMPERATURES = [0.0, 0.5, 1.0, 0.5, 0.2, 0.4, 0.6, 1.0, 0.0]
LEVELS = [level / (NUM_LEVELS - 1) for level in range(NUM_LEVELS)]


def decode_with(vocabulary):
    return lambda ids: b"".join(vocabulary[i] for i in ids).decode("utf-8", errors="replace")


def test_a_token_has_its_own_text():
    decode = decode_with([b"The", b" answer", b" is", b" 42", b"."])
    assert split_tokens(decode, range(5)) == ["The", " answer", " is", " 42", "."]
    assert split_tokens(decode, []) == []


def test_the_token_that_completes_a_character_has_it():
    face, euro = "😀".encode(), "€".encode()
    decode = decode_with([b"a", face[:1], face[1:3], face[3:] + b"b", euro[:2], euro[2:]])
    assert split_tokens(decode, range(6)) == ["a", "", "", "😀b", "", "€"]


def test_a_character_that_is_never_completed_is_shown_as_such():
    decode = decode_with([b"a", b"\xf0\x9f"])
    assert split_tokens(decode, [0, 1]) == ["a", "�"]
    decode = decode_with([b"a", b"\xf0\x9f", b"b"])
    assert split_tokens(decode, [0, 1, 2]) == ["a", "", "�b"]


def test_a_tokenizer_may_drop_the_space_that_a_text_begins_with():
    words = ["▁The", "▁answer", "s", "▁"]

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert split_tokens(decode, [0, 1, 2, 1]) == ["The", " answer", "s", " answer"]


@given(st.lists(st.binary(max_size=4), max_size=12))
def test_the_pieces_are_the_whole_text(vocabulary):
    decode = decode_with(vocabulary)
    pieces = split_tokens(decode, range(len(vocabulary)))
    assert len(pieces) == len(vocabulary)
    assert "".join(pieces) == decode(range(len(vocabulary)))


@given(st.text(max_size=12), st.lists(st.integers(0, 40), max_size=8))
def test_whole_text_never_shows_a_replacement_character(text, cuts):
    text = text.replace("�", "")
    data = text.encode(errors="ignore")
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    vocabulary = [data[start:stop] for start, stop in pairwise(edges)]
    pieces = split_tokens(decode_with(vocabulary), range(len(vocabulary)))
    assert "�" not in "".join(pieces)


def test_tokens_without_text_go_along_with_the_next():
    tokens = group_tokens(PIECES, TEMPERATURES)
    assert [token.text for token in tokens] == [
        "The <b>", " answer", " &", "\n\n", "😀", " 42", "",
    ]  # fmt: skip
    assert tokens[4].positions == (4, 5, 6)
    assert tokens[4].temperatures == (0.2, 0.4, 0.6)
    assert tokens[-1].positions == (8,)


@pytest.mark.parametrize("ramp", [LIGHT, DARK])
def test_text_is_readable_on_every_colour(ramp):
    for share in LEVELS:
        background = ramp.at(share)
        ink = choose_ink(background)
        dark, light = sorted(find_luminance(color) + 0.05 for color in (background, ink))
        assert light / dark >= 4.5


@pytest.mark.parametrize(("ramp", "sign"), [(LIGHT, -1), (DARK, 1)])
def test_lightness_alone_tells_temperatures_apart(ramp, sign):
    luminances = [sign * find_luminance(ramp.at(share)) for share in LEVELS]
    assert all(low < high for low, high in pairwise(luminances))


def test_few_temperatures_have_a_bar_each():
    assert count_temperatures([0.2, 0.0, 0.2]) == [("0", 0.0, 1), ("0.2", 0.2, 2)]
    assert count_temperatures([]) == []


def test_many_temperatures_become_bins():
    bars = count_temperatures([index / 8 for index in range(81)])
    assert [count for _, _, count in bars] == [8] * 9 + [9]
    assert bars[0][:2] == ("0.00–1.00", 0.5)


def test_the_summary_names_mean_minimum_and_maximum():
    assert describe([0.0, 1.0]) == "2 tokens, temperature 0.5 on average, from 0 to 1"
    assert describe([0.7]) == "1 token, temperature 0.7 on average, from 0.7 to 0.7"
    assert describe([]) == "no tokens"


def print_to_text(pieces, temperatures, **options) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=80)
    print_answer(console, pieces, temperatures, **options)
    return file.getvalue()


def test_the_terminal_shows_text_colours_legend_and_histogram():
    output = print_to_text(PIECES, TEMPERATURES, title="a [bold]title[/bold]")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert plain.startswith("a [bold]title[/bold]\nThe <b> answer &↵\n↵\n😀 42∅\n")
    assert "9 tokens, temperature 0.467 on average, from 0 to 1" in plain
    assert " 2 (22%)" in plain
    colors = set(re.findall(r"48;2;(\d+;\d+;\d+)m", output))
    assert len(colors) >= NUM_LEVELS
    assert all(";".join(map(str, DARK.at(share))) in colors for share in (0.0, 0.5, 1.0))


def test_a_model_cannot_steer_the_terminal():
    output = print_to_text(["\x1b[2J", "\x9b2J\r\x00"], [0.0, 1.0])
    assert "\x1b[2J" not in output
    assert not set("\x9b\r\x00") & set(output)
    assert "␛[2J" in output


def test_an_empty_answer_can_be_shown():
    assert "no tokens" in print_to_text([], [])
    assert "no tokens" in make_page([], [], "empty")


class Page(HTMLParser):
    """Elements with their attributes, and the text of the tokens."""

    VOID = ("meta", "path", "rect")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-2:] == ["pre", "span"]:
            self.texts.append(text)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(make_page(PIECES, TEMPERATURES, "A <title>", prompt="1 < 2?\nSay."))


def test_the_page_is_whole_and_keeps_the_text(page):
    assert not page.open
    assert "".join(page.texts) == "".join(PIECES)


def test_the_page_asks_for_nothing_and_runs_nothing(page):
    text = make_page(PIECES, TEMPERATURES, "A")
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?:|url\(|@import|src=|javascript:", text)
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {"style", "src", "href"} & names
    assert not {name for name in names if name.startswith("on")}
    (policy,) = [m["content"] for m in page.find("meta") if m.get("http-equiv")]
    assert re.fullmatch(r"default-src 'none'; style-src 'sha256-[A-Za-z0-9+/=]{44}'", policy)


def test_what_the_model_wrote_is_never_markup():
    evil = '"><script>alert(1)</script>&amp;'
    page = Page(make_page([evil], [1.0], evil, prompt=evil))
    assert not page.find("script")
    assert page.texts == [evil]


def test_hovering_names_token_temperature_and_position(page):
    titles = [span["title"] for span in page.find("span") if "title" in span]
    assert titles[0] == "“The <b>” · temperature 0 · position 0"
    assert titles[3] == "“↵↵” · temperature 0.5 · position 3"
    assert titles[4] == "“😀” · temperature 0.2, 0.4, 0.6 · position 4–6"
    assert titles[6] == "“no text” · temperature 0 · position 8"


def test_colours_follow_the_temperature_up_to_the_maximum():
    page = Page(make_page(["a", "b"], [0.0, 1.0], "A", maximum=2.0))
    levels = [span["class"] for span in page.find("span") if "title" in span]
    assert levels == ["t0", f"t{round((NUM_LEVELS - 1) / 2)}"]


def test_the_page_says_what_its_pictures_show(page):
    (html,) = page.find("html")
    assert html["lang"] == "en"
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role")]
    assert labels == [
        "Colours from temperature 0 to 1",
        "Temperature over position: 9 tokens, temperature 0.467 on average, from 0 to 1",
    ]


def test_the_page_has_a_light_and_a_dark_form():
    text = make_page(PIECES, TEMPERATURES, "A")
    light, dark = text.split("@media (prefers-color-scheme:dark){\n.t0{")
    for ramp, part in ((LIGHT, light), (DARK, ".t0{" + dark)):
        red, green, blue = ramp.at(0.0)
        assert f".t0{{background:#{red:02x}{green:02x}{blue:02x};" in part
