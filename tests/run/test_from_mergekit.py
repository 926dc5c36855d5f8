"""mergekit's configurations as ours: the start against a plain reading of the file, a run, what is refused."""

import json
import random

import pytest
import tiny
import yaml
from runs import make_models

import merge_monster
from modules.config.schema import Settings, StartWeight
from modules.config.yaml_file import read_yaml
from modules.run.from_mergekit import METHODS, converted
from modules.search.joint import given_weights

LAYERS = 6
# Of a Llama: the base of these files.
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ATTENTION = [f"self_attn.{letter}_proj" for letter in "qkvo"]
LAYER = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
RECIPE = "merge_monster_recipe.json"


@pytest.fixture(autouse=True)
def base(place):
    tiny.llama_config(400, layers=LAYERS).save_pretrained(place / "base")


def written(place, **document):
    (place / "kit.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return place / "kit.yaml"


def sources(**weights):
    return [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]


def slices(*ranges, **weights):
    found = []
    for first, end in ranges:
        parts = [{**source, "layer_range": [first, end]} for source in sources(**weights)]
        found.append({"sources": [{"model": "base", "layer_range": [first, end]}, *parts]})
    return found


def composed_plainly(document, models):
    """What mergekit makes of numbers in place of tensors, as it is documented there, tensor by tensor."""
    method = document["merge_method"]
    parts = document.get("slices") or [{"sources": document["models"]}]
    made = {}
    for name in models["base"]:
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if name == EMBEDDING else LAYERS - 1
        for part in parts:
            first, end = part["sources"][0].get("layer_range", [0, LAYERS])
            if first <= layer < end:
                break
        depth = (layer - first) / (end - first - 1) if end - first > 1 else 1

        def parameter(key, default, *where, name=name, depth=depth):
            for one in where:
                found = read(one.get("parameters", {}).get(key), name, depth)
                if found is not None:
                    return found
            return default

        base = models["base"][name]
        weights, differences = [], []
        for source in part["sources"]:
            if source["model"] != "base" or method == "linear":
                weights.append(parameter("weight", None, source, part, document))
                differences.append(models[source["model"]][name] - (0 if method == "linear" else base))
        total = sum(weight * value for weight, value in zip(weights, differences, strict=True))
        if document.get("parameters", {}).get("normalize", method == "linear"):
            total /= sum(weights)
        made[name] = total if method == "linear" else base + total * parameter("lambda", 1.0, document)
    return made


def read(setting, name, depth):
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for condition in setting:
            if condition.get("filter", "*") == "*" or condition["filter"] in name:
                return read(condition["value"], name, depth)
        return None
    if isinstance(setting, list):
        at = depth * (len(setting) - 1)
        low = int(at)
        return setting[low] + (at - low) * (setting[min(low + 1, len(setting) - 1)] - setting[low])
    return setting


def composed_from(settings, models):
    """The numbers that a joint search has where our configuration says that it starts."""
    start = [StartWeight(**entry | layers_of(entry)) for entry in settings["joint"]["start"]]
    rows = given_weights(start, LAYERS + 1, len(settings["models_to_merge"]))
    made = {}
    for name, base in models["base"].items():
        row = rows[int(name.split(".")[2]) if ".layers." in name else LAYERS]
        candidates = zip(row, settings["models_to_merge"], strict=True)
        made[name] = base + sum(weight * (models[model][name] - base) for weight, model in candidates)
    return made


def layers_of(entry):
    if "layers" not in entry:
        return {}
    layers = []
    for part in entry["layers"] if isinstance(entry["layers"], list) else [entry["layers"]]:
        first, _, last = str(part).partition("-")
        layers += range(int(first), int(last or first) + 1)
    return {"layers": tuple(layers)}


HEADER = [{"filter": "embed_tokens", "value": 0.25}, {"filter": "lm_head", "value": 0.25}]
MERGES = {
    "numbers": {"merge_method": "task_arithmetic", "models": sources(one=0.3, two=0.6)},
    "lambda": {
        "merge_method": "task_arithmetic",
        "models": sources(one=0.3, two=0.6),
        "parameters": {"lambda": 0.5, "normalize": True},
    },
    "linear": {"merge_method": "linear", "models": sources(base=2, one=1, two=0.5)},
    "not normalized": {
        "merge_method": "linear",
        "models": sources(base=0.5, one=0.2, two=0.3),
        "parameters": {"normalize": False},
    },
    "everywhere": {
        "merge_method": "task_arithmetic",
        "models": [{"model": "one"}, {"model": "two", "parameters": {"weight": 0.1}}],
        "parameters": {"weight": 0.4},
    },
    "slices": {
        "merge_method": "task_arithmetic",
        "slices": [*slices((0, 2), one=0.2, two=0.7), *slices((2, LAYERS), one=0.2, two=0.7)],
    },
    "gradients": {
        "merge_method": "linear",
        "slices": [
            {"sources": [{**source, "layer_range": [0, LAYERS]} for source in sources(base=0.4, one=0.6)]},
        ],
    },
    "by layer": {
        "merge_method": "task_arithmetic",
        "slices": slices(
            (0, LAYERS),
            one=[*HEADER, {"filter": "layers.3.", "value": 1.0}, {"value": [0.25, 0.4, 0.9, 0.25]}],
            two=[{"filter": "layers.0.", "value": 0.5}, {"filter": "*", "value": 0.0}],
        ),
    },
}
MERGES["gradients"]["slices"][0]["sources"][1]["parameters"]["weight"] = [*HEADER, {"value": [0.1, 0.9, 0.3]}]
MERGES["gradients"]["slices"][0]["sources"][0]["parameters"]["weight"] = [*HEADER, {"value": [0.9, 0.1]}]


@pytest.mark.parametrize("case", MERGES)
def test_the_start_is_what_mergekit_would_make(place, case):
    document = {"base_model": "base", **MERGES[case]}
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in LAYER]
    chance = random.Random(case)
    models = {}
    for model in ("base", "one", "two"):
        models[model] = {name: chance.random() for name in [EMBEDDING, *names, HEAD]}
    text, notes = converted(written(place, **document))
    settings = yaml.safe_load(text)
    assert (settings["search"], notes) == ("joint", [])
    assert composed_from(settings, models) == pytest.approx(composed_plainly(document, models), abs=3e-4)


