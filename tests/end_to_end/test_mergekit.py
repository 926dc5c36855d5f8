"""A recipe exported for mergekit: by a plain reading of the file, and by mergekit itself, the same model."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import mergekits
import numpy as np
import pytest
import tiny
import torch
import yaml
from adapters import write_adapter
from broken_runs import RECIPE
from runs import make_models, merge
from safetensors.torch import load_file

import merge_monster

LAYERS = 3
# (candidate, layer, ratio), in their order; no layer: the header.
ONCE = [(1, 0, 0.3), (2, 2, 0.85), (1, None, 0.6)]
AGAIN = [(1, 0, 0.3), (1, 0, 0.5), (1, 1, 1.0), (1, None, 0.2), (2, 0, 0.45), (2, 2, 0.7), (2, None, 0.35)]
ON_LAYERS = [(1, 0, 0.3), (2, 0, 0.5), (2, 2, 0.7)]
SHARES = [[0.3, 0.2], [0.9, 0.75], [0.0, 0.0], [0.45, 0.05]]  # in the second layer the base has less than nothing
WITHIN = [[0.3, 0.2], [0.1, 0.9], [0.0, 1.0], [0.45, 0.05]]  # in the second and the third the base has nothing
MERGES = {
    "within": WITHIN,
    "once": ONCE,
    "again": AGAIN,
    "layers": ON_LAYERS,
    "weights": SHARES,
    "rows": SHARES[:3],
    "nothing": [],
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """By type and tying: the folders of a base and two candidates, and the recipe of a run with them."""
    made = {}

    def make(dtype="float32", tied=False):
        if (dtype, tied) not in made:
            place = tmp_path_factory.mktemp("opened")
            models = make_models(place, getattr(torch, dtype), tied=tied)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                assert merge(place, models, merge_method="lerp", merge_ratios=[0.5]) == 0
            made[dtype, tied] = models, recipe_in(place, models)
        return made[dtype, tied]

    return make


def recipe_in(place, models):
    """The recipe of an output, with whole paths: it is written again in other folders."""
    recipe = json.loads((place / "out" / RECIPE).read_text())
    for source, model in zip(recipe["sources"], models, strict=True):
        source["where"] = str(model)
    return recipe


def told(recipe, merges):
    """The recipe as if these had been the search's decisions, or the shares that it found."""
    one = recipe["decisions"][0]
    if any(isinstance(row, list) for row in merges):
        joint = {"start": merges, "slopes": {"total": merges}, "weights": merges}
        return recipe | {"decisions": [], "joint": joint}
    return recipe | {
        "decisions": [one | {"candidate": number, "layer": layer, "ratio": ratio} for number, layer, ratio in merges]
    }


def program(*arguments):
    return merge_monster.main(list(map(str, arguments)))


def exported(place, recipe):
    (place / "recipe.json").write_text(json.dumps(recipe))
    assert program("--export-mergekit", place / "merge.yaml", place / "recipe.json") == 0
    return place / "merge.yaml"


def replayed(place):
    assert program("--replay", place / "recipe.json", "--output", place / "ours") == 0
    return load_file(place / "ours/model.safetensors")


def read_plainly(file):
    """What a file for mergekit says, as it is documented there, tensor by tensor."""
    made = {}
    for document in yaml.safe_load_all(file.read_text()):
        slices = document["slices"]
        adds = document["merge_method"] == "task_arithmetic"  # differences to the base
        assert adds or document["merge_method"] == "linear"
        assert document["parameters"] == {"normalize": False}
        names = [source["model"] for source in slices[0]["sources"]]
        assert all([source["model"] for source in one["sources"]] == names for one in slices)
        assert [one["sources"][0]["layer_range"] for one in slices] == [[n, n + 1] for n in range(LAYERS)]
        models = {name: made[name] if name in made else load_file(f"{name}/model.safetensors") for name in names}
        found = {}
        for name, tensor in models[document["base_model"]].items():
            layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else LAYERS - 1
            total = tensor.float() if adds else torch.zeros(tensor.shape)
            for source in slices[layer]["sources"]:
                if adds and source["model"] == document["base_model"]:
                    assert "parameters" not in source
                    continue
                weight = source["parameters"]["weight"]
                if isinstance(weight, list):
                    weight = next(one["value"] for one in weight if one.get("filter", "") in name)
                total = total + weight * (models[source["model"]][name].float() - adds * tensor.float())
            found[name] = total.to(getattr(torch, document["out_dtype"]))
        made[document.get("name", "")] = found
    return made[""]


