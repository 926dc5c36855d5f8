"""What pictures are held against: names of any kind, labels and legends as texts, that nothing is cut off."""

import warnings
from contextlib import contextmanager
from itertools import combinations

from matplotlib.text import Text

from modules.output.style import drawing

ODD_NAMES = ["Ba$e_x^2", "_$\\frac{1}{2", "名前\u202e\n🙂", "n" * 200, "$", "%s {0}", "\\alpha^$_", "m" * 200, "a\tb"]


@contextmanager
def without_warnings():
    """Whatever matplotlib has to say would stand between the lines of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def assert_nothing_is_cut_off(figure):
    with drawing():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 > -0.05 and box.y0 > -0.05 and box.x1 < width + 0.05 and box.y1 < height + 0.05


def assert_no_labels_overlap(figure):
    with drawing():
        figure.draw_without_rendering()
        shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in shown]
    assert [(one, other) for (one, box), (other, next_box) in combinations(boxes, 2) if box.overlaps(next_box)] == []
