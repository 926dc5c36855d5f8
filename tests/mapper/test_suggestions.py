"""What is suggested in a phrase's place: completions that say something, as far as they say it."""

import math

import pytest
from completions import TokenizerOnly, scripted

from modules.config.phrase_lists import Pair
from modules.config.schema import Mapper
from modules.mapper.grammar import ADVERBS, english
from modules.mapper.ranking import rank_phrases
from modules.scoring.tokenization import encode_pair

SHIVERS = "It sent shivers down her "


@pytest.fixture(scope="module")
def model():
    return TokenizerOnly()


def suggested(model, phrase, *branches, context=SHIVERS, probability=0.001):
    """The suggestion in place of a phrase among these branches, and its probability."""
    tree = scripted(model, context, *branches)
    encoded = encode_pair(model.tokenizer, context, phrase)
    phrases = [(Pair("BAD", phrase, context), [encoded], math.log(probability))]
    found = rank_phrases(tree, phrases, Mapper(), model.detokenizer)[0].suggestion
    return found and (found.phrase, round(math.exp(found.log_probability), 6))


@pytest.mark.parametrize("word", ["the", "a", "and", "of", "with", "was", "it", "There", "he'd", "not", "just", "Then"])
def test_a_function_word_is_not_suggested(model, word):
    assert suggested(model, "spine", [(word, 0.6), (" arm", 0.2)]) is None
    assert suggested(model, "spine", [(word, 0.6), (" arm", 0.2)], [("back", 0.1), (".", 0.5)]) == ("back", 0.1)


def test_several_function_words_are_not_suggested_either(model):
    assert suggested(model, "long spine", [("it", 0.9), (" was", 0.9), (" arm", 0.5)]) is None


def test_a_suggestion_ends_with_its_last_word_that_says_something(model):
    """There it is most probable, and lowers the total most."""
    branch = [("broken", 0.5), (" by", 0.5), (" the", 0.5), (" arm", 0.5)]
    assert suggested(model, "a living thing", branch) == ("broken", 0.5)
    assert suggested(model, "living and broken thing", branch) == ("broken by the arm", 0.0625)


def test_function_words_before_and_within_a_suggestion_stay(model):
    branch = [("a", 0.8), (" chill", 0.5), (" of", 0.5), (" fear", 0.5)]
    assert suggested(model, "cold", branch) is None
    assert suggested(model, "very cold", branch) == ("a chill", 0.4)
    assert suggested(model, "her very cold spine", branch) == ("a chill of fear", 0.1)


def test_what_says_only_what_the_phrase_says_is_not_suggested(model):
    """Whether it goes on as the phrase begins, or varies nothing but function words."""
    assert suggested(model, "filled up", [("filled", 0.6), (" with", 0.5), (" tears", 0.5)]) is None
    assert suggested(model, "a mix of", [("the", 0.6), (" mix", 0.5), (" of", 0.5)]) is None
    assert suggested(model, "A mix of", [("mix", 0.6), (" and", 0.5), (" match", 0.5)]) == ("mix and match", 0.15)


def test_half_a_word_says_nothing(model):
    """A branch may end within a word, which its continuation shows."""
    begins, goes_on = model.tokenizer.convert_tokens_to_ids(["\u0120s", "hivers"])
    half, rest = (begins, 0.5), (goes_on, 0.9)
    assert suggested(model, "the long spine", [("cold", 0.6), half, ("|", None), rest]) == ("cold", 0.6)
    assert suggested(model, "the long spine", [("cold", 0.6), half, rest]) == ("cold shivers", 0.27)
    assert suggested(model, "long spine", [half, ("|", None), rest]) is None


def test_the_end_of_a_text_is_no_word(model):
    branch = [("back", 0.6), (".", 0.5), (model.tokenizer.eos_token_id, 0.9)]
    assert suggested(model, "the long spine", branch) == ("back", 0.6)


def test_of_all_that_says_something_the_most_probable_is_suggested(model):
    branches = [("a", 0.5), (" chill", 0.3)], [("the", 0.2), (" back", 0.9)], [("cold", 0.1), (" arms", 0.5)]
    assert suggested(model, "long spine", *branches) == ("the back", 0.18)


def test_nothing_less_probable_than_the_phrase_is_suggested(model):
    assert suggested(model, "spine", [("the", 0.6)], [("back", 0.1)], probability=0.2) is None


def test_adverbs_are_no_function_words_elsewhere():
    """What --discover finds may begin with one."""
    assert all(english().begins(word) for word in ADVERBS)