def check(ours, theirs, folders):
    """Each tensor is the other within one rounding step of the largest of what is summed; within two of float32, in
    which the sums themselves are made."""
    assert ours.keys() == theirs.keys()
    files = [load_file(folder / "model.safetensors") for folder in folders]
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        largest = torch.stack([one[name].float().abs() for one in [*files, ours]]).amax(0)
        steps = (tensor.double() - theirs[name].double()).abs() / largest / torch.finfo(tensor.dtype).eps
        assert steps.nan_to_num().amax() <= (2 if tensor.dtype == torch.float32 else 1), name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_file_says_what_was_merged(place, opened, dtype, tied, merges):
    models, recipe = opened(dtype, tied)
    file = exported(place, told(recipe, MERGES[merges]))
    check(replayed(place), read_plainly(file), models)
    documents = list(yaml.safe_load_all(file.read_text()))
    assert len(documents) == {"again": 3, "layers": 2}.get(merges, 1)
    assert all(one["dtype"] == "float32" and one["out_dtype"] == dtype for one in documents)
    assert file.read_text().startswith("# mergekit-multi" if len(documents) > 1 else "# mergekit-yaml")
    below_nothing = merges in ("weights", "rows")
    assert {one["merge_method"] for one in documents} == {"task_arithmetic" if below_nothing else "linear"}


@pytest.mark.parametrize("merges", ["within", "weights", "nothing"])
def test_what_was_exported_is_where_another_search_begins(place, opened, merges):
    """The way back: the same weights in every layer, and outside of them."""
    file = exported(place, told(opened()[1], MERGES[merges] or [[0.0, 0.5]] * 4))
    assert program("--from-mergekit", file, "--output", place / "start.yaml") == 0
    settings = yaml.safe_load((place / "start.yaml").read_text())
    numbers = {name: number for number, name in enumerate(settings["models_to_merge"])}
    rows = MERGES[merges] or [[0.5]] * 4
    assert [Path(name).name for name in numbers] == ["one", "two"][-len(rows[0]) :]
    found = np.zeros_like(rows)
    for entry in settings["joint"]["start"]:
        first, _, last = str(entry.get("layers", "0-3")).partition("-")
        found[int(first) : int(last or first) + 1, entry["candidate"] - 1] = entry["weight"]
    assert found.tolist() == rows


def weights_in(file):
    """All weights, whether they stand alone or behind a filter."""
    for document in yaml.safe_load_all(file.read_text()):
        for source in [source for one in document["slices"] for source in one["sources"]]:
            weight = source["parameters"]["weight"]
            yield from [one["value"] for one in weight] if isinstance(weight, list) else [weight]


def test_a_weight_is_exact_and_short(place, opened):
    weights = set(weights_in(exported(place, told(opened()[1], [(1, 0, 0.1 + 0.2), (2, 1, 1 / 3)]))))
    assert {0.3, 0.7, 0.333333333333, 0.666666666667} <= weights


def test_a_type_that_was_asked_for(place, opened):
    models, recipe = opened("float32")
    file = exported(place, told(recipe | {"saved_dtype": "bfloat16"}, AGAIN))
    assert [one["out_dtype"] for one in yaml.safe_load_all(file.read_text())] == ["bfloat16"] * 3
    check(replayed(place), read_plainly(file), models)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """mergekit's; the environment variable MERGEKIT names a folder where it is to stay."""
    try:
        return mergekits.install(Path(os.environ.get("MERGEKIT") or tmp_path_factory.mktemp("mergekit")))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mergekit can't be installed here: {error.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("kind", [("float32", True), ("bfloat16", False)], ids=["float32, tied", "bfloat16, untied"])
