"""Tables and lines, to the character."""

import math

import pytest

from modules import report
from modules.config import Pair
from modules.search import Decision

PAIRS = [
    Pair("BAD", "anticipation", "Her body quivers with ", 10.0),
    Pair("BAD", "a phrase that is longer than its column", "x" * 40, 1.0),
    Pair("GOOD", "in the\nbedroom", "Answer:\x1b[31m ", 2.0),
]
WEIGHTS = [10.0, 1.0, -2.0]


def logs(*probabilities):
    return [math.log(value) if value else -math.inf for value in probabilities]


def decision(layer=2, method="lerp", ratio=0.5, before=0.38319, after=0.38261, **more):
    return Decision("one", layer, method, ratio, before, after, (), **more)


def lines(made, merges=((1.0, "base"), (0.5, "one")), name_method=False):
    return report.decision_lines(made, merges, 32, name_method)


def test_the_two_lines_of_an_accepted_merge():
    assert lines(decision()) == [
        "[[1.0, 'base'], [0.5, 'one']]",
        "Layer 3/32 - CHANGED - 0.38319 > 0.38261 - 0.2%",
    ]


def test_the_two_lines_of_a_retained_layer():
    made = decision(ratio=None, after=0.38319)
    assert lines(made, [(1.0, "base")]) == ["[[1.0, 'base']]", "Layer 3/32 - RETAINED - 0.38319"]


def test_the_header_and_several_methods():
    assert lines(decision(layer=None), name_method=True)[1] == "Header - CHANGED - 0.38319 > 0.38261 - 0.2%"
    assert lines(decision(method="slice"), name_method=True)[1].endswith("0.2% - slice")


@pytest.mark.parametrize(
    "before, after, change",
    [(0.5, 0.4, "20.0%"), (-0.5, -0.6, "20.0%"), (0.25, -0.25, "200.0%"), (0.0, -0.1, "n/a"), (-2.0, -2.004, "0.2%")],
)
def test_the_percentage_is_relative_to_the_old_total(before, after, change):
    assert lines(decision(before=before, after=after))[1].endswith(f" - {change}")


@pytest.mark.parametrize("method, share", [("lerp", 0.3), ("slice", 0.3), ("cyclic", 0.15), ("gradient", 0.45)])
def test_the_share_that_the_composition_records(method, share):
    assert decision(method=method, ratio=0.3).share == share
    assert decision(method=method, ratio=None).share == 0.0


def test_the_phrase_table_before_the_first_merge():
    table = report.phrase_table(PAIRS, WEIGHTS, logs(0.09, 0.5, 0.25))
    assert table[3:6] == [
        "| BAD  | anticipation             | Her body quivers with        | 9.00000%   | 90.00000%    | N/A          |",
        "| BAD  | ...onger than its column | ...xxxxxxxxxxxxxxxxxxxxxxxxx | 50.00000%  | 50.00000%    | N/A          |",
        "| GOOD | in the bedroom           | Answer:?[31m                 | 25.00000%  | 50.00000%    | N/A          |",
    ]
    assert table[7] == (
        "|      | Total (bad - good)       |                              | 34.00000%  | 90.00000%    | N/A          |"
    )


def test_the_phrase_table_after_a_candidate():
    table = report.phrase_table(PAIRS, WEIGHTS, logs(0.04, 0.6, 0.5), logs(0.09, 0.5, 0.25))
    assert [line.split("|")[4:7] for line in (*table[3:6], table[7])] == [
        [" 4.00000%   ", " 40.00000%    ", " -50.00000%   "],
        [" 60.00000%  ", " 60.00000%    ", " +10.00000%   "],
        [" 50.00000%  ", " 100.00000%   ", " +50.00000%   "],
        [" 14.00000%  ", " 0.00000%     ", " -90.00000%   "],
    ]
    assert len({len(line) for line in table[:-1]}) == 1


def test_probabilities_of_any_size_keep_the_table_in_shape():
    pairs = [Pair("BAD", "p", "c", 1.0)] * 3
    weights = [1.0, 1e12, 1e-9]
    table = report.phrase_table(pairs, weights, logs(1e-30, 1.0, 0.0), logs(0.5, 1e-300, 1.0))
    assert len({len(line) for line in table[:-1]}) == 1
    assert "1.000e+14%" in table[4]


def test_composition_lines():
    assert report.composition_lines({"base": 0.625, "one": 0.375}) == [" 62.50%  base", " 37.50%  one"]
