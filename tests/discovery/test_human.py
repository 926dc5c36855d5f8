"""Human rates: known ones, floors, other languages, languages and packages that are not there."""

import builtins
import importlib

import pytest

from modules.discovery import human_rates
from modules.runtime import ConfigError


@pytest.fixture(scope="module")
def english():
    return human_rates()


@pytest.mark.parametrize(
    "phrase, least, most",
    [
        ("the", 30_000, 70_000),
        ("smile", 20, 100),
        ("of the", 4_000, 8_000),
        ("on the other hand", 15, 60),
        ("mix of", 4, 12),
        ("testament to", 0.3, 2),
        ("fabric of", 0.3, 2),
        ("took a deep breath", 0.2, 2),
        ("i was", 100, 3_000),
        ("couldn't help", 1, 50),
    ],
)
def test_known_rates(english, phrase, least, most):
    assert least < english.per_million(phrase.split()) < most


def test_a_longer_phrase_is_as_frequent_as_its_rarest_pair(english):
    assert english.per_million(["a", "deep", "breath"]) == english.per_million(["deep", "breath"])


def test_what_differs_in_capitals_is_one_pair(english):
    """The table has two lines of it."""
    assert english.table.rate("once", "upon") == pytest.approx(1e6 * (203_267 + 512_847) / 588_117_981_387)


def test_the_table_is_of_words(english):
    """Its total counts punctuation, too: without, the commonest words are about as common as wordfreq has them."""
    assert sum(english.table.words.values()) == pytest.approx(1e6)
    for word in ("of", "and", "to", "in"):
        assert english.table.words[word] == pytest.approx(english.word(word), rel=0.4)


def test_an_unknown_pair_is_as_frequent_as_the_rarest_known_one(english):
    assert english.table.rate("turquoise", "parliament") == english.table.rarest == pytest.approx(0.170, abs=0.001)
    assert english.table.rarest <= english.per_million(["turquoise", "parliament"]) < 1


def test_a_pair_is_as_much_more_frequent_as_its_words(english):
    """The web of 2006 told few stories."""
    more = english.word("seemed") / english.table.words["seemed"]
    assert more > 1.5
    assert english.per_million(["seemed", "to"]) == pytest.approx(more * english.table.rate("seemed", "to"))


def test_an_unknown_word_is_never_written(english):
    assert english.per_million(["zqxvish"]) == 0


def test_another_language_has_words_and_guesses_pairs():
    german = human_rates("de")
    house = german.per_million(["haus"])
    assert 100 < house < 1000
    assert german.per_million(["haus", "und"]) == pytest.approx(house / 10)
    assert german.per_million(["das", "haus", "und"]) == german.per_million(["das", "haus"])
    assert "und" in german.grammar.never_last and "haus" not in german.grammar.never_first
    assert not german.grammar.names_by_capitals and human_rates("fr").grammar.names_by_capitals


@pytest.mark.parametrize("language", ["zh", "ja", "th", "ko"])
def test_a_language_without_words_apart(language):
    with pytest.raises(ConfigError, match=f"'{language}' is written without spaces"):
        human_rates(language)


@pytest.mark.parametrize("language", ["af", "english", "xx", ""])
def test_a_language_that_wordfreq_lacks(language):
    with pytest.raises(ConfigError, match=r"does not have the language.*; it has ar, bg, .*, vi$") as caught:
        human_rates(language)
    assert "zh" not in str(caught.value)


@pytest.mark.parametrize("package", ["wordfreq", "wordsegment"])
def test_a_package_that_is_not_installed(monkeypatch, package):
    real = importlib.import_module

    def without(name):
        if name == package:
            raise ModuleNotFoundError(name=name)
        return real(name)

    monkeypatch.setattr("modules.discovery.human.import_module", without)
    with pytest.raises(ConfigError, match=f"{package} is not installed.*: pip install wordfreq wordsegment$"):
        human_rates()


def test_packages_are_imported_when_they_are_used(monkeypatch):
    real, imported = builtins.__import__, []

    def heard(name, *rest):
        imported.append(name)
        return real(name, *rest)

    monkeypatch.setattr("builtins.__import__", heard)
    importlib.reload(importlib.import_module("modules.discovery.human"))
    assert not {"wordfreq", "wordsegment"} & set(imported)