def test_mergekit_makes_the_same_of_it(place, opened, commands, kind, merges):
    """By the command in the file's first line."""
    models, recipe = opened(*kind)
    file = exported(place, told(recipe, MERGES[merges]))
    words = {"THIS_FILE": str(file), "OUTPUT": str(place / "theirs"), "FOLDER": str(place / "between")}
    command, *arguments = [words.get(word, word) for word in file.read_text().splitlines()[0].split()[1:]]
    result = subprocess.run([str(commands / command), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, shlex.join([command, *arguments]) + result.stderr[-2000:]
    theirs = {
        name: tensor for path in (place / "theirs").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    check(replayed(place), theirs, models)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def refused(place, recipe, capsys):
    (place / "recipe.json").write_text(json.dumps(recipe))
    assert program("--export-mergekit", place / "merge.yaml", place / "recipe.json") == 2
    assert not (place / "merge.yaml").exists()
    return capsys.readouterr().err


def test_what_is_no_weighted_sum_is_named(place, opened, capsys):
    recipe = told(opened()[1], AGAIN)
    for number, method in ((1, "slerp"), (2, "slerp"), (4, "slice"), (5, "slerp"), (6, "gradient")):
        recipe["decisions"][number]["method"] = method
    assert "not gradient, slerp, slice" in refused(place, recipe, capsys)


@pytest.mark.parametrize("merges", [ONCE, SHARES], ids=["greedy", "joint"])
def test_rows_at_other_places_are_refused_where_they_are_merged(place, capsys, merges):
    models = make_models(place / "models")
    tokenizer = tiny.bpe_tokenizer()
    order = {token: (row * 7 + 3) % len(tokenizer) for token, row in tokenizer.get_vocab().items()}
    tiny.change_vocabulary(models[1], tiny.rewritten_tokenizer(tokenizer, order))
    assert merge(place, models, merge_method="lerp", merge_ratios=[0.5]) == 0
    recipe = recipe_in(place, models)
    assert "of them at a different index" in refused(place, told(recipe, merges), capsys)
    exported(place, told(recipe, [line for line in merges if len(line) == 3 and line[1] is not None] or merges[:3]))


def test_several_stored_types_are_refused(place, opened, capsys):
    models = make_models(place / "models")
    tiny.edit_checkpoint(
        models[0], lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "norm" in n})
    )
    assert merge(place, models, merge_method="lerp", merge_ratios=[0.5]) == 0
    recipe = told(recipe_in(place, models), ONCE)
    assert "base: its tensors have several dtypes (bfloat16, float32)" in refused(place, recipe, capsys)


def test_a_type_that_was_rounded_to_beforehand_is_refused(place, opened, capsys):
    recipe = told(opened("float32")[1], ONCE) | {"dtype": "bfloat16"}
    words = "it was computed in bfloat16, which rounded float32 weights"
    assert words in refused(place, recipe, capsys)
    recipe = told(opened("bfloat16")[1], ONCE) | {"dtype": "bfloat16"}
    exported(place, recipe)


def test_adapters_are_refused(place, capsys):
    models = make_models(place / "models")
    write_adapter(place / "adapter", models[0])
    models = models[0], place / "adapter"
    assert merge(place, models, merge_method="lerp", merge_ratios=[0.5]) == 0
    recipe = told(recipe_in(place, models), [(1, 0, 0.5)])
    assert "adapter is an adapter, which mergekit applies differently" in refused(place, recipe, capsys)


def test_other_models_and_files_that_are_there(place, opened, capsys):
    models, recipe = opened()
    recipe = told(recipe, ONCE)
    recipe["sources"][1]["where"] = "/nowhere/one"
    (place / "recipe.json").write_text(json.dumps(recipe))
    command = ["--export-mergekit", place / "merge.yaml", place / "recipe.json"]
    assert program(*command) == 2
    assert ": one; add --source DIR " in capsys.readouterr().err
    assert program(*command, f"--source=one={models[2]}") == 2
    assert "has changed since the recipe was written" in capsys.readouterr().err
    assert program(*command, f"--source=one={models[1]}") == 0
    assert program(*command, f"--source=one={models[1]}") == 2
    assert "this file exists" in capsys.readouterr().err
    assert program(*command, f"--source=one={models[1]}", "--overwrite") == 0
    inside = ["--export-mergekit", models[0] / "merge.yaml", place / "recipe.json", f"--source=one={models[1]}"]
    assert program(*inside) == 2
    assert "which lies in the input" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--config", "x"], ["--output", "x"], ["--replay", "x"], ["--dry-run"]], ids=str)
def test_what_it_does_not_go_with(more, capsys):
    with pytest.raises(SystemExit) as caught:
        program("--export-mergekit", "merge.yaml", "out", *more)
    assert caught.value.code == 2 and "--export-mergekit can only be combined with" in capsys.readouterr().err