def test_adjacent_layers_of_one_weight_are_one_entry(place):
    weight = [{"filter": "layers.0.", "value": 0.5}, {"value": 0.1}]
    kit = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices((0, 4), one=weight)}
    start = yaml.safe_load(converted(written(place, **kit))[0])["joint"]["start"]
    assert start == [{"candidate": 1, "weight": 0.1}, {"candidate": 1, "layers": 0, "weight": 0.5}]


@pytest.mark.parametrize(
    "document, words",
    [
        ({"models": sources(one=1.5)}, "one: weights below 0 or above 1 were clipped"),
        ({"models": sources(one=-0.5)}, "one: weights below 0 or above 1 were clipped"),
        ({"models": sources(one=0.5), "dtype": "bfloat16", "parameters": {"int8_mask": True}}, "dtype, int8_mask"),
        (
            {"slices": slices((0, 2), one=[{"filter": "mlp", "value": 1}, {"value": 0}])},
            "one: a layer has one weight, so filters",
        ),
        (
            {"models": sources(one=0.5, base=0.2), "merge_method": "linear", "parameters": {"normalize": False}},
            "weights don't add up to 1",
        ),
        (
            {"models": sources(one=0.5, two=0.5), "merge_method": "linear", "base_model": None},
            "using the first model, one.",
        ),
    ],
)
def test_what_is_changed_is_named(place, document, words):
    document = {"merge_method": "task_arithmetic", "base_model": "base", **document}
    _, (note,) = converted(written(place, **document))
    assert words in note


@pytest.mark.parametrize("method", [name for name, ours in METHODS.items() if ours != "lerp"])
def test_what_joint_search_does_not_have_is_searched_greedily(place, method):
    models = sources(one=0.3, two=0.6)
    for source, density in zip(models, (0.5, 0.4), strict=True):
        source["parameters"]["density"] = density
    kit = {"merge_method": method, "base_model": "base", "models": models, "parameters": {"normalize": False}}
    text, notes = converted(written(place, **kit))
    settings = yaml.safe_load(text)
    assert settings["search"] == "greedy" and settings["merge_ratios"] == [0.3, 0.6]
    assert settings["merge_method"] == {"name": METHODS[method], "density": 0.45}
    assert len(notes) == 2 and "density" in notes[1]


def test_the_number_of_layers_is_the_base_s_own(place):
    models = make_models(place)
    weights = {str(models[1]): [0.0, 1.0], str(models[2]): [0.0, 1.0]}
    file = written(place, merge_method="task_arithmetic", base_model=str(models[0]), models=sources(**weights))
    start = yaml.safe_load(converted(file)[0])["joint"]["start"]
    assert start[:2] == [{"candidate": 1, "weight": 0.5}, {"candidate": 1, "layers": 0, "weight": 0.0}]
    assert start[2:4] == [{"candidate": 1, "layers": 2, "weight": 1.0}, {"candidate": 2, "weight": 0.5}]


