"""The finder: what may be found, how it is counted and ranked, and that planted phrases, and only they, are found."""

import math
import random
from collections import Counter

import pytest
import reference
import wordfreq
from hypothesis import given
from hypothesis import strategies as st

from modules.mapper.grammar import Grammar
from modules.slop.finder import Text, count_phrases, find
from modules.slop.human_rates import HumanRates, human_rates


@pytest.fixture(scope="module")
def english():
    return human_rates()


def found(human, said, prompt="?", prompts=6, times=1):
    """What is found if samples of so many prompts say something, each after a word and before others of its own."""
    texts = [Text(number, sample(number, said)) for number in range(prompts) for _ in range(times)]
    return find(texts, [prompt] * prompts, human)


def sample(number, said):
    return f"{'bcdfghjklmnpqrst'[number]}ay {said} {own_words(number)}"


def own_words(number):
    """40 words that no other sample has, each a sentence."""
    return " ".join(f"{'bcdfghjklmnpqrst'[number]}{one}{other}." for one in "aeio" for other in "bcdfghjklm")


def phrases(findings):
    return [finding.phrase for finding in findings.phrases]


def test_planted_phrases_are_found_and_nothing_else(english):
    """In words drawn as often as people write them, in any order; a topic of one prompt is none of it."""
    draw = random.Random(0)
    rates = wordfreq.get_frequency_dict("en")
    # The commonest words stand in an order of their own, which words that are drawn do not have.
    known = [word for word in list(rates)[100:] if word.isalpha() and word not in english.grammar.never_first]
    planted = {"nestled": 60, "a mix of pride and dread": 45, "testament to": 30}
    drawn, texts = draw.choices(known, [rates[word] for word in known], k=300 * 150), []
    for number in range(300):
        words = drawn[number::300]
        for phrase, every in planted.items():
            if draw.randrange(300) < every:
                words.insert(draw.randrange(1, len(words)), phrase)
        if number % 40 == 7:
            words[10:10] = ["chrysanthemum", "of", "the", "chrysanthemum"]
        texts.append(Text(number % 40, " ".join(words)))
    findings = find(texts, ["Write something."] * 40, english)
    assert set(phrases(findings)) == {"nestled", "mix of pride and dread", "testament to"}
    assert not findings.names and not findings.looping
    assert findings.words > 45_000


