"""An output as others get it: no path of this machine in any file, and a recipe that still finds its sources."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from broken_runs import JOURNAL, RECIPE, break_off
from huggingface_hub import ModelCard, ModelCardData
from project import ROOT, environment
from runs import digest, log_of, make_models
from safetensors.torch import load_file, save_file

import merge_monster

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. "


def names_a_path(output, *folders):
    """The files of an output in which one of these folders is named, however it is spelt."""
    spelt = {os.fsencode(path) for folder in folders for path in (str(folder), os.path.realpath(folder))}
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {JOURNAL, RECIPE, "merge_monster.yaml", "README.md", "model.safetensors"} <= {path.name for path in files}
    return [path.name for path in files if any(one in path.read_bytes() for one in spelt)]


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def whole_paths(place, models, **more):
    """A configuration in which every path begins at the root."""
    base, *candidates = models
    (place / "plain.txt").write_text(TEXT * 12, encoding="utf-8")
    for number, name in enumerate(("more.yaml", "held.yaml"), start=1):
        lists = {"bad_phrases": tiny.phrase_entries(tiny.PAIRS[number : number + 1], "BAD")}
        (place / name).write_text(yaml.safe_dump(lists), encoding="utf-8")
    more = {
        "neutral_texts": [str(place / "plain.txt")],
        "phrase_files": [str(place / "more.yaml")],
        "held_out_files": [str(place / "held.yaml")],
        "baselines": True,
        "merge_ratios": [0.5],
        **more,
    }
    path = tiny.write_config(place / "my.yaml", base, candidates, place / "out", **more)
    return path


@pytest.fixture
def own(place):
    """Models in the folder of the test, the second with a tensor that is no number."""
    models = make_models(place / "models")
    tensors = load_file(models[2] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, models[2] / "model.safetensors", metadata={"format": "pt"})
    return models


@pytest.mark.parametrize("search", ["greedy", "joint"])
def test_no_file_of_an_output_names_a_path(place, own, search):
    models = own if search == "greedy" else own[:2]
    path = whole_paths(place, models, search=search, joint={"steps": 2})
    path.write_text(f"# begun in {place}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    config = str(path)
    assert merge_monster.main(["--config", config, "--set", f"random_seed=1 # {place}"]) == 0
    assert names_a_path(place / "out", place, os.path.expanduser("~")) == []
    recipe, kept = recipe_of(place / "out"), (place / "out/merge_monster.yaml").read_text(encoding="utf-8")
    names = [model.name for model in models]
    settings, document = recipe["settings"], yaml.safe_load(kept)
    assert [source["where"] for source in recipe["sources"]] == names
    assert settings["directories"]["model_path1"] == "base" and settings["models_to_merge"] == names[1:]
    assert [settings[key] for key in ("phrase_files", "held_out_files")] == [["more.yaml"], ["held.yaml"]]
    assert settings["neutral_texts"] == ["plain.txt"] and document["models_to_merge"] == names[1:]
    assert document["directories"] == {"model_path1": "base", "output_directory": "out"}
    assert merge_monster.main(["--config", config, "--resume"]) == 2  # another seed
    log = log_of(place)
    assert search == "joint" or any(line["warning"] for line in recipe["decisions"])
    assert merge_monster.main(["--config", config, "--set", "random_seed=1", "--resume"]) == 0  # is finished
    logs = "\n".join(path.read_text(encoding="utf-8") for path in (place / "logs").iterdir())
    assert all(f"{model.name} is {model}\n" in logs for model in models), log


@pytest.mark.parametrize("search", ["greedy", "joint"])
def test_a_run_of_whole_paths_goes_on(place, own, search, monkeypatch):
    config = str(whole_paths(place, own[:2], search=search, joint={"steps": 2}))
    assert merge_monster.main(["--config", config]) == 0
    whole = (place / "out").rename(place / "whole")
    kinds = [json.loads(line)["kind"] for line in (whole / JOURNAL).read_text(encoding="utf-8").splitlines()]
    break_off(place, whole, max(n for n, kind in enumerate(kinds, start=1) if kind in ("decision", "step")))
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")  # the paths are whole: they lead there from anywhere
    assert merge_monster.main(["--config", config, "--resume"]) == 0
    assert names_a_path(place / "out", place) == []
    assert digest(place / "out")["model.safetensors"] == digest(whole)["model.safetensors"]


@pytest.mark.slow
def test_no_file_names_the_home_folder(place, own):
    """Started outside of it, in a process of its own, with pictures."""
    home, work = place / "home/jane", place / "work"
    shutil.copytree(place / "models", home / "models")
    work.mkdir()
    config = tiny.write_config(home / "my.yaml", home / "models/base", [home / "models/one"], work / "out")
    command = [sys.executable, str(ROOT / "merge_monster.py"), "--config", str(config)]
    result = subprocess.run(
        command, cwd=work, env=environment(HOME=str(home)), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert names_a_path(work / "out", place, "/home/jane") == [] and "jane" not in (work / "out" / RECIPE).read_text()
    replay = [*command[:2], "--replay", "out", "--source", str(home / "models"), "--output", "again"]
    result = subprocess.run(
        replay, cwd=work, env=environment(HOME=str(home)), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert digest(work / "again")["model.safetensors"] == digest(work / "out")["model.safetensors"]
    assert [path.name for path in (work / "again").glob("*.png")] and names_a_path_of_a_replay(
        work / "again", place
    ) == []


def names_a_path_of_a_replay(output, *folders):
    """The same of what was built again, which has no journal."""
    (output / JOURNAL).touch()
    return names_a_path(output, *folders)


@pytest.fixture
def whole(place, models):
    base, *candidates = models
    shutil.copytree(base.parent, place / "models")
    names = [f"models/{folder.name}" for folder in (base, *candidates)]
    tiny.write_config("my.yaml", names[0], names[1:], "runs/out", merge_ratios=[0.5])
    assert merge_monster.main(["--config", "my.yaml"]) == 0
    return place / "runs/out"


def built_again(whole, *arguments):
    assert merge_monster.main(["--replay", *map(str, arguments)]) == 0
    assert digest(whole.parent / "deep/again")["model.safetensors"] == digest(whole)["model.safetensors"]
    shutil.rmtree(whole.parent / "deep")


def test_sources_are_looked_for_in_folders_in_and_beside_the_output_and_here(place, whole, capsys, monkeypatch):
    again = whole.parent / "deep/again"
    built_again(whole, whole, "--output", again)  # in a folder beside the one that the program is started in
    recipe = json.loads((whole / RECIPE).read_text(encoding="utf-8"))
    recipe["sources"][0]["where"] = "nowhere"
    (whole.parent / "changed.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert merge_monster.main(["--replay", str(whole.parent / "changed.json"), "--output", str(again)]) == 2
    error = capsys.readouterr().err
    assert f"not found in or near {whole.parent}, {place}: " in error and ": base; " in error
    assert "--source NAME=PATH" in error
    built_again(whole, whole, "--source", "models", "--output", again)
    built_again(whole, whole, "--source", place / "models", "--source", "one=models/one", "--output", again)
    monkeypatch.chdir(place / "models")
    built_again(whole, whole / RECIPE, "--output", again)
    monkeypatch.chdir(place / "logs")
    (place / "models/base").rename(place / "runs/base")
    for name in ("one", "two"):
        (place / "models" / name).rename(whole / name)
    built_again(whole, whole, "--output", again)


# ---------------------------------------------------------------------------------------------------------------------
# Uploaded as it is
# ---------------------------------------------------------------------------------------------------------------------

UPLOAD = "hf upload ORG/NAME {} --private"


def last_lines(place):
    return [line for line in log_of(place).splitlines() if line][-2:]


def test_the_last_lines_name_the_command(place, whole):
    for output in ("runs/out", "a folder"):
        if output != "runs/out":
            assert merge_monster.main(["--replay", str(whole), "--source=models", "--output", output]) == 0
        upload, done = last_lines(place)
        assert upload == f"To publish it: {UPLOAD.format(shlex.quote(output))}" and " - Done. The log is " in done
    for arguments in (["--dry-run"], ["--resume"]):
        merge_monster.main(["--config", "my.yaml", *arguments])
        assert "hf upload" not in log_of(place)


def test_the_page_names_the_same_command():
    page = (ROOT / "docs/output.md").read_text(encoding="utf-8")
    assert f"\n    {UPLOAD.format('my-merge')}\n" in page


def test_the_command_is_one_of_the_hubs_client():
    client = Path(sys.executable).parent / "hf"
    result = subprocess.run([client, "upload", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"hf upload .*REPO_ID \[LOCAL_PATH\]", result.stdout) and "--private" in result.stdout


def test_nothing_is_in_the_folder_that_is_not_to_go_up(place):
    """What a base's folder may hold beside a model stays there."""
    models = make_models(place / "models")
    for name in ("notes.txt", ".env", "README.md", "optimizer.pt", "trainer_state.json", "merge_monster_recipe.json"):
        (models[0] / name).write_text("{}", encoding="utf-8")
    (models[0] / "LICENSE").write_text("You may.", encoding="utf-8")
    config = tiny.write_config(place / "my.yaml", models[0], models[1:], place / "out", merge_ratios=[0.5])
    assert merge_monster.main(["--config", str(config)]) == 0
    model = {"config.json", "generation_config.json", "model.safetensors", "LICENSE"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    own = {"README.md", "merge_monster.yaml", RECIPE, JOURNAL, "merge_map.png", "phrase_chart.png"}
    found = sorted(path.relative_to(place / "out").as_posix() for path in (place / "out").rglob("*"))
    assert found == sorted(model | tokenizer | own)


def test_the_hubs_client_takes_the_card_of_an_output(whole):
    """All that can be held without the hub, which is asked by `ModelCard.validate`."""
    card = ModelCard.load(whole / "README.md")
    assert str(card) == (whole / "README.md").read_text(encoding="utf-8")
    told = card.data.to_dict()
    assert ModelCardData(**told).to_dict() == told and told["tags"][0] == "merge"
    assert (told["library_name"], told["pipeline_tag"]) == ("transformers", "text-generation")
    assert set(told) == {"library_name", "pipeline_tag", "tags"}  # folders are no base models of the hub


def test_a_path_in_what_is_copied_of_the_base_is_told(place):
    models = make_models(place / "models")
    tiny.edit_checkpoint(models[0], _name_or_path=str(place / "models/older"))
    config = tiny.write_config(place / "my.yaml", models[0], models[1:], place / "out", merge_ratios=[0.5])
    for arguments in (["--config", str(config)], ["--replay", "out", "--source", "models", "--output", "again"]):
        assert merge_monster.main(arguments) == 0
        words = "WARNING: config.json, copied from the base, contains the path "
        assert f"{words}{place}/models/older; check it before you publish the output\n" in log_of(place)
