"""What was written before records had types: the journal and the recipe of a run of version 1.0.0, word for word.

The models are made anew. Where another processor draws other weights for them, their fingerprints are others too, so
these are put in; nothing else is changed.
"""

import json
import shutil

import pytest
import tiny
import torch
from project import ROOT
from safetensors.torch import load_file

import merge_monster
from modules.checkpoints.checkpoint import open_checkpoint
from modules.output.folder import OutputFolder
from modules.search import merge

EARLIER = ROOT / "tests/output/written_by_1.0.0"
JOURNAL, RECIPE = "merge_monster_journal.jsonl", "merge_monster_recipe.json"


@pytest.fixture
def models(place):
    """The models of that run, and what it was configured with."""
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(place / "models/base", tiny.llama_config(len(tokenizer), layers=2), tokenizer)
    candidates = [tiny.make_candidate(place / "models" / name, base, seed) for name, seed in (("one", 1), ("two", 2))]
    names = ["models/one", "models/two"]
    settings = {"merge_ratios": [0.3, 0.7], "merge_method": ["lerp", "slerp"]}
    tiny.write_config(place / "my.yaml", "models/base", names, "out", **settings)
    return [base, *candidates]


def with_fingerprint(source, models):
    """A source as it is written down, of the model that is here now."""
    folder = models[source["number"]]
    return source | {"fingerprint": open_checkpoint(folder, folder.name).fingerprint()}


def test_a_recipe_replays(place, models):
    recipe = json.loads((EARLIER / RECIPE).read_text(encoding="utf-8"))
    recipe["sources"] = [with_fingerprint(source, models) for source in recipe["sources"]]
    (place / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    assert merge_monster.main(["--replay", RECIPE, "--output", "again"]) == 0

    base, *others = (load_file(folder / "model.safetensors") for folder in models)
    accepted = [decision for decision in recipe["decisions"] if decision["ratio"] is not None]
    assert [decision["layer"] for decision in accepted] == [0, 0]
    found = load_file(place / "again/model.safetensors")
    for name, expected in base.items():
        if name.startswith("model.layers.0."):
            for decision in accepted:
                theirs = others[decision["candidate"] - 1][name]
                expected = merge(decision["method"], expected, theirs, decision["ratio"])
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("records", [5, 14])
def test_a_journal_is_gone_on_with(place, models, records):
    """From within the first candidate, and from within the second, after something was accepted."""
    lines = (EARLIER / JOURNAL).read_text(encoding="utf-8").splitlines()[:records]
    entries = [json.loads(line) for line in lines]
    kept = [with_fingerprint(entry, models) if entry["kind"] == "source" else entry for entry in entries]
    kept[0]["folder"] = str(place)  # in which the run was started
    (place / "out.partial").mkdir()
    text = "".join(f"{json.dumps(entry)}\n" for entry in kept)
    (place / "out.partial" / JOURNAL).write_text(text, encoding="utf-8")
    OutputFolder(place / "out").mark()
    assert merge_monster.main(["--config", "my.yaml", "--resume"]) == 0
    after = [json.loads(line) for line in (place / "out" / JOURNAL).read_text(encoding="utf-8").splitlines()]
    assert after[: len(kept)] == kept and len(after) > len(kept)
    assert str(place) not in (place / "out" / RECIPE).read_text(encoding="utf-8")  # of which the journal was full
    assert sum(entry["kind"] == "decision" for entry in after) == 10


def test_an_output_is_compared_with_others(place, models, capsys):
    (place / "earlier").mkdir()
    shutil.copy(EARLIER / RECIPE, place / "earlier")
    assert merge_monster.main(["--config", "my.yaml"]) == 0
    capsys.readouterr()
    assert merge_monster.main(["--compare", "earlier", "out"]) == 0
    shown = capsys.readouterr().out
    assert "earlier" in shown and "lerp" in shown
