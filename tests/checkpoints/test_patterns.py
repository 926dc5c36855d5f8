"""Patterns of strangers' adapters: what PEFT makes of them, or an end within seconds."""

import time

import pytest
from adapters import make_bench, write_adapter
from peft.utils.other import get_pattern_key

from modules.checkpoints import patterns
from modules.checkpoints.lora import open_adapter
from modules.checkpoints.patterns import first_matches
from modules.runtime.errors import ConfigError

NAMES = [
    *("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj"),
    *("lm_head", "model.embed_tokens"),
]
LISTS = [
    ["q_proj"],
    ["proj"],
    ["up_proj", "layers.1.*", "layers.0.self_attn.q_proj"],
    [r"layers\.[01]\..*(q|k)_proj", "^lm_head", r".*"],
    ["^model.layers.0.self_attn.q_proj$", r"model\.layers\.(?!0)\d+\.\w+\.\w+"],
    ["a)|(lm_head"],  # no pattern by itself, but one where PEFT puts it
    [""],
    [],
]


@pytest.mark.parametrize("some", LISTS, ids=map(str, LISTS))
def test_a_pattern_means_what_it_means_to_peft(some):
    expected = [get_pattern_key(some, name) for name in NAMES]
    found = first_matches(some, NAMES)
    assert [name if key is None else key for name, key in zip(NAMES, found, strict=True)] == expected


@pytest.mark.parametrize("pattern", [r"([\w.]+)+!", r"(.*)*\1!", r"((((.{0,100}){0,100}){0,100}){0,100})!"])
def test_a_pattern_that_backtracks_is_given_up_and_named(tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    make_bench(tmp_path)
    write_adapter(tmp_path / "hostile", tmp_path / "base", alpha_pattern={pattern: 3})
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*alpha_pattern"):
        open_adapter(tmp_path / "hostile", "hostile")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(?i)up_proj", "*"])
def test_what_is_no_pattern_where_peft_puts_it_is_told(pattern):
    with pytest.raises(ValueError, match="rror"):
        first_matches([pattern], NAMES)


def test_a_pattern_that_takes_all_memory_ends(monkeypatch):
    monkeypatch.setattr(patterns, "_PROGRAM", "import sys; sys.stdin.read(); sys.exit('MemoryError: ')")
    with pytest.raises(TimeoutError, match="memory"):
        first_matches(["a"], NAMES)


def test_an_alpha_of_its_own_counts_for_the_modules_that_it_names(tmp_path):
    make_bench(tmp_path)
    scales = []
    for number, own in enumerate(({}, {"up_proj": 10}, {r"layers\.[1-9]": 10}, {r"layers\.0\..*": 6, "up_proj": 10})):
        write_adapter(tmp_path / str(number), tmp_path / "base", alpha_pattern=own)
        scales += [product.scale for product in open_adapter(tmp_path / str(number), "one").products.values()]
    assert scales == [2, 5, 2, 3]
