"""Which of a response's tokens stand for a span of its text."""

from collections.abc import Callable, Sequence

from adaptive_head.lpo.records import Span

Decode = Callable[[Sequence[int]], str]
TokenRange = tuple[int, int]

_UNFINISHED = "\ufffd"
# Tokens that are decoded again and again before the window moves on.
_WINDOW = 8


def locate_tokens(token_ids: Sequence[int], text: str, decode: Decode) -> list[TokenRange] | None:
    """Which characters [start, stop) of a response's text each of its tokens stands for.

    Token i begins where the whole characters of the tokens before it end, so a leading space
    belongs to the token that holds it, and a character of several tokens, such as an emoji, to
    each of them. A token without text, such as the end of the response, has start = stop.

    Args:
        text: what the tokens decode to, up to white space before it (which some tokenizers drop
            when they decode) and to an unfinished character or a stop string at its end.

    Returns:
        Ranges whose starts and stops never decrease; None if the text is another one.
    """
    locations = []
    # A window of tokens is decoded, as one token alone may be half a character, and as some
    # tokenizers drop the space that a text begins with.
    first, offset, start, end = 0, 0, 0, 0
    for index in range(len(token_ids)):
        window = decode(token_ids[first : index + 1])
        whole = offset + len(window.rstrip(_UNFINISHED))
        end = offset + len(window)
        # However many signs stand for the bytes so far, they will be one character.
        locations.append((start, max(start, min(end, whole + 1))))
        start = max(start, whole)
        last = decode(token_ids[index : index + 1])
        if index - first >= _WINDOW and last and _UNFINISHED not in last:
            first, offset = index, end - len(last)
    decoded = decode(token_ids)
    own, other = text.lstrip(), decoded.lstrip()
    if end != len(decoded) or not other.startswith(own.rstrip(_UNFINISHED)):
        return None
    shift = (len(text) - len(own)) - (len(decoded) - len(other))
    moved = [(max(0, low + shift), max(0, high + shift)) for low, high in locations]
    if moved:
        moved[0] = (0, moved[0][1])
    return moved


def cover_span(locations: Sequence[TokenRange], span: Span) -> TokenRange | None:
    """Tokens [start, stop) from the first to the last that overlaps the span; None if none does.

    Args:
        locations: of each token, as `locate_tokens` gives them.
    """
    found = [
        index
        for index, (start, stop) in enumerate(locations)
        if max(start, span.start) < min(stop, span.stop)
    ]
    return (found[0], found[-1] + 1) if found else None


def cut_out(tokens: TokenRange | None, taken: set[int]) -> TokenRange | None:
    """The longest run of `tokens` that are not taken, the first of several; None if all are."""
    if tokens is None:
        return None
    best = (tokens[0], tokens[0])
    start = tokens[0]
    for index in (*sorted(taken.intersection(range(*tokens))), tokens[1]):
        if index - start > best[1] - best[0]:
            best = (start, index)
        start = index + 1
    return best if best[0] < best[1] else None
