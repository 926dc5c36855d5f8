"""What the programs say of themselves: on one screen, an option a line."""

import os
import re
import subprocess
import sys

import pytest
from project import ROOT, environment

import merge_monster
import monster_mapper

PROGRAMS = {"merge_monster.py": merge_monster, "monster_mapper.py": monster_mapper}


@pytest.mark.parametrize("script", PROGRAMS)
def test_the_help_fits_on_a_screen(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    result = subprocess.run(command, env=environment(COLUMNS="80"), capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    usage, description, *others = lines
    assert usage == f"usage: {script} [--config FILE] [options]" and description.endswith(".")
    for line in others:  # a heading, or an option and what is said of it
        assert re.fullmatch(r"[a-z].*:|  --[a-z-]+( \S+)*  +\S.*", line), line


@pytest.mark.parametrize("script", PROGRAMS)
def test_an_error_names_the_program_and_what_was_typed(script, capsys):
    with pytest.raises(SystemExit) as caught:
        PROGRAMS[script].parse_arguments(["--no\x1bsuch"])
    first, second = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and first.startswith("usage: ")
    assert second.endswith("error: unrecognized arguments: --no\\x1bsuch")


@pytest.mark.parametrize(
    "text, merging, mapping",
    [
        ("my.yaml", "--config my.yaml", "--config my.yaml"),
        ("my own.YML", "--config 'my own.YML'", "--config 'my own.YML'"),
        ("settings", "--config settings", "--config settings"),
        ("folder", "--set directories.model_path1=folder", "--model folder"),
        ("model.gguf", "--set directories.model_path1=model.gguf", "--model model.gguf"),
        ("org/name@main", "--set directories.model_path1=org/name@main", "--model org/name@main"),
        ("nothing", None, None),
    ],
)
@pytest.mark.parametrize("before", [[], ["--confg"], ["--quiet"]])
def test_what_has_no_option_is_told_which_one_it_needs(place, capsys, before, text, merging, mapping):
    (place / "folder").mkdir()
    for file in ("settings", "model.gguf"):
        (place / file).write_text("")
    for program, hint in ((merge_monster, merging), (monster_mapper, mapping)):
        with pytest.raises(SystemExit) as caught:
            program.main([*before, text])
        told = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and text in told
        assert f"did you mean {hint}" in told if hint else "did you mean" not in told


@pytest.mark.parametrize("script", PROGRAMS)
def test_a_package_that_is_not_installed_is_one_line(script, tmp_path):
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError('', name='pydantic')")
    command = [sys.executable, str(ROOT / script), "--version"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "ERROR: the package pydantic is not installed: pip install -r requirements.txt\n"
