"""What auto computes in on an accelerator, with the same arithmetic on the CPU: float16, or bfloat16 with a float32
residual stream where a model does not stand it."""

import json
import math

import pytest
import tiny
import torch
from architectures import configuration
from broken_runs import RECIPE, break_off, differing, journal
from runs import digest, log_of, make_models, merge, refused, stored
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
import modules.model.loading
import modules.run.plan
import monster_mapper
from modules.model.arithmetic import FALLBACK, Arithmetic

WIDE = "bfloat16+float32"
OWN = {"merge_monster_journal.jsonl", RECIPE, "merge_monster.yaml", "README.md"}
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    """auto takes what it takes on a GPU."""
    whole = modules.run.plan.arithmetics

    def arithmetics(compute, dtype, stored, _device):
        return whole(compute, dtype, stored, torch.device("cuda"))

    for module in (modules.run.plan, modules.model.loading):
        monkeypatch.setattr(module, "arithmetics", arithmetics)


@pytest.fixture
def models(tmp_path):
    return make_models(tmp_path, torch.bfloat16)


def recipe_of(folder):
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def decisions(folder):
    return [(line["candidate"], line["layer"], line["ratio"]) for line in recipe_of(folder)["decisions"]]


def scores_of(folder):
    """The pairs' probabilities in a saved model, by plain forwards in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for pair in tiny.PAIRS:
        ids = tokenizer(pair.context + pair.phrase).input_ids
        start = len(tokenizer(pair.context.rstrip()).input_ids)
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(math.exp(sum(float(logs[at - 1, ids[at]]) for at in range(start, len(ids)))))
    return found


def numbers_in(recipe):
    """All numbers that a recipe has of scores."""
    phrases = [value for phrase in recipe["phrases"] for value in (phrase["before"], phrase["after"])]
    return [
        *phrases,
        *(one["total"] for one in recipe["metrics"].values()),
        *(line["after"] for line in recipe["decisions"]),
    ]


def is_wide(place, *words):
    """Whether a run has ended in the wide arithmetic, with numbers, and its log names all the words."""
    recipe, log = recipe_of(place / "out"), log_of(place)
    return (
        recipe["dtype"] == WIDE
        and all(map(math.isfinite, numbers_in(recipe)))
        and f"computing in {WIDE}" in log
        and all(word in log for word in words)
    )


def edited(folder, name, change):
    """A tensor of a checkpoint is another one."""
    tiny.edit_checkpoint(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def overflows_on(folder, word):
    """A model whose first MLP overflows float16 where the text has a word's first token, and nowhere else."""
    token = AutoTokenizer.from_pretrained(folder)(word).input_ids[0]

    def change(tensors):
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][token, 0] = 8
        tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
        for name in MLP:
            tensors[f"model.layers.0.{name}"][:, 0] = 300

    tiny.edit_checkpoint(folder, change)


# -- models that stand it ----------------------------------------------------------------------------------------------


def test_float16_decides_as_float32_does(place, models):
    assert merge(place, models) == 0
    recipe = recipe_of(place / "out")
    assert (recipe["dtype"], recipe["saved_dtype"]) == ("float16", None)
    assert {dtype for dtype, _ in stored(place / "out").values()} == {"BF16"}
    ours = decisions(place / "out")
    assert scores_of(place / "out") == pytest.approx([phrase["after"] for phrase in recipe["phrases"]], rel=0.02)
    assert merge(place, models, "--overwrite", compute_dtype="float32") == 0
    assert decisions(place / "out") == ours
    assert recipe_of(place / "out")["metrics"]["merge"]["total"] == pytest.approx(
        recipe["metrics"]["merge"]["total"], rel=0.02
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("compute", ["auto", WIDE, "float16+float32"])
def test_broken_off_and_replayed_it_ends_in_the_same_bits(place, models, compute):
    settings = {"compute_dtype": compute, "merge_method": ["slerp", "lerp"]}
    assert merge(place, models, **settings) == 0
    whole = place / "whole"
    (place / "out").rename(whole)
    assert recipe_of(whole)["dtype"] == ("float16" if compute == "auto" else compute)
    again = ["--replay", str(whole), "--output", str(place / "again"), "--device", "cpu"]
    assert merge_monster.main([*again, "--source", str(models[0].parent)]) == 0
    assert differing(digest(whole), digest(place / "again")) <= OWN | {"merge_map.png"}
    break_off(place, whole, 8)
    assert merge(place, models, "--resume", **settings) == 0
    assert differing(digest(whole), digest(place / "out")) <= OWN


def test_numbers_that_lose_digits_are_counted_in_the_log(place, models):
    edited(models[0], "model.layers.0.mlp.down_proj.weight", lambda tensor: torch.where(tensor < 0, 1e-6, tensor))
    edited(models[1], "model.layers.0.mlp.down_proj.weight", lambda tensor: torch.where(tensor < 0, 2e-6, tensor))
    assert merge(place, models, min_gain=0) == 0
    assert "merged weights so far were rounded in float16" in log_of(place)
    assert recipe_of(place / "out")["dtype"] == "float16"


# -- bases that do not -------------------------------------------------------------------------------------------------


def too_large(base):
    edited(base, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), 1e5))


