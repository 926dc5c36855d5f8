"""--set on the command line, held against the same YAML written out: same output, same recipe, same journal."""

import json
import os

import pytest
import tiny
import yaml
from broken_runs import JOURNAL, RECIPE, break_off
from runs import digest

import merge_monster
import monster_mapper

SETS = ["--set", "merge_ratios=[0.3, 0.7]", "--set", "merge_method=slerp", "--set", "joint.steps=3"]
WRITTEN = {"merge_ratios": [0.3, 0.7], "merge_method": "slerp", "joint": {"steps": 3}}


def configured(models, **more):
    base, *candidates = map(os.path.relpath, models)
    tiny.write_config("my.yaml", base, candidates, "out", **more)


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


@pytest.fixture
def whole(place, models):
    """What the same YAML leaves, written out."""
    configured(models, **WRITTEN)
    assert merge_monster.main(["--config", "my.yaml"]) == 0
    return (place / "out").rename(place / "whole")


def test_it_is_as_if_it_stood_in_the_file(place, models, whole):
    configured(models)
    assert merge_monster.main(["--config", "my.yaml", *SETS]) == 0
    ours, theirs = recipe_of(place / "out"), recipe_of(whole)
    assert ours["settings"] == theirs["settings"] and ours["settings"]["merge_ratios"] == [0.3, 0.7]
    assert [d["ratio"] for d in ours["decisions"]] == [d["ratio"] for d in theirs["decisions"]]
    assert digest(place / "out")["model.safetensors"] == digest(whole)["model.safetensors"]
    kept = yaml.safe_load((place / "out/merge_monster.yaml").read_text(encoding="utf-8"))
    assert kept["merge_ratios"] == [0.3, 0.7]


def test_a_run_goes_on_with_the_same_value_however_it_is_given(place, models, whole, capsys):
    configured(models)
    break_off(place, whole, 6)
    assert merge_monster.main(["--config", "my.yaml", "--resume", *SETS[:2]]) == 2
    assert 'merge_method was ["slerp"], is ["lerp"]' in capsys.readouterr().err
    assert merge_monster.main(["--config", "my.yaml", "--resume", *SETS]) == 0
    assert digest(place / "out")["model.safetensors"] == digest(whole)["model.safetensors"]
    ours, theirs = (len((folder / JOURNAL).read_text().splitlines()) for folder in (place / "out", whole))
    assert ours == theirs


def test_a_relative_path_begins_where_those_of_the_file_do(place, models):
    configured(models)
    (place / "candidate").symlink_to(models[1])
    sets = ["--set", "directories.output_directory=deep/other", "--set", "models_to_merge=[candidate]"]
    assert merge_monster.main(["--config", "my.yaml", *sets]) == 0
    assert (place / "deep/other" / RECIPE).is_file() and not (place / "out").exists()


def test_the_mapper_takes_it_too(place, models, capsys):
    configured(models, mapper={"max_depth": 1, "additional_length": 0})
    command = ["--config", "my.yaml", "--json", "found.json"]
    assert monster_mapper.main([*command, "--set", "mapper.top_k=2"]) == 0
    assert json.loads((place / "found.json").read_text(encoding="utf-8"))["mapper"]["top_k"] == 2
    assert monster_mapper.main([*command, "--overwrite", "--set", "mapper.topk=2"]) == 2
    assert "--set mapper.topk: unknown key; did you mean 'top_k'?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["merge_ratios", "merge_ratio=1", "models_to_merge.0=x", "merge_ratios=[1"])
def test_a_wrong_one_ends_the_program_before_any_work(place, models, capsys, text):
    configured(models)
    assert merge_monster.main(["--config", "my.yaml", "--set", text]) == 2
    error = capsys.readouterr().err
    assert f"--set {text.partition('=')[0]}: " in error and "Traceback" not in error
    assert not (place / "out").exists()


def test_a_recipe_has_its_own_settings(capsys):
    with pytest.raises(SystemExit):
        merge_monster.main(["--replay", "x", "--output", "y", "--set", "dtype=auto"])
    assert "--set: a recipe" in capsys.readouterr().err
