"""Rates: what counts as a phrase, against the judge of the benchmarks; intervals."""

import random
import sys

import pytest
from project import ROOT

from modules.discovery.rates import counts

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
