"""Phrases with variants in the YAML file: what is made of them, and what is wrong with them, with the line."""

import pytest
import yaml

from modules.config import Chat, Message, Pair, load_config
from modules.runtime import ConfigError

HEAD = "directories: {model_path1: base, output_directory: out}\nmodels_to_merge: [one]\n"
TEXTS = ["shiver down her spine", "shivers down his spine"]
SHOWN = "shiver down her spine / shivers down his spine"


@pytest.fixture(autouse=True)
def folders(place):
    for name in ("base", "one"):
        (place / name).mkdir()


def loaded(*entries, **more):
    document = {**yaml.safe_load(HEAD), "bad_phrases": list(entries), **more}
    with open("my.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(document, file)
    return load_config("my.yaml")


def test_a_list_of_texts_is_one_phrase():
    turns = [{"role": "user", "content": "Go on."}]
    contexts = ["It sent a ", {"context": "A ", "weight": 5}, {"messages": turns, "continue": "It sent a "}]
    config = loaded({"phrase": TEXTS, "weight": 2, "contexts": contexts}, {"phrase": "x", "contexts": ["y"]})
    chat = Chat((Message("user", "Go on."),), "It sent a ")
    assert config.pairs == (
        Pair("BAD", SHOWN, "It sent a ", 2, variants=tuple(TEXTS)),
        Pair("BAD", SHOWN, "A ", 5, variants=tuple(TEXTS)),
        Pair("BAD", SHOWN, "It sent a ", 2, chat, tuple(TEXTS)),
        Pair("BAD", "x", "y"),
    )
    assert [one.phrase for one in config.pairs[2].each] == TEXTS
    assert {(one.context, one.weight, one.chat, one.variants) for one in config.pairs[2].each} == {
        ("It sent a ", 2, chat, ())
    }
    assert config.pairs[3].each == config.pairs[3:] and "variants" not in config.pairs[3].written()
    assert str(config.pairs[0]) == f"the phrase '{SHOWN}' after 'It sent a '"


def test_one_text_in_a_list_is_that_text():
    contexts = [f"{number} " for number in range(5)]
    one, other = (loaded({"phrase": phrase, "contexts": contexts}, held_out=0.4) for phrase in (["x"], "x"))
    assert (one.pairs, one.held_out_pairs) == (other.pairs, other.held_out_pairs)


def test_contexts_of_a_phrase_with_variants_are_held_out_as_any_others():
    contexts = [*(f"{number} " for number in range(8)), {"context": "own ", "held_out": True}]
    config = loaded({"phrase": TEXTS, "contexts": contexts}, held_out=0.5)
    assert (len(config.pairs), len(config.held_out_pairs)) == (4, 5)
    assert {pair.variants for pair in (*config.pairs, *config.held_out_pairs)} == {tuple(TEXTS)}


WRONG = """\
bad_phrases:
  - phrase: []
    contexts: [x]
  - phrase:
      - spine
      - 3
      - ""
      - [neck]
      -
    contexts: [x]
  - phrase: [spine, neck, spine]
    contexts: []
  - phrase: {any: spine}
    contexts: [x]
phrase_files: [more.yaml]
"""


def test_every_mistake_has_its_line(place):
    (place / "my.yaml").write_text(HEAD + WRONG, encoding="utf-8")
    (place / "more.yaml").write_text("good_phrases:\n- contexts: [x]\n  phrase: [yes, yes]\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("my.yaml")
    of_file, in_quotes = "phrase_files[0] (more.yaml).good_phrases[0].phrase", "true: expected text (put it in quotes)"
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        "bad_phrases[0].phrase: []: expected at least one text (line 4)",
        "bad_phrases[1].phrase[1]: 3: expected text (put it in quotes) (line 8)",
        "bad_phrases[1].phrase[2]: '': expected text (line 9)",
        "bad_phrases[1].phrase[3]: ['neck']: expected text (line 10)",
        "bad_phrases[1].phrase[4]: nothing: expected text (line 11)",
        "bad_phrases[2].phrase: ['spine', 'neck', 'spine']: 'spine' stands twice (line 13)",
        'bad_phrases[2].contexts: missing or empty; list at least one context ("" is the empty one) (line 14)',
        "bad_phrases[3].phrase: {'any': 'spine'}: expected text (line 15)",
        f"{of_file}[0]: {in_quotes} (line 3 of that file)",
        f"{of_file}[1]: {in_quotes} (line 3 of that file)",
    }


def test_each_variant_counts_where_pairs_are_counted(place):
    texts, contexts = [str(number) for number in range(400)], ["a"] * 251
    with pytest.raises(ConfigError, match="100,400 pairs of a phrase and a context; at most 100,000 are taken"):
        loaded({"phrase": texts, "contexts": contexts})
    assert len(loaded({"phrase": texts, "contexts": contexts[:250]}).pairs) == 250