def too_small(base):
    edited(base, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor * 3e-7)


BASES = {
    "a weight beyond float16": (too_large, "model.layers.1.mlp.down_proj.weight overflows"),
    "subnormal weights": (too_small, "model.layers.1.mlp.down_proj.weight underflows"),
    "activations on one phrase": (lambda base: overflows_on(base, "unwavering"), "unwavering"),
}


@pytest.mark.parametrize("spoil, named", BASES.values(), ids=BASES)
def test_a_base_that_float16_can_not_hold(place, models, capsys, spoil, named):
    spoil(models[0])
    assert merge(place, models) == 0
    assert is_wide(place, named, "float16")
    assert (place / "out" / "model.safetensors").exists()
    capsys.readouterr()
    (place / "out").rename(place / "earlier")
    if "underflows" not in named:  # whoever asks for float16 gets it, where it can be computed
        refused(place, models, capsys, [named, "compute_dtype: bfloat16+float32"], compute_dtype="float16")


def test_neutral_text_on_which_it_overflows(place, models):
    overflows_on(models[0], "z")
    (place / "neutral.txt").write_text("a lazy zebra on a lazy day\n" * 8)
    assert merge(place, models, neutral_texts=[str(place / "neutral.txt")]) == 0
    assert is_wide(place, "neutral text")
    assert math.isfinite(recipe_of(place / "out")["metrics"]["merge"]["kl"])


def test_score_and_mapper_take_the_wide_arithmetic_too(place, models):
    overflows_on(models[0], "unwavering")
    path = tiny.write_config(place / "my.yaml", models[0], models[1:], place / "out")
    assert merge_monster.main(["--config", str(path), "--score", str(models[1]), "--json", str(place / "s.json")]) == 0
    assert f"computing in {WIDE}" in log_of(place)
    assert "NaN" not in (place / "s.json").read_text()
    assert monster_mapper.main(["--config", str(path), "--json", str(place / "m.json")]) == 0
    assert "NaN" not in (place / "m.json").read_text()


# -- candidates that do not --------------------------------------------------------------------------------------------


def larger_mlp(folder, layer, factor):
    for name in MLP:
        edited(folder, f"model.layers.{layer}.{name}", lambda tensor: tensor * factor)


def widening(folder):
    """The number of records before the only decision with which a run's arithmetic changes."""
    (number,) = [number for number, line in enumerate(journal(folder)) if line.get("computed") == WIDE]
    return number


def test_a_trial_that_overflows_is_scored_in_the_wide_arithmetic(place, models):
    larger_mlp(models[1], 1, 3000)
    assert merge(place, models, min_gain=1e9) == 0  # nothing is accepted
    log = log_of(place)
    assert f"overflow float16; scored in {WIDE}" in log
    assert recipe_of(place / "out")["dtype"] == "float16"
    assert all(map(math.isfinite, numbers_in(recipe_of(place / "out"))))


def test_a_trial_that_overflows_and_wins(place, models):
    """The run goes on in the wide arithmetic with what was decided before; resumed and replayed, to the same bits."""
    larger_mlp(models[1], 1, 3000)
    settings = {"merge_ratios": [0.5, 1.0], "min_gain": 0, "strategy": "cumulative"}
    assert merge(place, models, **settings) == 0
    won = [line for line in decisions(place / "out") if line[:2] == (1, 1)]
    assert won[0][2] is not None, "the case shows nothing"
    assert is_wide(place, "overflows float16")
    whole = place / "whole"
    (place / "out").rename(whole)
    for records in (widening(whole), widening(whole) + 1, widening(whole) + 3):
        break_off(place, whole, records)
        assert merge(place, models, "--resume", **settings) == 0
        assert differing(digest(whole), digest(place / "out")) <= OWN
        (place / "out").rename(place / f"resumed{records}")
    replay = ["--replay", str(whole), "--output", str(place / "again"), "--source", str(models[0].parent)]
    assert merge_monster.main(replay) == 0
    assert digest(whole)["model.safetensors"] == digest(place / "again")["model.safetensors"]


