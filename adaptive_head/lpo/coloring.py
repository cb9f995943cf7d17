"""An answer whose tokens show their temperatures as colours: in a terminal, and as a web page."""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from rich.console import Console
from rich.style import Style
from rich.text import Text

NUM_LEVELS = 24
# More temperatures than these become bins: a head has few, the entropy rule as many as tokens.
MAX_BARS = 12
NUM_BINS = 10

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A model's control characters must neither steer the terminal nor vanish from the page.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= {code: 0x2426 for code in range(0x80, 0xA0)} | {0x7F: 0x2421}

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Ramp:
    """Colours from cold blue through violet to hot red, and lightness all in one direction.

    The direction tells temperatures apart for whoever does not tell the hues apart. The cold end
    is close to the page, so that the hot tokens stand out.

    Args:
        lightness, chroma, hue: of both ends in OKLCH, hue in degrees.
    """

    lightness: tuple[float, float]
    chroma: tuple[float, float]
    hue: tuple[float, float]

    def at(self, share: float) -> RGB:
        """The colour at a share in [0, 1] of the highest temperature."""
        lightness, chroma, hue = (
            start + share * (stop - start)
            for start, stop in (self.lightness, self.chroma, self.hue)
        )
        return to_rgb(lightness, chroma, hue)


LIGHT = Ramp(lightness=(0.96, 0.52), chroma=(0.025, 0.2), hue=(240, 385))
DARK = Ramp(lightness=(0.3, 0.8), chroma=(0.05, 0.15), hue=(250, 410))


@dataclass(frozen=True)
class ShownToken:
    """What is coloured at once: a token, after those whose text it completes."""

    text: str
    positions: tuple[int, ...]
    temperatures: tuple[float, ...]


