"""The page on both ways of searching: its shell loop as it is printed, its line of a step, its keys."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from project import ROOT

from modules.config.schema import Joint, Settings
from modules.output.recipe import RECIPE_FILE
from modules.output.tables import step_line
from modules.search.joint import step_size

PAGE = (ROOT / "docs/greedy-or-joint.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_loop_walks_the_trade_off_as_it_is_printed(place, models):
    loop = PAGE.split("```sh\n")[1].split("```")[0]
    assert loop.count("\n") <= 5
    base, *candidates = models
    (place / "plain.txt").write_text("The bread is on the table, and half of it is left. " * 12, encoding="utf-8")
    more = {"joint": {"steps": 2}, "neutral_texts": ["plain.txt"], "neutral_tokens": 100}
    tiny.write_config(place / "my.yaml", base, candidates, place / "out", **more)
    (place / "merge_monster.py").symlink_to(ROOT / "merge_monster.py")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["sh", "-e", "-c", loop],
        cwd=place,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    weights = [int(weight) for weight in re.search(r"for weight in (.*);", loop)[1].split()]
    assert len(weights) == 3
    for weight in weights:
        recipe = json.loads((place / "runs" / f"weight-{weight}" / RECIPE_FILE).read_text(encoding="utf-8"))
        assert recipe["settings"]["drift_weight"] == weight and len(recipe["joint"]["steps"]) == 2
        card = (place / "runs" / f"weight-{weight}" / "README.md").read_text(encoding="utf-8")
        assert f"drift_weight: {weight}" in card and "](merge_map.png)" in card
    table = result.stdout[result.stdout.rindex("| Output") :].splitlines()
    rows = [line.split("|")[1].strip() for line in table if line.startswith("| runs/")]
    assert rows == sorted(f"runs/weight-{weight}" for weight in weights)
    assert all("joint, 2 steps" in line for line in table if line.startswith("| runs/"))


def test_the_line_of_a_step_is_one():
    (shown,) = re.findall(r"^    \d\d:\d\d:\d\d - (Step .*)$", PAGE, re.MULTILINE)
    metrics = {"total": 0.19377, "held_out": 0.2441, "trial_kl": 0.0031}
    assert shown == step_line(7, 25, 0.21034, metrics)


def test_its_figures_are_those_of_the_program():
    assert "in the last it is a tenth of that" in PAGE and step_size(25, 25, 0.08) == pytest.approx(0.008)
    with_both = re.search(r"with (\S+) of one\ncandidate and (\S+) of another it is (\S+)\.", PAGE)
    one, other, base = map(float, with_both.groups())
    assert base == pytest.approx(1 - one - other)


def test_its_keys_are_those_of_the_program():
    table = PAGE.split("## The keys\n")[1].split("\n## ")[0]
    keys = [key for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(.*?)`", cell)]
    known = {field.name for field in dataclasses.fields(Settings)}
    known |= {f"joint.{field.name}" for field in dataclasses.fields(Joint)}
    assert len(keys) == 11 and set(keys) <= known
