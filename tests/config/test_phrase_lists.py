"""Phrases, their variants and chats in the YAML file: which pairs are made of them, and which are set aside."""

from itertools import chain
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modules.config.load import load_config
from modules.config.phrase_lists import Chat, Message, Pair, set_aside
from modules.runtime.errors import ConfigError

HEAD = "directories: {model_path1: base, output_directory: out}\nmodels_to_merge: [one]\n"
TURN = {"role": "user", "content": "Describe an old house."}
USER = Message("user", "Describe an old house.")
TEXTS = ["shiver down her spine", "shivers down his spine"]
SHOWN = "shiver down her spine / shivers down his spine"


@pytest.fixture
def folders(place):
    for name in ("base", "one"):
        (place / name).mkdir()
    return place


def loaded(*entries, mapping=False, **more):
    document = {**yaml.safe_load(HEAD), "bad_phrases": list(entries), **more}
    Path("my.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_config("my.yaml", mapping=mapping)


def test_a_list_of_texts_is_one_phrase(folders):
    contexts = ["It sent a ", {"context": "A ", "weight": 5}, {"messages": [TURN], "continue": "It sent a "}]
    entry = {"phrase": TEXTS, "weight": 2, "contexts": contexts}
    config = loaded(entry, {"phrase": "x", "contexts": ["y"]}, {"phrase": ["z"], "contexts": ["y"]})
    chat = Chat((USER,), "It sent a ")
    assert config.pairs == (
        Pair("BAD", SHOWN, "It sent a ", 2, variants=tuple(TEXTS)),
        Pair("BAD", SHOWN, "A ", 5, variants=tuple(TEXTS)),
        Pair("BAD", SHOWN, "It sent a ", 2, chat, tuple(TEXTS)),
        Pair("BAD", "x", "y"),
        Pair("BAD", "z", "y"),
    )
    assert config.pairs[2].each == tuple(Pair("BAD", text, "It sent a ", 2, chat) for text in TEXTS)
    assert config.pairs[3].each == config.pairs[3:4] and "variants" not in config.pairs[3].written()
    assert str(config.pairs[0]) == f"the phrase '{SHOWN}' after 'It sent a '"


def test_a_chat_is_a_context_beside_others(folders):
    contexts = [
        "plain ",
        {"messages": [{"role": "system", "content": ""}, TURN], "weight": 3},
        {"messages": [TURN], "continue": None, "held_out": True},
        {"context": "also plain", "weight": None},
    ]
    config = loaded({"phrase": "x", "weight": 2, "contexts": contexts})
    assert config.pairs == (
        Pair("BAD", "x", "plain ", 2),
        Pair("BAD", "x", "", 3, Chat((Message("system", ""), USER))),
        Pair("BAD", "x", "also plain", 2),
    )
    assert config.held_out_pairs == (Pair("BAD", "x", "", 2, Chat((USER,))),)


def test_a_system_turn_is_for_all_chats_of_its_list_without_one(folders):
    own = {"messages": [{"role": "system", "content": "Own."}, TURN]}
    entry = {"phrase": "x", "contexts": ["plain", {"messages": [TURN]}, own]}
    for name, system in (("more.yaml", {"system": "More."}), ("none.yaml", {}), ("aside.yaml", {"system": "Aside."})):
        Path(name).write_text(yaml.safe_dump({"bad_phrases": [entry], **system}), encoding="utf-8")
    files = {"phrase_files": ["more.yaml", "none.yaml"], "held_out_files": ["aside.yaml"]}
    config = loaded(entry, system="Main.", **files)

    def of(pairs):
        return [pair.chat and [turn.content for turn in pair.chat.messages if turn.role == "system"] for pair in pairs]

    assert of(config.pairs) == [None, ["Main."], ["Own."], None, ["More."], ["Own."], None, [], ["Own."]]
    assert of(config.held_out_pairs) == [None, ["Aside."], ["Own."]]


WRONG = """\
bad_phrases:
  - phrase: [spine, 3, "", [neck]]
    contexts: []
  - phrase: [spine, neck, spine]
    contexts: [x]
  - phrase: {any: spine}
    contexts: [x]
  - phrase: x
    contexts:
      - messages: []
      - messages: [{role: robot, content: hi}]
      - messages:
          - {role: user, contnt: hi}
      - continue: The house
      - messages: user
      - messages: [hi]
        continue: 3
      - {mesages: [{role: user, content: hi}]}
      - {context: a, messages: [{role: user, content: hi}]}
      - messages: [{role: user, content: "  "}]
        held_out: 1
        wait: 2
      - a text
      - 5
      -
      - {context: a, continue: b}
"""


def test_every_mistake_has_its_line_and_key(folders):
    Path("my.yaml").write_text(HEAD + WRONG, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("my.yaml")
    lines = [line.strip().removeprefix("bad_phrases") for line in str(caught.value).splitlines()[1:]]
    place = "[3].contexts"
    expected = [
        ("[0].phrase[1]: 3: expected text (put it in quotes)", 4),
        ("[0].phrase[2]: '': expected text", 4),
        ("[0].phrase[3]: ['neck']: expected text", 4),
        ("[0].contexts: []: expected at least one", 5),
        ("[1].phrase: ['spine', 'neck', 'spine']: 'spine' is listed twice", 6),
        ("[2].phrase[0]: {'any': 'spine'}: expected text", 8),
        (f"{place}[0].messages: []: expected at least one", 12),
        (f"{place}[1].messages[0].role: 'robot': Input should be 'system', 'user' or 'assistant'", 13),
        (f"{place}[2].messages[0].content: missing", 15),
        (f"{place}[2].messages[0].contnt: unknown key; did you mean 'content'?", 15),
        (f"{place}[3]: {{'continue': 'The house'}}: needs either context", 16),
        (f"{place}[4].messages: 'user': expected a list", 17),
        (f"{place}[5].messages[0]: 'hi': expected a mapping of keys to values", 18),
        (f"{place}[5].continue: 3: expected text (put it in quotes)", 19),
        (f"{place}[6].mesages: unknown key; did you mean 'messages'?", 20),
        (f"{place}[7]: {{'context': 'a', 'messages': [", 21),
        (f"{place}[8].messages[0].content: '  ': expected text", 22),
        (f"{place}[8].held_out: 1: expected true or false", 23),
        (f"{place}[8].wait: unknown key; did you mean 'weight'?", 24),
        (f"{place}[10].context: 5: expected text (put it in quotes)", 26),
        (f"{place}[11]: {{'context': None}}: needs either context", 27),
        (f"{place}[12]: {{'context': 'a', 'continue': 'b'}}: continue needs messages", 28),
    ]
    assert len(lines) == len(expected)
    for line, (begin, number) in zip(lines, expected, strict=True):
        assert line.startswith(begin) and line.endswith(f" (line {number})")


# ---------------------------------------------------------------------------------------------------------------------
# Set aside: scored and never searched
# ---------------------------------------------------------------------------------------------------------------------


def pairs_of(phrase, count, kind="BAD"):
    return [(Pair(kind, phrase, f"context {number} "), False) for number in range(count)]


@pytest.mark.parametrize(
    "contexts, share, aside",
    [(1, 0.9, 0), (2, 0.2, 0), (2, 0.9, 1), (3, 0.05, 1), (8, 0.25, 2), (40, 0.5, 20), (9, 0, 0)],
)
def test_a_share_of_each_phrases_contexts(contexts, share, aside):
    searched, held_out = set_aside(pairs_of("spine", contexts), share, 512)
    assert (len(searched), len(held_out)) == (contexts - aside, aside)


def test_the_same_contexts_are_drawn_ever_since():
    searched, held_out = set_aside(pairs_of("spine", 8) + pairs_of("neck", 4, "GOOD"), 0.25, 512)
    drawn = [(pair.phrase, pair.context) for pair in held_out]
    assert drawn == [("spine", "context 1 "), ("spine", "context 5 "), ("neck", "context 0 ")]
    assert len(searched) == 9


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    percent=st.integers(0, 99),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost_and_no_phrase_depends_on_another(counts, percent, seed):
    share = percent / 100
    phrases = [pairs_of(f"phrase {number}", count) for number, count in enumerate(counts)]
    together = list(chain.from_iterable(phrases))
    searched, held_out = set_aside(together, share, seed)
    order = [pair for pair, _ in together]
    assert sorted([*searched, *held_out], key=order.index) == order
    assert {pair.phrase for pair in searched} == {pair.phrase for pair in order}
    alone = [set_aside(pairs, share, seed)[1] for pairs in phrases]
    assert held_out == list(chain.from_iterable(alone))


def test_a_files_pairs_are_searched_or_held_out(folders):
    marked = {"context": "marked ", "held_out": True}
    chats = [{"messages": [TURN], "continue": f"{number} "} for number in range(4)]
    entry = {"phrase": TEXTS, "contexts": [*(f"{number} " for number in range(4)), marked, *chats]}
    Path("more.yaml").write_text(yaml.safe_dump({"good_phrases": [{"phrase": "x", "contexts": ["y "]}]}))
    config = loaded(entry, held_out=0.5, held_out_files=["more.yaml"])
    assert len(config.pairs) == 4 and len(config.held_out_pairs) == 6
    assert {pair.variants for pair in config.pairs} == {tuple(TEXTS)}
    assert config.held_out_pairs[-1] == Pair("GOOD", "x", "y ")
    assert {"marked ", *(f"{number} " for number in range(4))} == {
        pair.context for pair in (*config.pairs, *config.held_out_pairs[:-1])
    }
    mapped = loaded(entry, held_out=0.5, mapping=True)  # the mapper shows all
    assert len(mapped.pairs) == 9 and mapped.held_out_pairs == ()
    with pytest.raises(ConfigError, match="all pairs are held out"):
        loaded({"phrase": "a", "contexts": [marked]})