def split_tokens(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the whole text.

    A token that ends within a character has the empty text, and the one that completes the
    character has all of it.

    Args:
        decode: text of token ids, with U+FFFD for bytes that are no character (yet).
    """
    pieces: list[str] = []
    # Decode from the piece before: a tokenizer may treat the beginning of a text specially.
    before = start = 0
    for stop in range(1, len(token_ids) + 1):
        text = decode(token_ids[before:stop])
        if text.endswith(REPLACEMENT) and stop < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(token_ids[before:start])) :])
        before, start = start, stop
    return pieces


def print_answer(
    console: Console,
    pieces: Sequence[str],
    temperatures: Sequence[float],
    title: str = "",
    maximum: float | None = None,
) -> None:
    """Print an answer with each token on the colour of its temperature, a legend and a histogram.

    Args:
        pieces: as `split_tokens` makes them.
        maximum: the end of the scale; the highest temperature, if None.
    """
    top = find_top(temperatures, maximum)
    if title:
        console.print(Text(title, style="bold"))
    answer = Text(overflow="fold")
    for token in group_tokens(pieces, temperatures):
        style = make_style(token.temperatures[-1] / top)
        answer.append(token.text.replace("\n", "↵\n") or "∅", style)
    console.print(answer)
    console.print()
    legend = Text("temperature 0 ")
    for level in range(NUM_LEVELS):
        legend.append(" ", make_style(level / (NUM_LEVELS - 1)))
    console.print(legend.append(f" {shorten(top)}"))
    console.print(Text(describe(temperatures)))
    bars = count_temperatures(temperatures)
    for label, middle, count in bars:
        length = math.ceil(30 * count / max(count for _, _, count in bars))
        line = Text(f"{label:>9} ")
        line.append(" " * length, make_style(middle / top))
        console.print(line.append(f" {count} ({count / len(temperatures):.0%})"))


def make_page(
    pieces: Sequence[str],
    temperatures: Sequence[float],
    title: str,
    prompt: str = "",
    maximum: float | None = None,
) -> str:
    """The same as an HTML page that loads nothing else and needs no script.

    Args:
        prompt: shown above the answer, unless it is empty.
        maximum: the end of the scale; the highest temperature, if None.
    """
    top = find_top(temperatures, maximum)
    style = STYLE + make_level_rules()
    fingerprint = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    name = escape(title.translate(VISIBLE))
    question = f'<h2>Prompt</h2>\n<pre class="text">\n{show(prompt)}</pre>\n' if prompt else ""
    tokens = "".join(make_span(token, top) for token in group_tokens(pieces, temperatures))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'sha256-{fingerprint}'">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{name}</h1>
<p>{escape(describe(temperatures))}</p>
{question}<h2>Answer</h2>
{make_legend(top)}
<pre class="text" aria-label="Answer, each token coloured by its temperature">
{tokens}</pre>
<h2>Temperature (0 to {shorten(top)}) over position</h2>
{make_strip(temperatures, top)}
<h2>How often</h2>
{make_histogram(temperatures, top)}
</main>
</body>
</html>
"""


def group_tokens(pieces: Sequence[str], temperatures: Sequence[float]) -> list[ShownToken]:
    """Tokens without text of their own go along with the next that has some.

    Those at the end, such as the end of the sequence, stand for themselves with an empty text.
    """
    shown: list[ShownToken] = []
    start = 0
    for position, piece in enumerate(pieces):
        if piece:
            positions = tuple(range(start, position + 1))
            shown.append(
                ShownToken(
                    piece.translate(VISIBLE), positions, tuple(temperatures[start : position + 1])
                )
            )
            start = position + 1
    rest = range(start, len(pieces))
    return shown + [ShownToken("", (position,), (temperatures[position],)) for position in rest]


def find_top(temperatures: Sequence[float], maximum: float | None) -> float:
    """The end of the scale, above 0."""
    return max(maximum or 0.0, *temperatures, 0.0) or 1.0


def describe(temperatures: Sequence[float]) -> str:
    """The tokens in one line."""
    if not temperatures:
        return "no tokens"
    mean = sum(temperatures) / len(temperatures)
    return (
        f"{len(temperatures)} token{'s' * (len(temperatures) > 1)}, temperature {shorten(mean)} on "
        f"average, from {shorten(min(temperatures))} to {shorten(max(temperatures))}"
    )


def shorten(temperature: float) -> str:
    """A temperature to three decimals, without zeros at the end."""
    return f"{round(temperature, 3):g}"


def count_temperatures(temperatures: Sequence[float]) -> list[tuple[str, float, int]]:
    """A histogram: label, temperature of the middle, number of tokens."""
    counts = Counter(temperatures)
    if len(counts) <= MAX_BARS:
        return [(shorten(value), value, counts[value]) for value in sorted(counts)]
    low, high = min(counts), max(counts)
    width = (high - low) / NUM_BINS
    bins = Counter(min(int((value - low) / width), NUM_BINS - 1) for value in temperatures)
    edges = [low + index * width for index in range(NUM_BINS + 1)]
    return [
        (f"{start:.2f}–{stop:.2f}", (start + stop) / 2, bins[index])
        for index, (start, stop) in enumerate(pairwise(edges))
    ]


def find_level(share: float) -> int:
    """Which of the page's colours stands for a share of the highest temperature."""
    return round(share * (NUM_LEVELS - 1))


def make_style(share: float) -> Style:
    """A terminal's colours; its own background is unknown, so that the ramp's choice is as good."""
    background = DARK.at(share)
    return Style(color=to_hex(choose_ink(background)), bgcolor=to_hex(background))


def make_span(token: ShownToken, top: float) -> str:
    """One coloured token of the page."""
    level = find_level(token.temperatures[-1] / top)
    values = ", ".join(shorten(value) for value in token.temperatures)
    places = f"{token.positions[0]}"
    if len(token.positions) > 1:
        places += f"–{token.positions[-1]}"
    what = token.text.replace("\n", "↵").replace("\t", "⇥") or "no text"
    title = f"“{what}” · temperature {values} · position {places}"
    text = show(token.text) or END
    return f'<span class="t{level}" title="{escape(title)}">{text}</span>'


# Drawn by the style sheet, so that a copy of the text has none of it.
BREAK = '<i class="break" aria-hidden="true"></i>\n'
END = '<i class="end" aria-hidden="true"></i>'


def show(text: str) -> str:
    """Text as HTML in which line breaks are visible."""
    return escape(text.translate(VISIBLE)).replace("\n", BREAK)


def make_legend(top: float) -> str:
    """The scale from 0 to the highest temperature."""
    cells = "".join(f'<b class="t{level}"></b>' for level in range(NUM_LEVELS))
    end = shorten(top)
    label = f"Colours from temperature 0 to {end}"
    return f'<p class="legend">0 <span role="img" aria-label="{label}">{cells}</span> {end}</p>'


def make_strip(temperatures: Sequence[float], top: float) -> str:
    """Temperature over position: a bar a token, its height and colour the temperature."""
    paths: dict[int, list[str]] = {}
    for position, temperature in enumerate(temperatures):
        # A temperature of 0 is a low bar, not a gap.
        height = 3 + 97 * temperature / top
        bar = f"M{position} 100v-{height:.3g}h1V100z"
        paths.setdefault(find_level(temperature / top), []).append(bar)
    bars = "".join(
        f'<path class="t{level}" d="{"".join(paths[level])}"/>' for level in sorted(paths)
    )
    label = f"Temperature over position: {describe(temperatures)}"
    last = max(len(temperatures) - 1, 0)
    return (
        f'<svg class="strip" viewBox="0 0 {last + 1} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{bars}</svg>\n'
        f'<p class="axis"><span>position 0</span><span>{last}</span></p>'
    )


def make_histogram(temperatures: Sequence[float], top: float) -> str:
    """How often each temperature was chosen, as a table with bars."""
    bars = count_temperatures(temperatures)
    most = max((count for _, _, count in bars), default=1)
    rows = "\n".join(
        f'<tr><th scope="row">{label}</th><td>{count}</td><td>{count / len(temperatures):.0%}</td>'
        f'<td><svg viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="t{find_level(middle / top)}" width="{100 * count / most:.4g}" height="1"/>'
        "</svg></td></tr>"
        for label, middle, count in bars
    )
    return (
        '<table>\n<tr><th scope="col">temperature</th><th scope="col">tokens</th>'
        f'<th scope="col">share</th><td></td></tr>\n{rows}\n</table>'
    )


STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de}
@media (prefers-color-scheme:dark){
:root{--page:#0f1318;--ink:#e4e8ec;--soft:#9aa4af;--line:#39424c}
}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:56rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.4rem;overflow-wrap:anywhere}
h2{font-size:1rem;margin:1.6rem 0 .4rem;color:var(--soft)}
.text{margin:0;font:.95rem/1.9 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.text span{padding:.15em 0;border-radius:.2em;-webkit-box-decoration-break:clone;
box-decoration-break:clone}
.text span:hover{outline:2px solid var(--ink)}
i{font-style:normal;opacity:.6}
.break::before{content:"↵"}
.end::before{content:"∅"}
.legend{margin:.2rem 0 .8rem}
.legend span{outline:1px solid var(--line)}
.legend b{display:inline-block;width:.6rem;height:1rem;vertical-align:middle}
.strip{display:block;width:100%;height:6rem;border-bottom:1px solid var(--line)}
.axis{display:flex;justify-content:space-between;margin:.2rem 0;color:var(--soft);font-size:.85rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.1rem .8rem .1rem 0;text-align:right;font-weight:normal}
th[scope=col]{color:var(--soft)}
td svg{display:block;width:16rem;max-width:30vw;height:1rem}
td rect{stroke:var(--line);vector-effect:non-scaling-stroke}
"""


def make_level_rules() -> str:
    """CSS of the levels' colours, on light and on dark pages."""
    light, dark = (
        "\n".join(make_level_rule(level, ramp) for level in range(NUM_LEVELS))
        for ramp in (LIGHT, DARK)
    )
    return f"{light}\n@media (prefers-color-scheme:dark){{\n{dark}\n}}\n"


def make_level_rule(level: int, ramp: Ramp) -> str:
    """CSS of one level: of text, and of the bars of the charts."""
    color = ramp.at(level / (NUM_LEVELS - 1))
    back, ink = to_hex(color), to_hex(choose_ink(color))
    return f".t{level}{{background:{back};fill:{back};color:{ink}}}"


def choose_ink(background: RGB) -> RGB:
    """Black or white, whichever is easier to read: a contrast of 4.5 or more."""
    return (0, 0, 0) if find_luminance(background) > 0.179 else (255, 255, 255)


def find_luminance(color: RGB) -> float:
    """Relative luminance of WCAG, 0 to 1."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def to_rgb(lightness: float, chroma: float, hue: float) -> RGB:
    """An OKLCH colour in sRGB; what sRGB does not have is clipped."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        to_channel(4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short),
        to_channel(-1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short),
        to_channel(-0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short),
    )


def to_channel(value: float) -> int:
    """A linear channel as sRGB's, 0 to 255."""
    value = min(max(value, 0.0), 1.0)
    curved = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
    return round(255 * curved)


def to_hex(color: RGB) -> str:
    """A colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*color)