@pytest.mark.parametrize("more", [0, 1])
def test_broken_off_beside_the_winning_decision_it_ends_in_the_same_bits(place, tmp_path, more):
    """Of float32 checkpoints, whose numbers round otherwise in the two types. more: decisions behind that one."""
    models = make_models(tmp_path / "wide", torch.float32)
    larger_mlp(models[1], 0, 3000)
    settings = {"merge_ratios": [0.5, 1.0], "min_gain": 0}
    assert merge(place, models, **settings) == 0
    whole = place / "whole"
    (place / "out").rename(whole)
    break_off(place, whole, widening(whole) + 1 + more)
    assert merge(place, models, "--resume", **settings) == 0
    assert differing(digest(whole), digest(place / "out")) <= OWN


def test_an_explicit_type_is_refused_where_a_run_was_widened(place, models, capsys):
    larger_mlp(models[1], 1, 3000)
    settings = {"merge_ratios": [0.5, 1.0], "min_gain": 0}
    assert merge(place, models, **settings) == 0
    whole = place / "whole"
    (place / "out").rename(whole)
    break_off(place, whole, widening(whole) + 2)
    assert merge(place, models, "--resume", compute_dtype="float16", **settings) == 2
    assert "compute_dtype" in capsys.readouterr().err
    assert merge(place, models, "--resume", compute_dtype=WIDE, **settings) == 0


def test_texts_are_drawn_in_the_wide_arithmetic_where_float16_overflows(place, models):
    overflows_on(models[0], "z")
    (place / "prompts.txt").write_text("a lazy zebra\n")
    settings = {"discover": {"prompts": str(place / "prompts.txt"), "samples": 1, "tokens": 4}}
    path = tiny.write_config(place / "my.yaml", models[0], models[1:], place / "out", **settings)
    assert monster_mapper.main(["--config", str(path), "--rate", str(models[1]), "--json", str(place / "r.json")]) == 0
    assert "NaN" not in (place / "r.json").read_text()


def test_experts_that_only_another_type_can_compute(place, tmp_path):
    """Their products know no type but their weights': what overflows in a trial begins the whole run again."""
    folder = tmp_path / "experts"
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", configuration("Mixtral", len(tokenizer)), tokenizer, dtype=torch.bfloat16)
    one = tiny.make_candidate(folder / "one", base, 1)

    def louder(tensors):
        for name in tensors:
            if ".layers.1." in name and ".experts." in name:
                tensors[name] = tensors[name] * 300

    tiny.edit_checkpoint(one, louder)
    assert merge(place, (base, one), merge_ratios=[1.0]) == 0
    assert all(map(math.isfinite, numbers_in(recipe_of(place / "out"))))


def test_a_candidate_with_a_weight_beyond_float16(place, models):
    edited(
        models[2], "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), 1e5)
    )
    assert merge(place, models) == 0
    assert is_wide(place, "two: model.layers.1.mlp.down_proj.weight", " recorded decisions")
    first = [line for line in decisions(place / "out") if line[0] == 1]
    assert len(first) == 4


def test_a_joint_search_that_overflows(place, models):
    larger_mlp(models[1], 1, 3000)
    assert merge(place, models, search="joint", joint={"steps": 3}, drift_weight=0) == 0
    assert is_wide(place)


def test_a_candidate_whole_that_overflows_has_its_row(place, models):
    larger_mlp(models[1], 1, 3000)
    assert merge(place, models, baselines=True, min_gain=1e9) == 0
    (first, _) = recipe_of(place / "out")["baselines"].values()
    assert math.isfinite(first["total"])


# -- the arithmetic itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", WIDE, "float16+float32"])
def test_a_name_says_the_arithmetic(name):
    arithmetic = Arithmetic.named(name)
    assert arithmetic.name == name
    assert arithmetic.stream == (torch.float32 if "float32" in name else getattr(torch, name))


def test_the_fallback_is_what_the_docs_say():
    assert Arithmetic.named(WIDE) == FALLBACK
