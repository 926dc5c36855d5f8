"""What the search has scored, what the run has saved and what --replay makes of its recipe are the same numbers."""

import random
import shutil
import weakref
from pathlib import Path

import mixes
import pytest
import tiny
import torch
from adapters import make_adapter
from architectures import configuration
from broken_runs import RECIPE
from runs import log_of, merge

import merge_monster
import modules.run.merge
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.loading import load_model

TYPES = ["auto", "float32", "bfloat16", "float16"]


def random_models(place, chance):
    """A base and two candidates, one of them perhaps an adapter, or with its vocabulary in another order."""
    kind = chance.choice(["rows elsewhere", "tied", "Mixtral", "GPT-2", "shards"])
    if kind == "rows elsewhere":
        base, others = mixes.with_rows_elsewhere(place)
    else:
        size = len(tiny.bpe_tokenizer())
        config = (
            tiny.llama_config(size, tied=kind == "tied") if kind in ("tied", "shards") else configuration(kind, size)
        )
        stored = chance.choice([torch.float32, torch.bfloat16])
        shard = "60KB" if kind == "shards" else None
        base = tiny.make_model(place / "base", config, tiny.bpe_tokenizer(), dtype=stored, shard=shard)
        others = [tiny.make_candidate(place / f"other-{seed}", base, seed) for seed in (1, 2)]
    if kind in ("tied", "shards") and chance.random() < 0.5:
        others[0] = make_adapter(place, base, target_modules=["v_proj", "up_proj"])[0]
    return base, others


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(24))
def test_scored_saved_and_built_again(place, monkeypatch, seed):
    chance = random.Random(seed)
    base, others = random_models(place, chance)
    settings = {
        "search": chance.choice(["greedy", "joint"]),
        "merge_method": chance.choice([["lerp"], ["slerp", "lerp"], ["gradient", "cyclic"]]),
        "merge_ratios": [0.3, 0.8],
        "merge_headers": chance.random() < 0.8,
        "dtype": chance.choice(TYPES),
        "compute_dtype": chance.choice(["auto", "float32", "bfloat16", "bfloat16+float32"]),
        "samples": [],
        "baselines": False,
    }
    if settings["search"] == "joint":
        del settings["merge_method"], settings["merge_ratios"]
        settings |= {"joint": {"steps": 2, "step_size": 0.3}, "drift_weight": 0}
    scored, own = {}, modules.run.merge._conclude

    def kept(conductor, models):
        for name, tensor in conductor.search.model.tensors.items():
            saved = conductor.search.model.part_of([name]).saved_dtypes.get(name, tensor.dtype)
            scored[name] = tensor.to(saved).to(tensor.dtype)
        scored[""] = conductor.search.model.arithmetic
        return own(conductor, models)

    monkeypatch.setattr(modules.run.merge, "_conclude", kept)
    path = tiny.write_config(place / "my.yaml", base, others, place / "out", **settings)
    assert merge_monster.main(["--config", str(path)]) == 0
    assert "no merge was accepted" not in log_of(place)
    again = load_model(open_checkpoint(place / "out", "out"), "cpu", settings["dtype"], scored.pop(""))
    assert again.tensors.keys() == scored.keys()
    for name, tensor in scored.items():
        assert torch.equal(again.tensors[name], tensor), name
    shutil.move(place / "out", place / "first")
    assert merge_monster.main(["--replay", str(place / "first" / RECIPE), "--output", "out"]) == 0
    files = sorted(file.name for file in (place / "first").glob("*.safetensors"))
    assert files and all((place / "out" / file).read_bytes() == (place / "first" / file).read_bytes() for file in files)


def test_the_model_is_gone_before_the_output_is_written(place, models, monkeypatch):
    """So that writing takes no memory beside it."""
    held, own, release = [], modules.run.merge._conclude, modules.run.merge.release_memory

    def kept(conductor, models):
        held.append(weakref.ref(conductor.search.model.module))
        return own(conductor, models)

    def released():
        release()
        held.append(held[0]() is None)

    monkeypatch.setattr(modules.run.merge, "_conclude", kept)
    monkeypatch.setattr(modules.run.merge, "release_memory", released)
    assert merge(place, models, merge_ratios=[0.3]) == 0 and held[1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_changes_after_it_was_searched_is_named(place, models, monkeypatch, capsys, which):
    """What would be saved has not been scored."""
    ours = [Path(shutil.copytree(one, place / one.name)) for one in models]
    release = modules.run.merge.release_memory

    def changed():
        tiny.edit_checkpoint(ours[which], lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(2))
        release()

    monkeypatch.setattr(modules.run.merge, "release_memory", changed)
    assert merge(place, ours, merge_ratios=[0.3]) == 2
    error = capsys.readouterr().err
    assert f"{ours[which]}: " in error and "has changed since" in error and "--restart" in error
    assert not (place / "out").exists()
