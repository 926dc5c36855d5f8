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
    assert len(lines) <= 28 and max(map(len, lines)) <= 80
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


@pytest.mark.parametrize("script", PROGRAMS)
def test_a_package_that_is_not_installed_is_one_line(script, tmp_path):
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError('', name='pydantic')")
    command = [sys.executable, str(ROOT / script), "--version"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "ERROR: the package pydantic is not installed: pip install -r requirements.txt\n"