def test_what_a_finding_says(english):
    said = "was a testament to him, and a testament to them."
    texts = [Text(number // 2, sample(number, said)) for number in range(12)]
    findings = find(texts, ["?"] * 6, english)
    (finding,) = findings.phrases
    assert finding.words == ("testament", "to")
    assert (finding.phrase, finding.times, finding.texts, finding.prompts) == ("testament to", 24, 12, 6)
    assert findings.words == 12 * (1 + 10 + 40)
    assert finding.per_million == pytest.approx(1e6 * 12 / findings.words)
    assert finding.human == english.per_million(["testament", "to"])
    assert finding.ratio == pytest.approx(finding.per_million / (finding.human + 1))
    assert finding.score == pytest.approx(math.sqrt(6) * math.log(finding.ratio))
    assert len(finding.places) == 24
    assert {texts[number].text[start:end] for number, start, end in finding.places} == {"testament to"}


@pytest.mark.parametrize(
    "said, expected",
    [
        ("with a tapestry of woe.", ["tapestry of woe"]),  # begins with a content word
        ("is. With a sigh.", ["With a sigh"]),  # or at the beginning of a sentence
        ("was gleaming beneath the.", ["gleaming beneath"]),  # does not end in an article,
        ("was nestled but.", ["nestled"]),  # a conjunction
        ("was gleaming beneath their.", ["gleaming beneath"]),  # a pronoun
        ("was gleaming beneath nobody's.", ["gleaming beneath"]),  # or a possessive
        ("with shimmering, gleaming.", ["gleaming", "shimmering"]),  # goes over no comma
        ("with shimmering 3 gleaming.", ["gleaming", "shimmering"]),  # and no digit
        ("with shimmering\ngleaming.", ["gleaming", "shimmering"]),  # and no line's end
    ],
)
def test_what_may_be_found(english, said, expected):
    assert sorted(phrases(found(english, said))) == expected


def test_what_the_prompt_has_brought_does_not_count(english):
    assert phrases(found(english, "was nestled shimmeringly.")) == ["shimmeringly", "nestled"]
    assert phrases(found(english, "was nestled shimmeringly.", prompt="Who nestles where?")) == ["shimmeringly"]


def test_function_words_of_the_prompt_bring_nothing(english):
    assert phrases(found(english, "was a testament to him.", prompt="To whom?")) == ["testament to"]


@pytest.mark.parametrize("prompts, expected", [(4, []), (5, ["testament to"])])
def test_a_phrase_is_in_samples_of_five_prompts(english, prompts, expected):
    assert phrases(found(english, "was a testament to him.", prompts=prompts, times=3)) == expected


@pytest.mark.parametrize("prompts, expected", [(3, []), (4, ["Elara"])])
def test_a_name_is_in_samples_of_four_prompts_and_listed_apart(english, prompts, expected):
    findings = found(english, "was Elara. Elara was it.", prompts=prompts, times=3)
    assert [finding.phrase for finding in findings.names] == expected
    assert not findings.phrases


def test_a_word_that_only_opens_sentences_is_no_name(english):
    assert phrases(found(english, "is. Shimmeringly.")) == ["Shimmeringly"]


def test_a_phrase_is_shown_as_it_is_written_most_often(english):
    assert phrases(found(english, "is. Nestled, nestled, nestled.")) == ["nestled"]
    assert phrases(found(english, "is. Nestled, nestled. Nestled.")) == ["Nestled"]


def test_texts_count_and_not_times(english):
    once, often = (found(english, "was nestled, " * times).phrases[0] for times in (1, 10))
    assert (once.times, often.times) == (6, 60)
    assert once.texts == often.texts == 6
    assert often.per_million < once.per_million  # there are more words


def test_what_loops_is_left_out(english):
    said = "was a testament to him."
    texts = [Text(5, said * 30), *(Text(number, sample(number, said)) for number in range(5))]
    findings = find(texts, ["?"] * 6, english)
    assert findings.looping == 1 and findings.words == 5 * 46
    assert findings.phrases[0].times == 5
    assert {number for number, _, _ in findings.phrases[0].places} == {1, 2, 3, 4, 5}


def test_of_findings_that_are_part_of_one_another_the_better_one_stays(english):
    texts = [Text(number, sample(number, "with a warm smile of glee.")) for number in range(6)]
    texts += [Text(number, sample(number, "with a warm smile.")) for number in range(6, 12)]
    assert phrases(find(texts, ["?"] * 12, english))[0] == "warm smile"
    assert not {"smile", "smile of glee", "warm smile of glee"} & set(phrases(find(texts, ["?"] * 12, english)))


def test_of_findings_in_the_same_places_the_better_one_stays(english):
    texts = [Text(number, sample(number, "with gleaming eyes shimmering.")) for number in range(6)]
    texts += [Text(number, sample(number, "with gleaming eyes.")) for number in range(6, 12)]
    assert "gleaming eyes" in phrases(find(texts, ["?"] * 12, english))
    assert "eyes shimmering" not in phrases(find(texts, ["?"] * 12, english))


def test_nothing_to_find(english):
    for texts in ([], [Text(0, "")], [Text(0, "... 12")]):
        findings = find(texts, ["?"], english)
        assert (findings.phrases, findings.names, findings.looping, findings.words) == ((), (), 0, 0)


@pytest.mark.parametrize("ratio, expected", [(19.9, []), (20.1, ["nestled"])])
def test_the_texts_say_it_20_times_as_often_as_people(ratio, expected):
    share = 1e6 * 6 / (6 * 43)
    human = HumanRates(Grammar(frozenset(["was"]), frozenset(["was"])), word=lambda _: share / ratio - 1)
    assert phrases(found(human, "was nestled.")) == expected


LANGUAGE = Grammar(frozenset(["the", "of"]), frozenset(["the"]))
SAID = st.lists(st.sampled_from(["the", "of", ",", ".", "ba", "bo", "bu", "da"]), max_size=25)


@given(st.lists(st.tuples(st.sampled_from(["ba", "bo", "the", "zz"]), SAID), max_size=8), st.integers(1, 3))
def test_phrases_are_counted_as_by_looking_for_each(texts, least):
    prompts = ["ba", "bo", "the", "zz"]
    samples = [Text(prompts.index(prompt), " ".join(words)) for prompt, words in texts]
    counted = count_phrases(samples, prompts, LANGUAGE, least)
    for number, (_, words) in enumerate(texts):  # the twin counts commas and full stops as well
        assert len(samples[number].words) == sum(word not in ",." for word in words)
    places = {
        phrase: [(number, i - sum(word in ",." for word in texts[number][1][:i])) for number, i in found]
        for phrase, found in reference.naive_phrases(
            [(prompt, tuple(words)) for prompt, words in texts], LANGUAGE.never_first, LANGUAGE.never_last, least
        ).items()
    }
    assert counted == places


def test_another_language():
    german = human_rates("de")
    findings = found(german, "ist eine schimmernde Mischung aus Prunksucht und das.")
    assert phrases(findings) == ["schimmernde Mischung aus Prunksucht"] and not findings.names


def test_the_twin_finds_something():
    assert Counter(map(len, reference.naive_phrases([("zz", ("ba", "bo"))] * 2, (), (), 1))) == {1: 2, 2: 1}
