"""Which pairs are set aside: the share that was asked for, the same ones every time, and never all."""

from itertools import chain

import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modules.config import load_config
from modules.config.held_out import set_aside
from modules.config.phrase_lists import HeldOut, Pair
from modules.runtime.errors import ConfigError


def pairs_of(phrase, count, kind="BAD"):
    return [Pair(kind, phrase, f"context {number} ") for number in range(count)]


@pytest.mark.parametrize(
    "contexts, share, aside",
    [(1, 0.9, 0), (2, 0.2, 0), (2, 0.9, 1), (3, 0.05, 1), (8, 0.25, 2), (40, 0.5, 20), (9, 0, 0)],
)
def test_a_share_of_each_phrases_contexts(contexts, share, aside):
    searched, held_out = set_aside(pairs_of("spine", contexts), share, 512)
    assert (len(searched), len(held_out)) == (contexts - aside, aside)


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost_and_no_phrase_depends_on_another(counts, share, seed):
    phrases = [pairs_of(f"phrase {number}", count) for number, count in enumerate(counts)]
    together = list(chain.from_iterable(phrases))
    searched, held_out = set_aside(together, share, seed)
    assert sorted([*searched, *held_out], key=together.index) == together
    assert {pair.phrase for pair in searched} == {pair.phrase for pair in together}
    alone = [set_aside(pairs, share, seed)[1] for pairs in phrases]
    assert held_out == list(chain.from_iterable(alone))


def test_what_is_marked_is_always_set_aside():
    pairs = [HeldOut("BAD", "spine", "a "), *pairs_of("spine", 2)]
    assert set_aside(pairs, 0, 1) == (pairs[1:], [Pair("BAD", "spine", "a ")])


def write(place, **more):
    path = place / "my.yaml"
    tiny.write_config(path, "base", ["one"], place / "out", pairs_of("spine", 4) + pairs_of("apple", 1, "GOOD"), **more)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "one"):
        (tmp_path / folder).mkdir()
    return tmp_path


def test_a_files_pairs_are_searched_or_held_out(place):
    config = load_config(write(place, held_out=0.5))
    assert len(config.bad_phrases) == 2 and len(config.good_phrases) == 1 and len(config.pairs) == 3
    assert len(config.held_out_pairs) == 2 and not set(config.pairs) & set(config.held_out_pairs)
    assert load_config(write(place, held_out=0.5)) == config
    mapped = load_config(write(place, held_out=0.5), mapping=True)  # the mapper shows all
    assert len(mapped.pairs) == 5 and mapped.held_out_pairs == ()


def test_marked_contexts_and_whole_files(place):
    entry = {"phrase": "spine", "contexts": ["a ", {"context": "b ", "weight": 2, "held_out": True}]}
    (place / "more.yaml").write_text(yaml.safe_dump({"good_phrases": [{"phrase": "x", "contexts": ["y "]}]}))
    config = load_config(write(place, bad_phrases=[entry], held_out_files=["more.yaml"]))
    assert [pair.context for pair in config.bad_phrases] == ["a "]
    assert [(pair.kind, pair.context, pair.weight) for pair in config.held_out_pairs] == [
        ("BAD", "b ", 2.0),
        ("GOOD", "y ", 1.0),
    ]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"held_out": 1}, "held_out: 1: expected a number from 0 and below 1"),
        ({"held_out": "some"}, "held_out: 'some': expected a number from 0 and below 1"),
        ({"held_out_files": ["none.yaml"]}, "held_out_files[0]: none.yaml: no such file"),
        (
            {"bad_phrases": [{"phrase": "a", "contexts": [{"context": "b", "held_out": True}]}], "good_phrases": []},
            "every phrase is held out; there is nothing to search with",
        ),
    ],
)
def test_what_can_not_be(place, more, words):
    with pytest.raises(ConfigError) as error:
        load_config(write(place, **more))
    assert words in "\n".join(error.value.args)
