"""Tables and lines, to the character."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modules.config.phrase_lists import Pair
from modules.output import tables as report
from modules.output.records import Sample
from modules.runtime import text as widths
from modules.runtime.text import columns, shortened
from modules.search.decision import Decision

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
    [
        (0.5, 0.4, "20.0%"),
        (-0.5, -0.6, "20.0%"),
        (-2.0, -2.004, "0.2%"),
        (0.5, 0.0, "100.0%"),
        (0.0, -0.1, "n/a"),
        (0.25, -0.25, "n/a"),  # across zero
        (-0.25, 0.25, "n/a"),
        (1e-320, -1e-320, "n/a"),
        (math.inf, 0.5, "n/a"),
        (1e-310, 1e10, "n/a"),
    ],
)
def test_the_percentage_is_relative_to_the_old_total(before, after, change):
    assert lines(decision(before=before, after=after))[1].endswith(f" - {change}")


def test_metrics_are_shown_by_name():
    made = decision(metrics={"trial_kl": 0.0123, "pages": 3})
    assert lines(made)[1].endswith(" - 0.2% - KL in trials 0.0123 - pages 3.0000")
    values = {"total": 0.5, "top1": 0.25, "perplexity": 1e15}
    assert report.metrics_line({**values, "total": 1}, values) == (
        "Metrics: Total 1.000 -> 0.500, Top-1 agreement 25.0% -> 25.0%, Perplexity 1e+15 -> 1e+15"
    )
    assert report.step_line(7, 25, 1.5, values) == (
        "Step 7/25 - total 1.500 -> 0.500 - Top-1 agreement 25.0% - Perplexity 1e+15"
    )


def test_no_digit_of_a_probability_below_its_rounding_is_shown():
    spine, apple, arm = Pair("BAD", "spine", "a "), Pair("GOOD", "apple", "b "), Pair("BAD", "arm", "c ")
    models = {"base": [0.5, 0.25, 0.75], "a-model-with-quite-a-long-name": [0.0, 0.3, 1.0]}
    shown = report.probability_table([spine, apple], [arm], models, [0.0, 0.002])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown if line.startswith("|")]
    assert cells == [
        ["Type", "Phrase", "Context", "base", "...ith-quite-a-long-name"],
        ["BAD", "spine", "a", "50.0%", "0.0%"],
        ["GOOD", "apple", "b", "25%", "30%"],
        ["BAD", "arm", "c", "75%", "100%"],
    ]
    assert len({len(line) for line in shown[:-1]}) == 1 and shown[-1].endswith("held out: the last 1 row")


@pytest.mark.parametrize("method, share", [("lerp", 0.3), ("slice", 0.3), ("cyclic", 0.15), ("gradient", 0.45)])
def test_the_share_that_the_composition_records(method, share):
    assert decision(method=method, ratio=0.3).weight == share
    assert decision(method=method, ratio=None).weight == 0.0


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


def table_of(kind, start=(0.09, 0.5, 0.25), now=(0.04, 0.5, 0.5)):
    return report.phrase_table(PAIRS, WEIGHTS, logs(*now), start and logs(*start), kind)


def shown(table):
    """The type and the change of every row."""
    rows = [[cell.strip() for cell in line.split("|")] for line in table if line.startswith("| ")]
    return [(cells[1], cells[6]) for cells in rows[1:]]


def test_a_table_of_what_has_changed():
    table = table_of("changed")
    assert shown(table) == [("BAD", "-50.00000%"), ("GOOD", "+50.00000%"), ("", "-100.00000%")]
    assert table[-2].startswith("not shown: 1 of 3 pairs")
    assert len({len(line) for line in table[:-2]}) == 1


@pytest.mark.parametrize("kind", ["changed", "summary"])
def test_before_the_first_merge_nothing_has_changed(kind):
    table = table_of(kind, start=None)
    assert shown(table) == [("", "N/A")]
    assert table[0] == table[2] == table[4] and len(table) == 7
    assert table[5].startswith(
        {"changed": "not shown: 3 of 3 pairs", "summary": "improved since the start: 0 of 3"}[kind]
    )


def test_what_counts_as_changed_is_the_used_probability():
    moves = {0.5: False, 0.50004: False, 0.49996: False, 0.50006: True, 0.49994: True}
    for now, changed in moves.items():
        pairs = [Pair("BAD", "p", "c", 1.0), Pair("BAD", "p", "d", 0.5)]
        table = report.phrase_table(pairs, [1.0, 0.5], logs(now, now), logs(0.5, 0.5), "changed")
        assert len(shown(table)) == 1 + changed
        assert f"not shown: {2 - changed} of 2 pairs" in table[-2]


def test_a_summary_counts_the_pairs_that_went_where_they_should():
    table = table_of("summary", now=(0.04, 0.6, 0.25))
    assert shown(table) == [("", "-40.00000%")]
    assert table[-2] == "improved since the start: 1 of 3 pairs"


@pytest.mark.parametrize(
    "value, width, shown",
    [
        (0.5, 12, "50.00000%"),
        (10.0, 10, "1000.0000%"),
        (-3.2012345, 10, "-320.1234%"),
        (99999.999996, 12, "10000000.00%"),
        (12345678.9, 10, "1.235e+09%"),
        (math.inf, 10, "inf%"),
        (0.0, 10, "0.00000%"),
    ],
)
def test_percentages_keep_their_width(value, width, shown):
    assert widths.percent(value, width) == shown and len(shown) <= width


@pytest.mark.parametrize(
    "text, fitted",
    [
        ("spine", "spine     "),
        ("exactly 10", "exactly 10"),
        ("eleven long", "...en long"),
        ("two\nlines\t x", "...lines x"),
        ("\u65e5\u672c\u8a9e", "\u65e5\u672c\u8a9e    "),
        ("\u65e5\u672c\u8a9e\u65e5\u672c\u8a9e", "...\u65e5\u672c\u8a9e "),
        ("\U0001f642 yes", "\U0001f642 yes    "),
        ("e\u0301", "\xe9         "),
        ("x\u0301\u0302", "x\u0301\u0302         "),
        ("x\u0301234567890", "x\u0301234567890"),
        ("12345x\u0301567890", "...x\u0301567890"),
        ("\u1112\u1161\u11ab", "\ud55c        "),
        ("a\u200d\x1bb", "a??b      "),
        ("", "          "),
    ],
)
def test_cells_have_ten_columns(text, fitted):
    assert widths.fit(text, 10) == fitted


def test_the_marks_of_a_letter_that_is_cut_off_go_with_it():
    assert widths.fit("123" + "x\u0301" + "4567890", 10) == "...4567890"
    assert widths.fit("4567890" + "\u0301" * 10**5 + "4567890", 10) == "...4567890"


@pytest.mark.parametrize("keep, left", [("start", "1234567..."), ("end", "...4567890"), ("both", "123...7890")])
def test_what_is_kept_of_a_long_text(keep, left):
    assert shortened("1234567890", 10, keep) == "1234567890"
    assert shortened("12345678901234567890", 10, keep) == left


ODD = st.text(
    st.sampled_from("ab \n\t\u3000\u65e5\uff21\U0001f642\u0301\u20dd\u302a\u200d\ufe0f\u1161\u0e33\x1b\xad\xa0")
)


@settings(deadline=None)
@given(st.text() | ODD, st.text(max_size=200) | ODD, st.integers(4, 40))
@example("n" * 200, "\U0001f642" * 200, 24)
def test_a_row_of_any_text_is_as_wide_as_all_others(phrase, context, width):
    line = widths.row((phrase, context, "x"), (width, width, 3))
    assert columns(line) == 2 * width + 3 + 10
    assert line.isprintable() and line.count("\n") == 0


@settings(deadline=None)
@given(st.lists(st.tuples(ODD, ODD, st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_a_table_of_any_phrases_is_a_rectangle(rows):
    pairs = [Pair("BAD", phrase, context, weight) for phrase, context, weight, _, _ in rows]
    weights = [pair.weight for pair in pairs]
    before, after = (logs(*(row[place] for row in rows)) for place in (3, 4))
    for kind in ("full", "changed", "summary"):
        table = report.phrase_table(pairs, weights, after, before, kind)
        assert {columns(line) for line in table if line[0] in "|-"} == {109}


def test_answers_end_at_a_sentence_or_in_an_ellipsis():
    samples = [Sample(prompt="Say", base="A b. And the", merge="One.\nTwo"), Sample(prompt="?", base="", merge="A.")]
    assert report.sample_lines(samples)[1:-1] == [
        *("Prompt:  Say", "  base:  A b. And the\u2026", "  merge: One.", f"{'':<9}Two\u2026"),
        *("Prompt:  ?", "  base:  (nothing)", "  merge: A."),
    ]


@pytest.mark.parametrize(
    "value, rounding, shown",
    [
        (0.5, 0.0, "50.0%"),
        (0.00034, 0.0, "0.034%"),
        (1e-9, 0.0, "0.0%"),
        (0.0, 0.0, "0.0%"),
        (0.00034, 0.0002, "0.0%"),
        (0.25, 0.02, "25%"),
    ],
)
def test_a_probability_outside_the_phrase_table_has_one_decimal(value, rounding, shown):
    assert widths.brief_percent(value, rounding) == shown
