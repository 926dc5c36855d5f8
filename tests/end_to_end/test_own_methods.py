"""A method and a strategy are added by a name and a function."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from project import environment
from safetensors.torch import load_file

import merge_monster
from modules.config.choices import STRATEGIES
from modules.config.load import load_config
from modules.merging.methods import METHODS, column_method, merge_method
from modules.search import strategies
from modules.search.strategies import strategy, total

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_names():
    """What a test registers is gone again after it."""
    known = METHODS, STRATEGIES, strategies._RANKS
    before = [dict(names) for names in known]
    yield
    for names, earlier in zip(known, before, strict=True):
        names.clear()
        names.update(earlier)


def test_a_method_and_a_strategy_of_ones_own(place, capsys, own_names):
    """They are configured by name, checked, merged with, recorded with their share, and replayed."""
    STRATEGIES["always"] = "the trial with the highest total, come what may"

    @merge_method("average", "half of each, whatever is configured", ratios=(1.0,), recorded_weight=0.5)
    def average(base, other, ratio, out):
        out.copy_((base.float() + other.float()) / 2)

    @column_method("odd", "every other column is the candidate's")
    def odd_weights(width, ratio):
        return (torch.arange(width) % 2).float()

    @strategy("always")
    def always(current, trial, limits):
        return (-total(trial.scores),)

    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(place / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    one = tiny.make_candidate(place / "one", base)
    settings = {"merge_ratios": [0.3], "merge_headers": False, "strategy": "always"}
    path = tiny.write_config(place / "my.yaml", base, [one], "out", merge_method=["average", "odd"], **settings)
    assert merge_monster.main(["--config", str(path)]) == 0
    assert "'one'], [0.3, 'one']]" in capsys.readouterr().out

    ours, theirs, found = (load_file(place / folder / "model.safetensors") for folder in ("base", "one", "out"))
    for name in (name for name in ours if name.startswith("model.layers.") and ours[name].dim() == 2):
        mixed = (ours[name] + theirs[name]) / 2
        mixed[:, 1::2] = theirs[name][:, 1::2]
        torch.testing.assert_close(found[name], mixed)

    assert merge_monster.main(["--replay", "out/merge_monster_recipe.json", "--output", "again"]) == 0
    again = load_file(place / "again/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


def test_a_misspelt_name_is_told_all_names(place, capsys, own_names):
    merge_method("average", "half of each")(lambda base, other, ratio, out: None)
    path = tiny.write_config(place / "my.yaml", place, [place], "out", merge_method="averag")
    assert merge_monster.main(["--config", str(path)]) == 2
    assert "expected one of lerp, slerp, slice, cyclic, gradient, ties, dare, average" in capsys.readouterr().err


def test_every_name_has_its_function_and_none_has_another():
    assert STRATEGIES.keys() == strategies._RANKS.keys()
    with pytest.raises(KeyError):
        strategy("nobody can name this")


def test_a_configuration_is_read_whoever_imported_what(place):
    """Here by an interpreter that imports nothing else."""
    path = tiny.write_config(place / "my.yaml", place, [place], "out", merge_method=["slice", "lerp"])
    code = (
        "import sys; from modules.config.load import load_config; "
        "print(load_config(sys.argv[1]).merge_method, *sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout.startswith("('slice', 'lerp') ")
    assert not {"torch", "modules.search"}.intersection(result.stdout.split())


def test_the_table_of_keys_names_each():
    table = (ROOT / "docs/use.md").read_text(encoding="utf-8")
    for key, names in (("merge_method", METHODS), ("strategy", STRATEGIES)):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{key}` |")]
        assert all(name in row for name in names), key


def test_methods_with_parameters_are_merged_with_recorded_and_replayed(place):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(place / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    candidate = tiny.make_candidate(place / "candidate", base)
    methods = [{"name": "ties", "density": 0.3}, "dare"]
    settings = {"merge_ratios": [0.5], "merge_headers": False, "random_seed": 9}
    path = tiny.write_config(place / "my.yaml", base, [candidate], "out", merge_method=methods, **settings)
    assert load_config(path).merge_method == ("ties(density=0.3)", "dare(density=0.5, seed=9)")
    assert merge_monster.main(["--config", str(path)]) == 0
    recipe = json.loads((place / "out/merge_monster_recipe.json").read_text(encoding="utf-8"))
    assert {line["method"] for line in recipe["decisions"]} == {"ties(density=0.3)", "dare(density=0.5, seed=9)"}
    assert any(line["ratio"] for line in recipe["decisions"])
    assert merge_monster.main(["--replay", "out/merge_monster_recipe.json", "--output", "again"]) == 0
    outputs = [load_file(place / folder / "model.safetensors") for folder in ("out", "again")]
    assert all(torch.equal(tensor, outputs[1][name]) for name, tensor in outputs[0].items())
