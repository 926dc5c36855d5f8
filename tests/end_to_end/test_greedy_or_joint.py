"""The page on searches: its shell loop, as it is printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from project import ROOT

from modules.output.recipe import RECIPE_FILE

PAGE = (ROOT / "docs/search.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_loop_walks_the_trade_off_as_it_is_printed(place, models):
    loop = PAGE.split("```sh\n")[1].split("```")[0]
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
