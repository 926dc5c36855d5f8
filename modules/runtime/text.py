"""Formats texts and numbers: the width of a text, how a long one is shortened, tables, percentages, sizes, times.

Knows: characters, columns, bytes. Refuses to know: what a text is about, where it is shown.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import Literal

_CUT = "..."  # replaces the part that is left out
# The signs that end a sentence, in the scripts that models write most, and those that may close after it.
_ENDS = (*".!?\u2026\u203c\u2047\u2048\u2049\u3002\uff01\uff0e\uff1f\uff61\u061f\u06d4\u0964\u0965",)
_CLOSING = "\"'*_`)]}\xbb\xab\u2019\u201c\u201d\u203a\u300b\u300d\u300f\u3011\uff09"
_CLOSED = f"[{re.escape(_CLOSING)}]*"
# In scripts with spaces between words, a space follows. The point after a number may be that of a list.
_SENTENCE_END = re.compile(rf"[\u3002\uff01\uff0e\uff1f\uff61]{_CLOSED}|(?<!\d)[{''.join(_ENDS)}]{_CLOSED}(?=\s|$)")


def shortened(text: str, width: int = 40, keep: Literal["start", "end", "both"] = "end") -> str:
    """A text in `width` columns at most. keep: what to keep of a long one; of a context its end, before a phrase."""
    if columns(text) <= width:
        return text
    room = width - len(_CUT)
    head = {"start": room, "end": 0, "both": room // 2}[keep]
    return _beginning(text, head) + _CUT + _ending(text, room - head)


def ended(text: str) -> str:
    """A text that was cut off, with an ellipsis unless it ends with a sentence."""
    text = text.rstrip()
    return text if not text or text.rstrip(_CLOSING).endswith(_ENDS) else text + "\u2026"


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to the end of its last sentence or, if it has none, of its last whole word."""
    text = text.rstrip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    words = text.rsplit(maxsplit=1)
    return text[: ends[-1]] if ends else words[0] if words else ""


def one_line(text: str) -> str:
    """Text without line ends; characters that can't be shown become "?"."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    return "".join(character if character.isprintable() else "?" for character in text)


def ranges(numbers: Sequence[int]) -> list[str]:
    """Sorted whole numbers as spans: 0, 3, 8-12."""
    firsts = [number for number in numbers if number - 1 not in numbers]
    lasts = [number for number in numbers if number + 1 not in numbers]
    return [str(first) if first == last else f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True)]


def columns(text: str) -> int:
    """The width of a text on a terminal: Chinese characters and emoji take two columns, marks on a letter none."""
    letters = [character for character in text if unicodedata.category(character) not in ("Mn", "Me")]
    return len(letters) + sum(unicodedata.east_asian_width(letter) in ("W", "F") for letter in letters)


def _beginning(text: str, width: int) -> str:
    """The longest beginning of a text that fits into `width` columns."""
    ends = takewhile(lambda end: end <= width, accumulate(map(columns, text)))
    return text[: len(list(ends))]


def _ending(text: str, width: int) -> str:
    """The longest end of a text that fits into `width` columns, without marks of a letter that is cut."""
    end = text[len(text) - len(_beginning(text[::-1], width)) :]
    while end and not columns(end[0]):
        end = end[1:]
    return end


PHRASE_WIDTH = 24
CONTEXT_WIDTH = 28
RAW_WIDTH = 10
USED_WIDTH = 12


def table(header: Sequence[str], *groups: Sequence[Sequence[str]], widths: Sequence[int] = ()) -> list[str]:
    """The lines of a table: a header and groups of rows, with a rule below each group that is not empty.

    widths: of the columns; without them each is as wide as its widest cell.
    """
    if not widths:
        rows = [header, *(cells for group in groups for cells in group)]
        widths = [max(map(columns, map(one_line, column))) for column in zip(*rows, strict=True)]
    header_line = row(header, widths)
    rule = "-" * columns(header_line)
    lines = [rule, header_line, rule]
    for group in groups:
        if group:
            lines += [*(row(cells, widths) for cells in group), rule]
    return lines


def row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table."""
    return "| " + " | ".join(fit(cell, width) for cell, width in zip(cells, widths, strict=True)) + " |"


def fit(text: str, width: int) -> str:
    """Text on one line in exactly `width` columns; a long text keeps its end, which is next to a context's phrase."""
    text = shortened(one_line(text), width)
    return text + " " * (width - columns(text))


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and the number of the others."""
    remainder = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + remainder


def pluralize(count: int, noun: str) -> str:
    """A count with its noun: 1 pack, 2 packs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(value: float, width: int = USED_WIDTH, signed: bool = False, rounding: float = 0.0) -> str:
    """A fraction as a percentage in at most `width` characters, with five decimals, or fewer if they don't fit or are
    below its rounding."""
    sign = "+" if signed else ""
    texts = [f"{value * 100.0:{sign}.{count}f}%" for count in range(decimals(rounding), -1, -1)]
    return next((text for text in texts if len(text) <= width), f"{value * 100.0:{sign}.3e}%")


def brief_percent(value: float, rounding: float = 0.0) -> str:
    """A probability as a percentage with one decimal; below 0.1 % with two digits. No digit is below its rounding."""
    if 1e-6 <= value < 0.001 and not rounding:
        return f"{value * 100.0:.2g}%"
    return f"{value * 100.0:.{min(1, decimals(rounding))}f}%"


def decimals(rounding: float) -> int:
    """The number of a percentage's decimals that are above its rounding; at most five. rounding: a fraction."""
    return min(5, max(0, math.floor(-math.log10(rounding * 100.0)))) if 0 < rounding < math.inf else 5


def on_disk(count: int) -> str:
    """Bytes of files: in GB, or in MB if they are few."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def in_memory(count: int) -> str:
    """Bytes of memory: in GiB, or in MiB if they are few."""
    return f"{count / 2**30:,.2f} GiB" if count >= 1e8 else f"{count / 2**20:,.2f} MiB"


def duration(seconds: float) -> str:
    """A time in at most two units: an estimate needs no more digits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours = round(seconds / 3600)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
