"""The whole program, from the YAML file to the reopened output."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import tiny
import torch
from project import ROOT, environment
from runs import digest, log_of, make_models, merge, refused, stored, tables
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
from modules.output.journal import open_journal

# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------

REOPEN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import reference, tiny
model, tokenizer = reference.load(sys.argv[1], "auto"), AutoTokenizer.from_pretrained(sys.argv[1])
model = model.float()
print(json.dumps([reference.log_probability(model, tokenizer, p.context, p.phrase) for p in tiny.PAIRS]))
ids = tokenizer("The apple", return_tensors="pt")
assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
"""


def reopened_probabilities(folder):
    """The pairs' probabilities in percent, by plain forwards in a process that knows nothing of the run."""
    command = [sys.executable, "-c", REOPEN, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    return [100 * torch.tensor(value).exp().item() for value in json.loads(result.stdout)]


@pytest.mark.slow  # together, for many runs: test_architectures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reopening_the_output_gives_the_last_table(place, dtype):
    models = make_models(place, dtype)
    assert merge(place, models) == 0
    shown = [float(row[3].rstrip("%")) for row in tables(log_of(place))[-1][:-1]]
    assert shown == pytest.approx(reopened_probabilities(place / "out"), rel=1e-4, abs=1e-5)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bpe", "spm"])
def test_a_run_on_the_output_begins_with_the_last_table(place, dtype, setting, family):
    """The program's own scorer, in the run's own dtype: to the printed digit."""
    base, one, two = make_models(place / "models", dtype, family)
    assert merge(place, (base, one, two), dtype=setting) == 0
    last = [row[3] for row in tables(log_of(place))[-1]]
    assert "CHANGED" in log_of(place)
    (place / "again").mkdir()
    path = tiny.write_config(place / "again.yaml", place / "out", [one], place / "again/out", dtype=setting)
    assert merge_monster.main(["--config", str(path)]) == 0
    # Rounding was measured anew: one of the two may have more digits.
    for now, then in zip((row[3].rstrip("%") for row in tables(log_of(place))[0]), last, strict=True):
        digits = min(len(text.partition(".")[2]) for text in (now, then.rstrip("%")))
        assert f"{float(now):.{digits}f}" == f"{float(then.rstrip('%')):.{digits}f}"


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", [None, "60KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_output_has_the_bases_tensors_and_files(place, dtype, shard, tied):
    base, one, two = make_models(place, dtype, shard=shard, tied=tied)
    assert merge(place, (base, one, two)) == 0
    assert stored(place / "out") == stored(base)
    ours = {"merge_monster.yaml", "merge_monster_recipe.json", "merge_monster_journal.jsonl"}
    ours |= {"README.md", "merge_map.png", "phrase_chart.png"}
    assert {path.name for path in base.iterdir()} | ours == {path.name for path in (place / "out").iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (place / "out" / name).read_bytes() == (base / name).read_bytes()
    if shard:
        index = json.loads((place / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(place / "out")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert not (place / "out.partial").exists()


def test_the_output_is_the_mixture_that_the_log_tells(place, models):
    """Read the accepted ratios off the log, mix the checkpoints by hand, compare with what was saved."""
    base, one, two = models
    assert merge(place, models) == 0
    log = log_of(place)
    tensors = load_file(base / "model.safetensors")
    for number, folder in enumerate((one, two), start=1):
        section = log.split(f"Candidate {number}/2")[1]
        other = load_file(folder / "model.safetensors")
        merges = re.findall(r"^\[\[1\.0, 'base'\](.*)\]\n[\d:]+ - (?:Layer (\d)/3|Header) - (\w+)", section, re.M)
        assert len(merges) >= 4
        for accepted, layer, outcome in merges[:4]:
            if outcome == "CHANGED":
                share = float(re.findall(r"\[([\d.]+), '", accepted)[-1])
                names = [f"model.layers.{int(layer) - 1}."] if layer else ["model.embed_tokens.", "lm_head."]
                for name in tensors:
                    if name.startswith(tuple(names)):
                        tensors[name] = torch.lerp(tensors[name], other[name], share)
    saved = load_file(place / "out/model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_the_model_has_no_use_for_are_saved_as_they_are(place):
    """Wherever they stand in their file, and whatever they hold: they are the base's own."""
    models = make_models(place)
    tensors = load_file(models[0] / "model.safetensors")
    # A file's tensors are sorted by size and name: the first is larger than all others, the last smaller.
    more = {"a_large_one": torch.full((500, 64), torch.nan), "z.small": torch.full((1,), torch.inf)}
    save_file({**more, **tensors}, models[0] / "model.safetensors", metadata={"format": "pt"})
    assert merge(place, models) == 0
    saved = load_file(place / "out/model.safetensors")
    assert all(torch.equal(saved[name].nan_to_num(7.0), tensor.nan_to_num(7.0)) for name, tensor in more.items())
    assert stored(place / "out") == stored(models[0])


def test_a_tied_head_that_is_stored_beside_its_embedding(place):
    models = make_models(place, tied=True)
    tensors = load_file(models[0] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, models[0] / "model.safetensors", metadata={"format": "pt"})
    assert merge(place, models) == 0
    saved = load_file(place / "out/model.safetensors")
    assert stored(place / "out") == stored(models[0])
    assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_pairs_that_the_base_cannot_take(place, models, capsys):
    pairs = (tiny.Pair("BAD", "spine", "down her " * 200),)
    refused(place, models, capsys, "tokens long, but the base model takes 256", pairs=pairs)


def test_an_explicit_dtype_is_what_is_saved(place, models):
    assert merge(place, models, dtype="bfloat16") == 0
    assert {dtype for dtype, _ in stored(place / "out").values()} == {"BF16"}
    ours, base = (json.loads((folder / "config.json").read_text()) for folder in (place / "out", models[0]))
    assert {key for key in ours if ours[key] != base[key]} == {"dtype"} and ours["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(place / "out").dtype == torch.bfloat16


def test_the_same_config_gives_the_same_bits(place, models):
    assert merge(place, models, merge_method=["slerp", "cyclic"]) == 0
    first = digest(place / "out")
    assert merge(place, models, "--overwrite", merge_method=["slerp", "cyclic"]) == 0
    timed = {"merge_monster_recipe.json", "merge_monster_journal.jsonl"}  # they say how long it took
    second = digest(place / "out")
    assert first.keys() == second.keys() and {name for name in first if first[name] != second[name]} <= timed


def test_console_and_log(place, models, capsys):
    before = {folder: digest(folder) for folder in models}
    assert merge(place, models, merge_headers=True) == 0
    output, log = capsys.readouterr().out, log_of(place)
    places = "".join(f"{folder.name} is {folder}\n" for folder in models)  # which only the log says
    assert places in log and output == log.replace(places, "")
    for line in ("THE MERGE MONSTER HUNGERS", ", layout forest", "Strategy         : cumulative"):
        assert line in log
    decision = r"""^\[\[1\.0, 'base'\](, \[0\.\d, '(one|two)'\])*\]
\d\d:\d\d:\d\d - (Layer [123]/3|Header) - (CHANGED - -?\d+\.\d{5} > -?\d+\.\d{5} - [\d.]+%|RETAINED - -?\d+\.\d{5})
----$"""
    assert len(re.findall(decision, log, re.MULTILINE)) == 8
    assert len(tables(log)) == 3
    assert all(row[5] == "N/A" for row in tables(log)[0])
    shares = [float(share) for share in re.findall(r"^ *([\d.]+)%  (?:base|one|two)$", log, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert before == {folder: digest(folder) for folder in models}


@pytest.mark.parametrize("kind", ["full", "changed", "summary"])
def test_how_much_of_the_tables_is_shown(place, models, capsys, kind):
    """The log has the first and the last one whole."""
    assert merge(place, models, "--table", kind) == 0
    shown, logged = tables(capsys.readouterr().out), tables(log_of(place))
    whole = len(tiny.PAIRS) + 1
    assert [len(table) for table in logged] == [whole, len(shown[1]), whole]
    assert [table[-1] for table in shown] == [table[-1] for table in logged]
    for table, of_log in zip(shown, logged, strict=True):
        assert all(row in of_log for row in table)
    if kind == "full":
        assert shown == logged
    elif kind == "summary":
        assert [len(table) for table in shown] == [1, 1, 1]
    else:
        last = [row for row in logged[2][:-1] if abs(float(row[5].rstrip("%"))) > 0.005]
        assert len(shown[0]) == 1 and shown[2][:-1] == last


def test_phrases_that_are_listed_twice_are_told_before_the_search(place, models):
    for arguments in (["--dry-run"], []):
        assert merge(place, models, *arguments, pairs=(*tiny.PAIRS, tiny.PAIRS[0])) == 0
        told = "WARNING: the phrase 'anticipation' after 'Her body quivers with ' is listed twice and counts double\n"
        assert log_of(place).count(told) == 1


def test_a_kind_of_table_that_there_is_not(place, models, capsys):
    with pytest.raises(SystemExit):
        merge(place, models, "--table", "some")
    assert "argument --table: invalid choice: 'some'" in capsys.readouterr().err


def test_methods_are_named_where_there_are_several(place, models):
    assert merge(place, models, merge_method=["lerp", "slice"]) == 0
    assert len(re.findall(r"Layer \d/3 - .* - (?:lerp|slice)$", log_of(place), re.MULTILINE)) == 12


def test_quantitive_and_all_phrases_run(place, models):
    for strategy in ("quantitive", "quantitative", "all_phrases"):
        assert merge(place, models, "--overwrite", strategy=strategy) == 0


def test_model_directory_is_scanned_alphabetically_without_base_and_output(place):
    folder = place / "models"
    make_models(folder)
    (folder / ".hidden").mkdir()
    (folder / "notes").mkdir()
    settings = {
        "models_to_merge": [],
        "directories": {
            "model_path1": str(folder / "base"),
            "model_directory": str(folder),
            "output_directory": str(folder / "out"),
        },
    }
    for arguments in ([], ["--overwrite"]):
        assert merge(place, (folder / "base",), *arguments, **settings) == 0
        log = log_of(place)
        assert "Models to merge  : one, two\n" in log
        assert "base is the base model; skipped" in log
        assert "notes contains no model (config.json is missing); skipped" in log
    assert "out is the output directory; skipped" in log


def test_the_base_among_the_candidates_is_skipped_by_resolved_path(place, models):
    base, one, _ = models
    (place / "link").symlink_to(base)
    assert merge(place, (base, place / "link", one)) == 0
    assert "link is the base model; skipped" in log_of(place)
    assert "Models to merge  : one\n" in log_of(place)


def test_models_of_one_name_are_told_apart(place, models):
    base, one, two = models
    shutil.copytree(one, place / "a/model")
    shutil.copytree(two, place / "b/model")
    assert merge(place, (base, place / "a/model", place / "b/model")) == 0
    assert "Models to merge  : a/model, b/model\n" in log_of(place)
    assert "'a/model']" in log_of(place)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and loses nothing
# ---------------------------------------------------------------------------------------------------------------------


def other_model(place, models, **changes):
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    return tiny.make_model(place / "other", tiny.llama_config(len(tokenizer), **changes), tokenizer)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layers": 2}, "num_hidden_layers is 2 (base: 3)"),
        ({"hidden": 48}, "hidden_size is 48 (base: 32)"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_candidate_of_another_shape(place, models, capsys, changes, words):
    other = other_model(place, models, **changes)
    refused(place, (models[0], models[1], other), capsys, [words, str(other)])


def test_a_candidate_of_another_architecture(place, models, capsys):
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    other = tiny.make_model(place / "gpt", tiny.gpt2_config(len(tokenizer)), tokenizer)
    refused(place, (models[0], other), capsys, "architecture is gpt2, the base's is llama")


def test_all_unfit_candidates_are_named_at_once(place, models, capsys):
    other = other_model(place, models, layers=2)
    (place / "empty").mkdir()
    refused(place, (models[0], other, place / "empty"), capsys, ["num_hidden_layers", "empty: not a model folder"])


def copy_with(models, place, change):
    """A copy of the first candidate whose tensors are changed."""
    folder = tiny.make_candidate(place / "changed", models[0], 1)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_missing_tensors(place, models, capsys):
    other = copy_with(models, place, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(place, (models[0], other), capsys, "missing tensors model.layers.1.mlp.up_proj.weight")


def test_tensors_of_another_shape(place, models, capsys):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)

    other = copy_with(models, place, change)
    refused(place, (models[0], other), capsys, "up_proj.weight has shape (3, 32), the base's has (64, 32)")


def test_tensors_of_another_kind(place, models, capsys):
    def change(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    other = copy_with(models, place, change)
    refused(place, (models[0], other), capsys, "up_proj.weight is stored as torch.int8")


def test_an_empty_head_leaves_the_header_alone(place, models):
    def change(tensors):
        tensors["lm_head.weight"] = torch.zeros(0, 32)

    assert merge(place, (models[0], copy_with(models, place, change))) == 0
    assert "WARNING: changed's lm_head.weight has shape (0, 32)" in log_of(place)


def test_nan_in_a_candidate_is_a_warning(place, models):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan

    other = copy_with(models, place, change)
    assert merge(place, (models[0], other)) == 0
    assert "WARNING: changed: model.layers.0.mlp.up_proj.weight holds NaN or infinite values" in log_of(place)
    assert all(torch.isfinite(t).all() for t in load_file(place / "out/model.safetensors").values())


def test_nan_in_the_base_is_an_error(place, models, capsys):
    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan

    bad = copy_with(models, place, change)
    refused(place, (bad, models[1]), capsys, "model.layers.2.mlp.up_proj.weight holds NaN or infinite values")


def test_a_cast_that_overflows_names_the_tensor(place, models, capsys):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5

    other = copy_with(models, place, change)
    words = ["model.layers.1.mlp.up_proj.weight", "1e+05", "too large for float16", "dtype: bfloat16"]
    refused(place, (models[0], other), capsys, words, code=1, dtype="float16")
    words = ["model.layers.1.mlp.up_proj.weight overflows in float16", "dtype: bfloat16"]
    refused(place, (other, models[1]), capsys, words, dtype="float16")
    # Computed in float32 on a CPU, but saved as float16.
    half = make_models(place / "half", torch.float16)[0]
    refused(place, (half, other), capsys, ["too large for float16", "dtype: bfloat16"], code=1)


def test_missing_weights_in_the_base(place, models, capsys):
    bad = copy_with(models, place, lambda tensors: tensors.pop("model.norm.weight"))
    refused(place, (bad, models[1]), capsys, "model.norm.weight")


def test_a_base_whose_config_does_not_fit_its_weights(place, models, capsys):
    for number, (changes, words) in enumerate(
        (
            ({"vocab_size": 700}, "has shape (400, 32), but config.json says (700, 32)"),
            ({"hidden_act": "nosuch"}, "can't be loaded: KeyError"),
        )
    ):
        bad = tiny.make_candidate(place / f"bad{number}", models[0], 1)
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, **changes}))
        refused(place, (bad, models[1]), capsys, words)


def test_broken_checkpoints(place, models, capsys):
    for number, (name, content, words) in enumerate(
        (
            ("config.json", b"{", "config.json can't be used"),
            ("config.json", b'{"model_type": "no_such_model"}', "config.json can't be used"),
            ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "config.json can't be used"),
            ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}', "config.json can't be used"),
            ("model.safetensors", b"not a checkpoint", "model.safetensors: can't be read"),
        )
    ):
        broken = tiny.make_candidate(place / f"broken{number}", models[0], 1)
        (broken / name).write_bytes(content)
        refused(place, (models[0], broken), capsys, words)


def test_indexes_that_lead_elsewhere(place, models, capsys):
    for number, (index, words) in enumerate(
        (
            ({"weight_map": {"x": "../one/model.safetensors"}}, "is not a plain file name"),
            ({"weight_map": {"x": "/etc/passwd"}}, "is not a plain file name"),
            ({"weight_map": {"x": "absent.safetensors"}}, "the shard absent.safetensors is missing"),
            ({"weight_map": [1]}, "not a valid shard index"),
            ({}, "not a valid shard index"),
        )
    ):
        broken = tiny.make_candidate(place / f"broken{number}", models[0], 1)
        (broken / "model.safetensors").unlink()
        (broken / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(place, (models[0], broken), capsys, words)


def test_a_quantised_candidate(place, models, capsys):
    other = tiny.make_candidate(place / "quantised", models[0], 1)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    refused(place, (models[0], other), capsys, "quantized (quantization_config in config.json)")


def test_a_base_without_tokenizer(place, models, capsys):
    bare = place / "bare"
    AutoModelForCausalLM.from_pretrained(models[0]).save_pretrained(bare)
    refused(place, (bare, models[1]), capsys, "no usable tokenizer")


def test_only_the_base_as_candidate(place, models, capsys):
    refused(place, (models[0], models[0]), capsys, "no candidates to merge")


def test_a_device_that_is_not_there(place, models, capsys):
    absent = "mps" if not torch.backends.mps.is_available() else "cuda:7"
    refused(place, models, capsys, [f"'{absent}' is not available", "cpu"], "--device", absent)


def test_an_output_that_is_or_contains_an_input(place, models, capsys):
    base, one, _ = models
    before = digest(base)
    for output, words in ((base, "is the input"), (base.parent, "contains the input")):
        for arguments in ([], ["--overwrite"]):
            assert merge(place, models, "--output", str(output), *arguments) == 2
            assert words in capsys.readouterr().err
    assert digest(base) == before and one.exists()


def test_an_output_that_is_not_empty(place, models, capsys):
    (place / "out").mkdir()
    assert merge(place, models) == 0  # an empty folder is fine
    first = digest(place / "out")
    assert merge(place, models) == 2
    assert "is not empty" in capsys.readouterr().err
    assert digest(place / "out") == first
    assert merge(place, models, "--overwrite", merge_ratios=[0.3]) == 0
    assert digest(place / "out") != first
    assert sorted(path.name for path in place.iterdir()) == ["logs", "my.yaml", "out"]


def test_overwrite_deletes_nothing_but_earlier_outputs(place, models, capsys):
    (place / "out").mkdir()
    (place / "out/thesis.tex").write_text("years of work")
    assert merge(place, models, "--overwrite") == 2
    assert "was not written by Merge Monster" in capsys.readouterr().err
    assert merge(place, models, "--overwrite", "--output", ".") == 2
    assert (place / "out/thesis.tex").read_text() == "years of work"


def test_folders_beside_the_output_are_nobodys_business(place, models):
    assert merge(place, models) == 0
    shutil.copytree(place / "out", place / "out.old")
    before = digest(place / "out.old")
    assert merge(place, models, "--overwrite", merge_ratios=[0.3]) == 0
    assert digest(place / "out.old") == before
    assert sorted(path.name for path in place.iterdir()) == ["logs", "my.yaml", "out", "out.old"]


def test_an_old_output_comes_back_if_the_new_one_cannot_take_its_place(place, models, capsys, monkeypatch):
    assert merge(place, models) == 0
    first, rename = digest(place / "out"), Path.rename

    def failing(self, target):
        if self.name == "out.partial":
            raise OSError(5, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert merge(place, models, "--overwrite", merge_ratios=[0.3]) == 1
    error = capsys.readouterr().err
    assert "out.partial: Input/output error" in error and "was not changed" in error
    assert digest(place / "out") == first
    assert sorted(path.name for path in place.iterdir()) == ["logs", "my.yaml", "out", "out.partial"]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert merge(place, models, "--overwrite", "--resume", merge_ratios=[0.3]) == 0
    assert digest(place / "out") != first
    assert sorted(path.name for path in place.iterdir()) == ["logs", "my.yaml", "out"]


def test_an_output_that_is_a_file(place, models, capsys):
    (place / "out").write_text("mine")
    assert merge(place, models) == 2
    assert "is a file" in capsys.readouterr().err
    assert (place / "out").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that nobody can write to")
def test_an_output_that_cannot_be_written(place, models, capsys):
    refused(place, models, capsys, "can't write the output directory /proc/merged", "--output", "/proc/merged")
    (place / "file").write_text("")
    refused(place, models, capsys, "can't write the output directory", "--output", str(place / "file/merged"))


def test_a_folder_of_somebody_else_in_the_place_of_the_partial_one(place, models, capsys):
    (place / "out.partial").mkdir()
    (place / "out.partial/thesis.tex").write_text("years of work")
    for arguments in ([], ["--resume"], ["--restart"]):
        assert merge(place, models, *arguments) == 2
        assert "out.partial was not written by Merge Monster" in capsys.readouterr().err
    assert (place / "out.partial/thesis.tex").read_text() == "years of work"
    (place / "out.partial/thesis.tex").unlink()
    assert merge(place, models) == 0  # an empty one is in nobody's way


def test_a_save_that_fails_keeps_the_old_output(place, models, capsys, monkeypatch):
    assert merge(place, models) == 0
    first = digest(place / "out")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modules.checkpoints.writing._reads", full)
    assert merge(place, models, "--overwrite", merge_ratios=[0.3]) == 1
    message = capsys.readouterr().err
    assert "can't be written" in message and "No space left on device" in message and "Traceback" not in message
    assert digest(place / "out") == first
    assert "is saved in" in message and "--resume" in message
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert merge(place, models, "--overwrite", "--resume", merge_ratios=[0.3]) == 0
    assert digest(place / "out") != first and not (place / "out.partial").exists()


@pytest.mark.parametrize("broken", ["merge_map", "phrase_chart", "write_card"])
def test_a_picture_that_fails_costs_nothing_else(place, models, capsys, monkeypatch, broken):
    def failing(*_arguments):
        full("/dev/full")

    monkeypatch.setattr(f"modules.run.steps.{broken}", failing)
    assert merge(place, models, merge_ratios=[0.5]) == 0
    file = {"write_card": "README.md"}.get(broken, f"{broken}.png")
    assert f"WARNING: could not make {file} ([Errno 28] No space left on device" in capsys.readouterr().out
    others = {"merge_map.png", "phrase_chart.png", "README.md", "merge_monster_recipe.json"} - {file}
    names = {path.name for path in (place / "out").iterdir()}
    assert others <= names and file not in names
    if broken != "write_card":
        card = (place / "out" / "README.md").read_text()
        assert [f"]({name})" in card for name in sorted(others - {"README.md"}) if name.endswith("png")] == [True]
        assert f"]({file})" not in card


def full(path):
    """As if the disk had no room for this file."""
    with open("/dev/full", "w") as file:
        file.write(str(path))


FILES = ["merge_monster.yaml", "merge_monster_recipe.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_names_the_file(place, models, capsys, monkeypatch, name):
    real = io.open

    def opened(file, mode="r", *arguments, **options):
        writes = "r" not in mode and os.path.basename(str(file)) == name
        return real("/dev/full" if writes else file, mode, *arguments, **options)

    monkeypatch.setattr("io.open", opened)
    assert merge(place, models, merge_ratios=[0.5]) == 1
    assert f"ERROR: {place / 'out.partial' / name}: No space left on device\n" in capsys.readouterr().err


def test_a_journal_on_a_full_disk_is_named(place):
    with contextlib.closing(open_journal(place / "journal")) as journal:
        journal._file.close()
        journal._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError) as error:
            journal.append("run")
    assert error.value.filename == str(place / "journal") and journal.records == []


def test_strangers_names_are_shown_without_effect(place, models, capsys):
    """Names of folders, what is in their files, and library errors on them; on terminal, log and card."""
    base, one, _ = models
    evil = "\x1b]0;FORGED\x07\nFORGED Done.\u202e"
    for name, change in {
        "a": {},
        "b": {"model_type": evil},
        "c": {"quantization_config": {"quant_method": evil}},
    }.items():
        folder = shutil.copytree(one, place / "models" / f"{name}{evil}")
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **change}))
    for code, kept in ((2, "abc"), (0, "a")):
        for folder in list((place / "models").iterdir()):
            if folder.name[0] not in kept:
                shutil.rmtree(folder)
        directories = {"model_path1": str(base), "output_directory": evil, "model_directory": str(place / "models")}
        path = tiny.write_config(place / "my.yaml", base, [], evil, directories=directories, merge_ratios=[0.5])
        assert merge_monster.main(["--config", str(path)]) == code
        card = [(place / evil / "README.md").read_text(encoding="utf-8")] if code == 0 else []
        for text in ("".join(capsys.readouterr()), log_of(place), *card):
            assert "FORGED" in text and not re.search(r"(?m)^FORGED|[\x07\x1b\u202e]", text), text


@pytest.mark.parametrize("program", ["merge_monster", "monster_mapper"])
def test_ctrl_c_during_the_first_imports(place, program):
    hook = f"""
import builtins, runpy, sys
real = builtins.__import__
def importing(name, *rest):
    if name == "modules.runtime.console":
        raise KeyboardInterrupt
    return real(name, *rest)
builtins.__import__ = importing
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / program)!r} + ".py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", hook], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_logs_that_cannot_be_written(place, models, capsys):
    (place / "logs").write_text("")
    assert merge(place, models) == 2
    assert "can't write the log to" in capsys.readouterr().err


@pytest.mark.slow  # in this process: test_resume
def test_ctrl_c_ends_with_130_after_the_decision(place, models):
    base, one, two = models
    ratios = [number / 200 for number in range(200)]
    path = tiny.write_config(place / "my.yaml", base, [one, two], place / "out", merge_ratios=ratios)
    command = [sys.executable, "-u", str(ROOT / "merge_monster.py"), "--config", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if "Candidate 1/2" in line:
                child.send_signal(signal.SIGINT)
                break
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Stopping after this step; press Ctrl-C again" in errors
    assert "Interrupted. Nothing was written to" in errors and "--resume" in errors and "Traceback" not in errors
    assert not (place / "out").exists()
    kinds = [json.loads(line)["kind"] for line in (place / "out.partial/merge_monster_journal.jsonl").open()]
    assert kinds == ["run", "source", "start", "source", "decision"]


def test_custom_code_is_not_run_unless_trusted(place, models, capsys):
    other = tiny.make_candidate(place / "custom", models[0], 1)
    config = json.loads((other / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (other / "config.json").write_text(json.dumps(config))
    (other / "own.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")
    refused(place, (models[0], other), capsys, "config.json can't be used")
    assert not (place / "ran").exists()


def test_reference_and_program_agree_on_the_whole_output(place, models):
    base, one, two = models
    assert merge(place, models, merge_method=["slerp", "gradient"]) == 0
    twin = reference.NaiveMerge(
        str(base), [str(one), str(two)], list(tiny.PAIRS), [0.2, 0.4, 0.6, 0.8], ["slerp", "gradient"]
    ).run()
    saved = AutoModelForCausalLM.from_pretrained(place / "out").state_dict()
    for name, tensor in twin.model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-5, rtol=1e-5)
