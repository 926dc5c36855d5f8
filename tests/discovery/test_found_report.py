"""The report: what is said of every phrase, and what a reader must know of how it was counted."""

import pytest

from modules.discovery import report
from modules.discovery.finder import Finding, Findings, Text
from modules.discovery.rates import counts

PHRASES = ["mix of", "a mix of", "\u2014", "gone", "\u200b"]
TEXTS = {"base": [["A mix of it\u2014so."], ["One. A mix of."]], "merge": [["Two words."], ["\u5979\u5fae\u7b11"]]}


@pytest.fixture
def counted():
    return {name: counts(texts, PHRASES) for name, texts in TEXTS.items()}


def test_every_phrase_is_in_the_table_or_told_apart(counted):
    *table, elsewhere, never = report.rate_lines({"all": PHRASES}, {}, counted)
    rows = [line.split("|")[1].strip() for line in table if line.startswith("|")]
    assert rows == ["Per 1,000 words, 95 %", "a mix of", "\u2014", "all", "", "words"]
    assert elsewhere.endswith(": mix of") and never.endswith(": gone")
    (words,) = [line for line in table if line.startswith("| words")]
    assert [cell.strip() for cell in words.split("|")[2:4]] == ["8", "5"]


def test_what_limits_the_rates_is_told(counted):
    characters, unseen = report.doubts(PHRASES, {}, counted)
    assert "3 of 5 words" in characters and characters.startswith("merge: ") and "\\u200b" in unseen
    assert report.doubts(PHRASES[:4], {}, {"base": counted["base"]}) == []
    for texts, said in (([[""], [" "]], "model wrote no words"), ([["one"]], "one prompt")):
        (line,) = report.doubts(["one"], {}, {"model": counts(texts, ["one"])})
        assert said in line


def test_a_zero_in_the_document_has_an_upper_bound(counted):
    found = report.rate_document({"all": PHRASES}, counted)["merge"]
    assert (found["words"], found["characters"], found["all"]["rate"]) == (5, 3, 0)
    assert found["all"]["interval"] == found["phrases"]["gone"]["interval"] == (0, 600)


def test_texts_end_at_a_sentence_or_in_an_ellipsis():
    _, whole, broken, long = report.sample_lines("Q", {"a": "A b.", "b": "A b. And", "c": "word " * 200})
    assert whole.endswith("A b.") and broken.endswith("And\u2026") and long.endswith("...")
    finding = Finding("mix of", 1, 1, 1, 1.0, 0.0, 1.0, 1.0, ((0, 12, 18),))
    text = "One. With a mix of it."
    (row,) = [line for line in report.found_lines(Findings((finding,), (), 0, 9), [Text(0, text)]) if "| 1 " in line]
    assert row.split("|")[-2].strip() == "With a mix of\u2026"


def test_where_nothing_was_found_there_is_no_table():
    assert report.found_lines(Findings((), (), 0, 9), []) == []