def test_a_run_begins_there(place, capsys):
    models = make_models(place / "models")
    weights = {str(models[1]): 0.25, str(models[2]): [0.0, 0.5]}
    file = written(place, merge_method="task_arithmetic", base_model=str(models[0]), models=sources(**weights))
    assert merge_monster.main(["--from-mergekit", str(file)]) == 0
    shown = capsys.readouterr().out
    assert merge_monster.main(["--from-mergekit", str(file), "--output", "my.yaml"]) == 0
    assert (place / "my.yaml").read_text(encoding="utf-8") == shown
    assert merge_monster.main(["--from-mergekit", str(file), "--output", "my.yaml"]) == 2
    phrases = json.dumps(tiny.phrase_entries(tiny.PAIRS, "BAD"))
    sets = ["joint.steps=1", "neutral_texts=[]", "own_texts=[]", "drift_weight=0", "samples=[]", "phrase_files=[]"]
    arguments = [word for one in [*sets, f"bad_phrases={phrases}"] for word in ("--set", one)]
    assert merge_monster.main(["--config", "my.yaml", "--device", "cpu", *arguments]) == 0
    recipe = json.loads((place / "merged" / RECIPE).read_text(encoding="utf-8"))
    assert recipe["joint"]["start"] == [[0.25, 0.0], [0.25, 0.25], [0.25, 0.5], [0.25, 0.25]]
    assert set(read_yaml(place / "my.yaml", "").value) <= set(Settings.__dataclass_fields__)


ONE = sources(one=0.5)
REFUSED = {
    "no such file": None,
    "not valid YAML": "a: [",
    "not a mergekit configuration": {"models": ONE},
    "merge_method is missing": ["a"],
    "merge_method 'slerp' is not supported; use one of linear, ": {"merge_method": "slerp", "models": ONE},
    "merge_method [1] is not supported": {"merge_method": [1], "models": ONE},
    "expected either models or slices": {"merge_method": "linear", "modules": {}},
    "base_model is missing, which ties needs": {"merge_method": "ties", "models": ONE},
    "no model besides the base one": {"merge_method": "linear", "models": ONE},
    "models.0.model: ": {"merge_method": "linear", "models": [{"model": {"path": "one"}}]},
    "more than one base model: base, other": {"slices": [slices((0, 2), one=1)[0] | {"base_model": "other"}]},
    "weight of one: missing": {"models": [{"model": "one"}]},
    "weight: 'much': expected a number": {"slices": slices((0, 2), one="much")},
    "weight: true: expected a number": {"slices": slices((0, 2), one=True)},
    "weight: [0.5, 'a']: expected a number": {"slices": slices((0, 2), one=[0.5, "a"])},
    "weight: []: expected a number": {"slices": slices((0, 2), one=[])},
    "absent: no such folder": {"base_model": "absent", "models": sources(one=[0.1, 0.5])},
    "slices[0]: expected layer_range [0, END]": {"slices": slices((2, 4), one=1)},
    "slices[1]: expected layer_range [2, END]": {"slices": slices((0, 2), (3, 4), one=1)},
    "slices[0]: expected layer_range [0, END] for all": {"slices": slices((0, 10**9), one=1)},
    "for all its sources": {
        "slices": [{"sources": [{"model": "base", "layer_range": [0, 2]}, {"model": "one", "layer_range": [0, 3]}]}]
    },
    "slices.0.sources.1.layer_range.0: ": {
        "slices": [{"sources": [{"model": "base"}, {"model": "one", "layer_range": ["a", 3]}]}]
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_is_one_line(place, capsys, words):
    document = REFUSED[words]
    if isinstance(document, dict) and "merge_method" not in document and words != "not a mergekit configuration":
        document = {"merge_method": "task_arithmetic", "base_model": "base", **document}
    if document is not None:
        text = document if isinstance(document, str) else yaml.safe_dump(document)
        (place / "kit.yaml").write_text(text, encoding="utf-8")
    assert merge_monster.main(["--from-mergekit", "kit.yaml", "--output", "my.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("ERROR: kit.yaml: ") and words in error
    assert not (place / "my.yaml").exists()


@pytest.mark.parametrize("more", [["--config", "x"], ["--replay", "x"], ["--device", "cpu"], ["--dry-run"]], ids=str)
def test_what_it_does_not_go_with(more, capsys):
    with pytest.raises(SystemExit) as caught:
        merge_monster.main(["--from-mergekit", "kit.yaml", *more])
    assert caught.value.code == 2 and "--from-mergekit can only be combined with" in capsys.readouterr().err
