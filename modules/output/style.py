"""The common style of all pictures: fonts, colours, models' names, writing the file.

Knows: looks and wording. Refuses to know: what a picture shows.
"""

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from modules.runtime.text import one_line, shortened

# Okabe and Ito's palette, which colour-blind readers can tell apart. The base is grey.
BASE_COLOUR = "#BBBBBB"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
BETTER = "#0072B2"
WORSE = "#D55E00"
SAME = "#888888"
DARK = "#444444"

# Fonts for scripts that matplotlib's own font lacks; those that the machine has are used.
_MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "Hiragino Sans", "Arial Unicode MS")

# Pictures look the same whatever the user's matplotlibrc says, and a $ in a model's name is a $.
STYLE: list[str | dict[str, Any]] = [
    "default",
    {
        "font.family": ["DejaVu Sans", *(font for font in _MORE_FONTS if font in fontManager.get_font_names())],
        "font.size": 9,
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "figure.titlesize": 11,
        "figure.labelsize": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "text.parse_math": False,
    },
]

_LETTERS = 7  # of a title per inch, even of the widest
_MOST_NAMES = 8  # candidates that a title names


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the style of all pictures while one is drawn or written."""
    with style.context(STYLE), warnings.catch_warnings():
        # A character that no font has is drawn as a box, which says enough.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


@drawing()
def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure as a PNG file, the same bytes every time. Raises OSError if it can't be written."""
    figure.savefig(file, format="png", metadata={"Software": None})


def percent(value: float, _: Any = None) -> str:
    """A fraction as a percentage with up to three digits."""
    return f"{value * 100:.3g}%"


def short_name(model: str) -> str:
    """A model's name on one line; a long one is shortened in its middle."""
    return shortened(one_line(model), 32, "both")


def title_of(subject: str, models: Sequence[str], width: float) -> str:
    """A picture's title: its subject and the models. width: of the picture, in inches."""
    base, *candidates = models
    names = [short_name(model) for model in candidates[:_MOST_NAMES]]
    names += [f"{len(candidates) - len(names)} more"] if len(names) < len(candidates) else []
    text = f"{subject}: {short_name(base)}" + (f" + {', '.join(names)}" if names else "")
    return textwrap.fill(text, int(width * _LETTERS), break_on_hyphens=False)
