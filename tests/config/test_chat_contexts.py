"""Chats as contexts in the YAML file: what is made of them, and what is wrong with them, each mistake with its line."""

import pytest
import yaml

from modules.config import Chat, Message, Pair, load_config
from modules.runtime import ConfigError

TURN = {"role": "user", "content": "Describe an old house."}
USER = Message("user", "Describe an old house.")
HEAD = "directories: {model_path1: base, output_directory: out}\nmodels_to_merge: [one]\n"


@pytest.fixture(autouse=True)
def folders(place):
    for name in ("base", "one"):
        (place / name).mkdir()


def loaded(contexts, **more):
    document = {**yaml.safe_load(HEAD), "bad_phrases": [{"phrase": "x", "weight": 2, "contexts": contexts}], **more}
    with open("my.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(document, file)
    return load_config("my.yaml")


def test_a_chat_is_a_context_beside_others():
    contexts = [
        "plain ",
        {"messages": [TURN], "continue": "The house "},
        {"messages": [{"role": "system", "content": ""}, TURN], "weight": 3},
        {"messages": [TURN], "continue": None, "held_out": True},
        {"context": "also plain"},
    ]
    config = loaded(contexts)
    system = Message("system", "")
    assert config.pairs == (
        Pair("BAD", "x", "plain ", 2),
        Pair("BAD", "x", "The house ", 2, Chat((USER,), "The house ")),
        Pair("BAD", "x", "", 3, Chat((system, USER))),
        Pair("BAD", "x", "also plain", 2),
    )
    assert [pair.chat for pair in config.held_out_pairs] == [Chat((USER,))]


def test_a_share_is_set_aside_of_chats_and_texts_alike():
    contexts = [{"messages": [TURN], "continue": f"{number} "} if number % 2 else f"{number} " for number in range(8)]
    config = loaded(contexts, held_out=0.5)
    plain = loaded([f"{number} " for number in range(8)], held_out=0.5)
    assert [pair.context for pair in config.held_out_pairs] == [pair.context for pair in plain.held_out_pairs]
    assert len({pair.chat is None for pair in config.held_out_pairs}) == 2


def test_a_system_turn_is_for_all_chats_of_its_list_without_one(place):
    own = {"messages": [{"role": "system", "content": "Own."}, TURN]}
    entry = [{"phrase": "x", "contexts": ["plain", {"messages": [TURN]}, own]}]
    for name, system in (("more.yaml", {"system": "More."}), ("none.yaml", {}), ("aside.yaml", {"system": "Aside."})):
        (place / name).write_text(yaml.safe_dump({"bad_phrases": entry, **system}), encoding="utf-8")
    files = {"phrase_files": ["more.yaml", "none.yaml"], "held_out_files": ["aside.yaml"]}
    config = loaded(entry[0]["contexts"], system="Main.", **files)

    def of(pairs):
        return [pair.chat and [turn.content for turn in pair.chat.messages if turn.role == "system"] for pair in pairs]

    assert of(config.pairs) == [None, ["Main."], ["Own."], None, ["More."], ["Own."], None, [], ["Own."]]
    assert of(config.held_out_pairs) == [None, ["Aside."], ["Own."]]


def test_settings_of_the_template():
    assert loaded(["x"]).template is None
    given = {"enable_thinking": False, "tools": [{"name": "search", "size": 1.5}], "who": "Ann"}
    assert loaded(["x"], template=given).template == given


WRONG = """\
system: 3
template: {enable_thinking: false, tokenize: true}
bad_phrases:
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
"""


def test_every_mistake_has_its_line_and_key(place):
    (place / "my.yaml").write_text(HEAD + WRONG, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("my.yaml")
    place = "bad_phrases[0].contexts"
    turn = "[0]: 'hi': expected a mapping of keys to values"
    settings = "{'enable_thinking': False, 'tokenize': True}"
    both = (
        "{'context': 'a', 'messages': [{'content': 'hi', 'role': '...: "
        "context is for a text, messages and continue are for a chat; it can't be both"
    )
    expected = {
        "system: 3: expected text (put it in quotes) (line 3)",
        f"template: {settings}: tokenize is none of a chat template's settings (line 4)",
        f"{place}[0].messages: []: expected at least one turn, such as {{role: user, content: ...}} (line 8)",
        f"{place}[1].messages[0].role: 'robot': expected system, user or assistant (line 9)",
        f"{place}[2].messages[0].contnt: unknown key; did you mean 'content'? (line 11)",
        f"{place}[2].messages[0].content: missing (line 11)",
        f"{place}[3].messages: missing (line 12)",
        f"{place}[4].messages: 'user': expected a list (line 13)",
        f"{place}[5].messages{turn} (line 14)",
        f"{place}[5].continue: 3: expected text (put it in quotes) (line 15)",
        f"{place}[6].mesages: unknown key; did you mean 'messages'? (line 16)",
        f"{place}[6].context: missing (line 16)",
        f"{place}[7]: {both} (line 17)",
        f"{place}[8].messages[0].content: '  ': expected text (line 18)",
        f"{place}[8].held_out: 1: expected true or false (line 19)",
        f"{place}[8].wait: unknown key; did you mean 'weight'? (line 20)",
    }
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == expected


@pytest.mark.parametrize(
    "template, words",
    [
        ("[a]", "['a']: expected a mapping of names to values"),
        ("{1: a}", "{1: 'a'}: expected a mapping of names to values"),
        ("{today: 2026-11-26}", "expected text, numbers, true and false, and lists and mappings of them"),
        ("{x: .nan}", "expected text, numbers, true and false, and lists and mappings of them"),
        ("&a {x: *a}", "expected text, numbers, true and false, and lists and mappings of them"),
        ("{add_generation_prompt: false}", "add_generation_prompt is none of a chat template's settings"),
    ],
)
def test_settings_that_no_template_can_have(place, template, words):
    text = f"{HEAD}template: {template}\nbad_phrases: [{{phrase: x, contexts: [y]}}]\n"
    (place / "my.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("my.yaml")
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith("  template: ") and line.endswith(f"{words} (line 3)")
