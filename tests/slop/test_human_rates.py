"""Human rates: known ones, floors, other languages, languages and packages that are not there."""

import importlib

import pytest

from modules.runtime.errors import ConfigError
from modules.slop.human_rates import human_rates


@pytest.fixture(scope="module")
def english():
    return human_rates()


@pytest.mark.parametrize(
    "phrase, least, most",
    [
        ("the", 30_000, 70_000),
        ("smile", 20, 100),
        ("zqxvish", 0, 0),
        ("of the", 4_000, 8_000),
        ("on the other hand", 15, 60),
        ("mix of", 4, 12),
        ("testament to", 0.3, 2),
        ("took a deep breath", 0.2, 2),
        ("i was", 100, 3_000),
        ("couldn't help", 1, 50),
    ],
)
def test_known_rates(english, phrase, least, most):
    assert least <= english.per_million(phrase.split()) <= most


def test_a_longer_phrase_is_as_frequent_as_its_rarest_pair(english):
    assert english.per_million(["a", "deep", "breath"]) == english.per_million(["deep", "breath"])


def test_what_differs_in_capitals_is_one_pair(english):
    """The table has two lines of it."""
    assert english.pairs["once upon"] == pytest.approx(1e6 * (203_267 + 512_847) / 588_117_981_387)


def test_the_table_is_of_words(english):
    """Its total counts punctuation, too: without, the commonest words are about as common as wordfreq has them."""
    assert sum(english.pair_words.values()) == pytest.approx(1e6)
    for word in ("of", "and", "to", "in"):
        assert english.pair_words[word] == pytest.approx(english.word(word), rel=0.4)


def test_an_unknown_pair_is_as_frequent_as_the_rarest_known_one(english):
    assert english.rarest_pair == pytest.approx(0.170, abs=0.001) and "turquoise parliament" not in english.pairs
    assert english.rarest_pair <= english.per_million(["turquoise", "parliament"]) < 1


def test_a_pair_is_as_much_more_frequent_as_its_words(english):
    """The web of 2006 told few stories."""
    more = english.word("seemed") / english.pair_words["seemed"]
    assert more > 1.5
    assert english.per_million(["seemed", "to"]) == pytest.approx(more * english.pairs["seemed to"])


def test_another_language_has_words_and_guesses_pairs():
    german = human_rates("de")
    house = german.per_million(["haus"])
    assert 100 < house < 1000
    assert german.per_million(["haus", "und"]) == pytest.approx(house / 10)
    assert german.per_million(["das", "haus", "und"]) == german.per_million(["das", "haus"])
    assert "und" in german.grammar.never_last and "haus" not in german.grammar.never_first
    assert not german.grammar.names_by_capitals and human_rates("fr").grammar.names_by_capitals


@pytest.mark.parametrize("language", ["zh", "ja", "ko", "th", "xx", "english", ""])
def test_a_language_without_spaces_or_without_rates(language):
    with pytest.raises(ConfigError, match=rf"discover\.language: '{language}' .* ar, bg, .*, vi$") as caught:
        human_rates(language)
    assert "zh," not in str(caught.value)


@pytest.mark.parametrize("package", ["wordfreq", "wordsegment"])
def test_a_package_that_is_not_installed(monkeypatch, package):
    real = importlib.import_module

    def without(name):
        if name == package:
            raise ModuleNotFoundError(name=name)
        return real(name)

    monkeypatch.setattr("modules.slop.human_rates.import_module", without)
    with pytest.raises(ConfigError, match=f"{package} .*: pip install -r requirements.txt$"):
        human_rates()
