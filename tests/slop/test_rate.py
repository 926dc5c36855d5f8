"""Rates: what counts as a phrase, against the judge of the benchmarks; intervals; what the table and the JSON show."""

import random
import sys
from pathlib import Path

import pytest
from project import ROOT

from modules.config.schema import Config, Directories
from modules.slop.rate import counts, document, names_for, table

sys.path.append(str(ROOT / "benchmarks"))

import judge

PHRASES = ("mix of", "a mix of", "took a deep breath", "don't know", "Elara", "breath")


def texts_of(seed):
    """For each of 12 prompts three texts of words that phrases are made of."""
    chance = random.Random(seed)
    words = [
        "a",
        "mix",
        "of",
        "took",
        "deep",
        "breath,",
        "Don\u2019t",
        "don't",
        "know.",
        "elara",
        "Elara's",
        "breathe\n",
    ]
    return [[" ".join(chance.choices(words, k=80)) for _ in range(3)] for _ in range(12)]


@pytest.mark.parametrize("seed", range(3))
def test_as_the_judge_counts(seed):
    texts, base = texts_of(seed), texts_of(seed + 10)
    pattern = judge.finder(PHRASES)

    def judged(texts):
        return judge.Written(
            [sum(judge.word_count(text) for text in some) for some in texts],
            [sum(judge.hit_count(pattern, text) for text in some) for some in texts],
        )

    ours, before = counts(texts, PHRASES), counts(base, PHRASES)
    theirs, theirs_before = judged(texts), judged(base)
    assert list(ours.words) == theirs.words and [hits.total() for hits in ours.hits] == theirs.hits
    assert ours.rate(PHRASES) == pytest.approx(theirs.rate) and ours.rate(PHRASES) > 0
    assert ours.interval(PHRASES) == pytest.approx(theirs.interval())
    change, interval = ours.change(before, PHRASES)
    assert [100 * value for value in (change, *interval)] == pytest.approx(theirs.change(theirs_before))


def test_a_phrase_is_whole_words_and_the_longer_one_counts():
    found = counts([["A mix\n of a MIX of. Remix of it; mix often. Breath\u2014taken."]], PHRASES)
    assert found.words == (12,)
    assert dict(found.hits[0]) == {"a mix of": 2, "breath": 1}
    assert found.rate(["breath"]) == pytest.approx(1000 / 12) and found.rate(["Elara"]) == 0


def test_a_phrase_with_variants_counts_all_of_them_and_what_they_share_once():
    """What another phrase has as well counts for the one that is listed first."""
    variants = {"any": ("a mix", "mix of it", "Breath"), "more": ("breath", "word")}
    text = "A mix of it. Mix of it, a mix; breath, breath. Word. A mix of a mix of it"
    found = counts([[text]], ["any", "of", "more"], variants)
    assert found.hits[0] == {"any": 7, "of": 3, "more": 1}
    assert counts([[text]], ["more", "any"], variants).hits[0] == {"any": 5, "more": 3}
    assert counts([[text]], ["a mix", "of"], {}).hits[0] == counts([[text]], ["a mix", "of"]).hits[0]


def test_an_apostrophe_is_one_however_it_is_written():
    found = counts([["I don\u2019t know, they don't know"]], ["don\u2019t know", "breath"])
    assert dict(found.hits[0]) == {"don\u2019t know": 2}


def test_a_zero_has_an_upper_bound():
    """Of no hit in so many words, 3 in so many: with a rate above that, none has a chance of less than 5 %."""
    found = counts([["word " * 300], ["word " * 200]], ["mix of", "a mix"])
    for phrases in (["mix of"], ["mix of", "a mix"]):
        assert found.rate(phrases) == 0 and found.interval(phrases) == (0, pytest.approx(6.0))
    assert (1 - found.interval(["mix of"])[1] / 1000) ** 500 == pytest.approx(0.05, abs=0.002)
    assert counts([[""], [""]], ["mix of"]).interval(["mix of"]) == (0, 3000)


def test_a_change_to_zero_has_an_upper_bound_too():
    base = counts([["mix of " * 5 + "word " * 90]] * 4, ["mix of"])
    gone = counts([["word " * 1000]] * 4, ["mix of"])
    share, interval = gone.change(base, ["mix of"])
    assert share == -1 and interval == (-1, pytest.approx(0.75 / 50 - 1))


def test_with_one_prompt_there_is_no_interval():
    one = counts([["mix of it"]], ["mix of", "none"])
    assert one.interval(["mix of"]) is None and one.change(one, ["mix of"]) == (0, None)
    assert one.interval(["none"]) == (0, 1000)


def test_words_of_all_texts():
    found = counts([["\u5979\u5fae\u7b11\u3002", "one two"], ["three"]], ["\u5fae\u7b11"])
    assert (found.words, found.total) == ((5, 1), 6)
    assert found.rate(["\u5fae\u7b11"]) == pytest.approx(1000 / 6)


def test_an_interval_holds_the_rate_and_grows_with_chance():
    even = counts([["mix of " * 5 + "word " * 90]] * 40, ["mix of"])
    uneven = counts([["mix of " * (200 if number == 0 else 0) + "word " * 90] for number in range(40)], ["mix of"])
    assert even.interval(["mix of"]) == pytest.approx((even.rate(["mix of"]),) * 2)
    low, high = uneven.interval(["mix of"])
    assert low < uneven.rate(["mix of"]) < high and low == 0


def test_no_change_against_a_base_that_may_say_nothing():
    seldom = counts([["mix of it"], ["none of it"], ["none of it"]], ["mix of"])
    assert seldom.change(seldom, ["mix of"]) is None
    often = counts([["mix of it"]] * 3, ["mix of"])
    assert often.change(often, ["mix of"]) == (0, (0, 0))


def test_every_phrase_is_in_the_table_or_named_below():
    phrases = ["mix of", "a mix of", "\u2014", "gone", "\u200b"]
    texts = {"base": [["A mix of it\u2014so."], ["One. A mix of."]], "merge": [["Two words."], ["\u5979\u5fae\u7b11"]]}
    counted = {name: counts(own, phrases) for name, own in texts.items()}
    *lines, below = table({"all": phrases}, counted)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [first for first, *_ in rows[1:]] == ["a mix of", "\u2014", "all", "", "words"]
    assert rows[-1][1:] == ["8", "5"] and below.endswith(": mix of, gone, \u200b")
    found = document({"all": phrases}, counted)["merge"]
    assert (found["words"], found["all"]["rate"]) == (5, 0)
    assert found["all"]["interval"] == found["phrases"]["gone"]["interval"] == (0, 600)


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["one/base", "one/merge"], ["base", "merge"]),
        (["one/base", "two/base", "one/base"], ["one/base", "two/base", "one/base"]),
        (["/gone/base"], ["base"]),
        (["org/name@main", "one/base"], ["name@main", "base"]),
    ],
)
def test_names_tell_models_apart(tmp_path, monkeypatch, texts, names):
    monkeypatch.chdir(tmp_path)
    for folder in ("one/base", "one/merge", "two/base"):
        Path(folder).mkdir(parents=True)
    assert names_for([Config(Directories(text, "")) for text in texts]) == names
