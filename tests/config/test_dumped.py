"""A configuration as JSON has it, as journals and recipes keep it: what is dumped is loaded again, wherever that is."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml

from modules.config.load import load_config
from modules.config.phrase_lists import Chat
from modules.config.schema import Config

TURNS = [{"role": "user", "content": "Describe an old house."}]
FILE = {
    "directories": {"model_path1": "base", "output_directory": "out", "model_directory": "models"},
    "models_to_merge": ["models/one", "org/name@main"],
    "layers": ["1-3", 8],
    "drift_weight": "auto",
    "template": {"enable_thinking": False, "tools": [{"name": "search", "size": 1.5}]},
    "system": "Be plain.",
    "mapper": {"min_joint": 0.5},
    "bad_phrases": [
        {"phrase": ["spine", "neck"], "weight": 2, "contexts": ["down her ", {"context": "his ", "held_out": True}]},
        {"phrase": "x", "contexts": ["a", "b", "c", "d", {"messages": TURNS, "continue": "It "}]},
    ],
    "held_out": 0.5,
}


@pytest.fixture
def config(place):
    for name in ("base", "models/one"):
        (place / name).mkdir(parents=True)
    (place / "my.yaml").write_text(yaml.safe_dump(FILE), encoding="utf-8")
    return load_config("my.yaml")


def test_what_is_dumped_is_loaded_again_even_where_no_model_is(config, place):
    chats = [replace(pair, context="<user>Describe") if pair.chat else pair for pair in config.bad_phrases]
    rendered = replace(config, bad_phrases=tuple(chats))
    mapped = load_config("my.yaml", mapping=True)
    shutil.rmtree(place / "base")
    for one in (config, rendered, mapped):
        dumped = one.dumped()
        assert json.loads(json.dumps(dumped)) == dumped
        assert Config.loaded(dumped) == one
    assert {"phrase": "x", "context": "a", "kind": "BAD", "weight": 1.0} in mapped.dumped()["bad_phrases"]
    assert [pair.chat for pair in mapped.pairs if pair.chat] and isinstance(mapped.pairs[-1].chat, Chat)


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"random_seed": True},
        {"bad_phrases": [{"phrase": "x", "contexts": ["y"]}]},
        {"held_out_pairs": [{"kind": "BAD", "phrase": "x", "context": 3, "weight": 1.0}]},
        {"layers": "all"},
    ],
    ids=str,
)
def test_what_was_not_dumped_is_refused(config, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Config.loaded({**config.dumped(), **change})
