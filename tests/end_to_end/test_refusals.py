"""What is refused names its true cause, as base and as candidate; what only looks wrong is read all the same."""

import contextlib
import io
import json
import shutil

import architectures
import pytest
import tiny
import torch
from adapters import make_bench
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import merge_monster
import monster_mapper
from modules.checkpoints.architecture import settle_attention
from modules.checkpoints.candidate import check_configuration
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.model.loading import load_model
from modules.runtime.errors import ConfigError

ONE, BIN, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 4976698672\n" % (b"a" * 64)
PAGE = b"<!DOCTYPE html>\n<html><head><title>429</title>" + b" " * 3000
QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
ROLES = ("base", "one")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A base, a candidate and an adapter, and nothing that is changed by a test."""
    return make_bench(tmp_path_factory.mktemp("bench"))


def put(file, content, *without):
    """One file of other content, and some removed."""

    def change(folder):
        for name in without:
            (folder / name).unlink()
        (folder / file).write_bytes(content)

    return change


def cut(file, share):
    def change(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return change


def tensors(change, **settings):
    """Tensors by other names, of other values or numbers."""

    def edit(folder):
        found = change(load_file(folder / ONE))
        (folder / ONE).unlink()
        save_file({name: tensor.clone() for name, tensor in found.items()}, folder / ONE, metadata={"format": "pt"})
        tiny.edit_checkpoint(folder, **settings)

    return edit


def renamed(change):
    return tensors(lambda found: {change(name): tensor for name, tensor in found.items()})


def settings(**changes):
    return lambda folder: tiny.edit_checkpoint(folder, **changes)


def instead(*files, config=True):
    """Weights in another format, in place of ours."""

    def change(folder):
        (folder / ONE).unlink()
        if not config:
            (folder / "config.json").unlink()
        for file in files:
            (folder / file).write_bytes(b"x" * 2000)

    return change


def as_bin(folder):
    tiny.save_as_bin(folder)


def both(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def layers(count):
    """So many layers in the file, whatever config.json says."""

    def change(found):
        rest = {name: tensor for name, tensor in found.items() if ".layers." not in name}
        first = {name: tensor for name, tensor in found.items() if ".layers.0." in name}
        return rest | {n.replace(".0.", f".{i}."): t for i in range(count) for n, t in first.items()}

    return tensors(change)


def shards(folder):
    """Two shards; every other tensor is in the second."""
    found = load_file(folder / ONE)
    (folder / ONE).unlink()
    where = {name: (FIRST, SECOND)[number % 2] for number, name in enumerate(sorted(found))}
    for file in (FIRST, SECOND):
        save_file(
            {n: found[n] for n, shard in where.items() if shard == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def lacking(name):
    """A tensor that the index names is not in its shard."""

    def change(folder):
        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        found = load_file(folder / file)
        del found[name]
        save_file(found, folder / file, metadata={"format": "pt"})

    return change


def deeper(folder):
    shutil.copytree(folder, folder / "inner" / "model")
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.unlink()


def gptq(found):
    return {
        name.replace("weight", "qweight") if "proj" in name else name: t.int() if "proj" in name else t
        for name, t in found.items()
    }


def float8(found):
    return {name: t.to(torch.float8_e4m3fn) if t.dim() > 1 else t for name, t in found.items()}


def unmerged(found):
    wrapped = {name.replace("proj.weight", "proj.base_layer.weight"): tensor for name, tensor in found.items()}
    return wrapped | {"model.layers.0.mlp.up_proj.lora_A.default.weight": torch.ones(2, 16)}


def two_models(found):
    return {f"{whose}.{name}": tensor for name, tensor in found.items() for whose in ("actor", "critic")}


LFS = ["is a git-LFS pointer", "git lfs pull"]
NO_WEIGHTS = "no model weights; looked for model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"

REFUSED = {
    "a pointer for weights": (put(ONE, POINTER), [ONE, *LFS]),
    "a pointer for .bin": (put(BIN, POINTER, ONE), [BIN, *LFS]),
    "a pointer for a shard": (both(shards, put(SECOND, POINTER)), [SECOND, *LFS]),
    "a pointer for the index": (both(shards, put(INDEX, POINTER)), [INDEX, *LFS]),
    "a pointer for config.json": (put("config.json", POINTER), ["config.json", *LFS]),
    "a pointer for tokenizer.json": (put("tokenizer.json", POINTER), ["tokenizer.json", *LFS]),
    "a pointer for tokenizer.model": (put("tokenizer.model", POINTER), ["tokenizer.model", *LFS]),
    "a page for weights": (put(ONE, PAGE), [ONE, "web page", "download it again"]),
    "a page for .bin": (put(BIN, PAGE, ONE), [BIN, "web page"]),
    "a page for config.json": (put("config.json", PAGE), ["config.json", "web page"]),
    "JSON for weights": (put(ONE, b'{"error": "Not Found"}'), [ONE, "can't be read"]),
    "text for .bin": (put(BIN, b"Entry not found", ONE), [BIN]),
    "nothing for weights": (put(ONE, b""), [ONE, "is empty"]),
    "nothing for .bin": (put(BIN, b"", ONE), [BIN, "is empty"]),
    "nothing for config.json": (put("config.json", b""), ["config.json", "is empty"]),
    "zeros for weights": (put(ONE, bytes(5000)), [ONE, "zeros"]),
    "GGUF for weights": (put(ONE, b"GGUF\3\0\0\0" + bytes(99)), [ONE, "can't be read"]),
    "a .bin as .safetensors": (both(as_bin, lambda f: (f / BIN).rename(f / ONE)), [ONE, "can't be read"]),
    "safetensors as .bin": (lambda f: (f / ONE).rename(f / BIN), [BIN]),
    "half the weights": (cut(ONE, 0.5), [ONE, "truncated", "bytes"]),
    "half the header": (cut(ONE, 0.01), [ONE, "truncated"]),
    "half a .bin": (both(as_bin, cut(BIN, 0.5)), [BIN, "truncated"]),
    "half a shard": (both(shards, cut(SECOND, 0.5)), [SECOND, "truncated"]),
    "a missing shard": (both(shards, lambda f: (f / SECOND).unlink()), [f"the shard {SECOND} is missing"]),
    "a shard that lacks a tensor": (both(shards, lacking(UP)), [UP]),
    "shards without their index": (both(shards, lambda f: (f / INDEX).unlink()), [NO_WEIGHTS, FIRST]),
    "a quantised model": (tensors(gptq, **QUANTISED), ["quantized", "quantization_config"]),
    "quantised, but not by its settings": (tensors(gptq), ["qweight", "quantized"]),
    "float8": (tensors(float8), ["F8_E4M3", "quantized"]),
    "plain weights, said to be quantised": (settings(**QUANTISED), ["quantized", "quantization_config"]),
    "the same, a part of config.json": (settings(text_config=QUANTISED), ["text_config.quantization_config"]),
    "GGUF": (instead("a.Q4_K_M.gguf"), [NO_WEIGHTS, "found a.Q4_K_M.gguf"]),
    "GGUF alone": (instead("a.gguf", config=False), ["config.json is missing", "found a.gguf"]),
    "Meta's own format": (instead("consolidated.00.pth", "params.json"), ["consolidated.00.pth"]),
    "an adapter's weights": (instead("adapter_model.safetensors"), [NO_WEIGHTS, "adapter_model.safetensors"]),
    "what a training run left": (instead("training_args.bin", "optimizer.pt"), [NO_WEIGHTS]),
    "a folder too high": (deeper, ["config.json is missing"]),
    "an adapter's settings": (put("config.json", b'{"peft_type": "LORA"}'), ["config.json"]),
    "more layers": (layers(4), ["model.layers.2.", "num_hidden_layers is 2"]),
    "fewer layers": (layers(1), ["missing tensors model.layers.1."]),
    "other names": (
        renamed(lambda name: f"x{name.replace('.', '_')}"),
        ["missing tensors model.layers.0.", "unexpected tensors xlm_head_weight"],
    ),
    "an adapter that was not merged": (tensors(unmerged), ["missing tensors", "base_layer"]),
    "two models in one": (tensors(two_models), ["'actor.'", "'critic.'"]),
}


def ended(bench, place, role, change, program=merge_monster, *options):
    """Run the program on a bench of which one model was changed: its exit code and all that it says."""
    models = {name: bench / name for name in ROLES}
    models[role] = shutil.copytree(models[role], place / role)
    change(models[role])
    more = {"merge_ratios": [0.5], "pairs": tiny.PAIRS[:2]}
    config = tiny.write_config(place / "my.yaml", models["base"], [models["one"]], place / "out", **more)
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.chdir(place)
        code = program.main(["--config", str(config), *options])
    return code, output.getvalue()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_its_cause(bench, tmp_path, name, role):
    change, words = REFUSED[name]
    code, said = ended(bench, tmp_path, role, change, merge_monster, "--quiet", "--dry-run")
    assert code == 2 and "Traceback" not in said
    assert f"ERROR: {tmp_path / role}" in said
    for word in words:
        assert word in said, said
    if name == "what a training run left":
        assert "found" not in said


@pytest.mark.parametrize("name", ["a pointer for weights", "more layers", "plain weights, said to be quantised"])
def test_the_mapper_names_it_too(bench, tmp_path, name):
    code, said = ended(bench, tmp_path, "base", REFUSED[name][0], monster_mapper)
    assert code == 2 and all(word in said for word in REFUSED[name][1]), said


# ---------------------------------------------------------------------------------------------------------------------
# What wrappers leave in names
# ---------------------------------------------------------------------------------------------------------------------


WRAPPED = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "policy.llm.": lambda name: f"policy.llm.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
}


def opened(bench, place, role, change):
    models = {name: bench / name for name in ROLES}
    models[role] = shutil.copytree(models[role], place / role)
    change(models[role])
    config = tiny.write_config(place / "my.yaml", models["base"], [models["one"]], place / "out")
    return open_models(load_config(config), fetch=lambda job: None)


@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_candidate_is_read_without_what_a_wrapper_left(bench, tmp_path, prefix):
    models = opened(bench, tmp_path, "one", renamed(WRAPPED[prefix]))
    right = load_file(bench / "one" / ONE)
    found = models.candidates[0].read(list(right))
    assert set(found) == set(right) and all(torch.equal(found[name], right[name]) for name in right)
    notes = [note for note in models.notes if "ignoring the prefix" in note]
    assert len(notes) == 1 and f"'{prefix}'" in notes[0]


@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_base_with_a_wrapper_is_refused_by_its_name(bench, tmp_path, prefix):
    with pytest.raises(ConfigError) as refused:
        opened(bench, tmp_path, "base", renamed(WRAPPED[prefix]))
    assert f"{tmp_path / 'base'}: " in str(refused.value) and f"'{prefix}'" in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters, folders of candidates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("adapter_model.safetensors", POINTER, LFS),
        ("adapter_config.json", POINTER, LFS),
        ("adapter_model.safetensors", PAGE, ["web page"]),
        ("adapter_config.json", PAGE, ["web page"]),
        ("adapter_model.safetensors", b"", ["is empty"]),
    ],
)
def test_a_refused_adapter_names_its_cause(bench, tmp_path, file, content, words):
    adapter = shutil.copytree(bench / "adapter", tmp_path / "adapter")
    (adapter / file).write_bytes(content)
    config = tiny.write_config(tmp_path / "my.yaml", bench / "base", [adapter], tmp_path / "out")
    with pytest.raises(ConfigError) as refused:
        open_models(load_config(config), fetch=lambda job: None)
    assert all(word in str(refused.value) for word in [file, *words]), refused.value


def test_what_a_folder_of_candidates_leaves_out_is_told_with_its_cause(bench, tmp_path):
    place = tmp_path / "models"
    shutil.copytree(bench / "one", place / "one")
    for name, change in (("a", instead("a.gguf", config=False)), ("b", deeper)):
        change(shutil.copytree(bench / "one", place / name))
    config = tiny.write_config(tmp_path / "my.yaml", bench / "base", [], tmp_path / "out")
    text = (
        config.read_text()
        .replace("models_to_merge: []\n", "")
        .replace("output_", f"model_directory: {place}\n  output_")
    )
    config.write_text(text)
    notes = open_models(load_config(config), fetch=lambda job: None).notes
    assert any("a.gguf" in note and "skipped" in note for note in notes)
    assert any(f"{place / 'b'} contains no model" in note for note in notes)


# ---------------------------------------------------------------------------------------------------------------------
# What only looks wrong, and what is told before a search
# ---------------------------------------------------------------------------------------------------------------------


def test_of_a_tensor_that_two_shards_hold_the_last_counts(bench, tmp_path):
    def change(folder):
        shards(folder)
        found = load_file(folder / FIRST)
        found[UP] = -load_file(folder / SECOND).get(UP, found.get(UP))
        other = load_file(folder / SECOND) | {UP: -found[UP]}
        for file, tensors in ((FIRST, found), (SECOND, other)):
            save_file(tensors, folder / file, metadata={"format": "pt"})

    models = opened(bench, tmp_path, "one", change)
    assert torch.equal(models.candidates[0].read([UP])[UP], load_file(bench / "one" / ONE)[UP])


def test_layers_that_predict_further_tokens_are_no_layers_too_many(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", architectures.configuration("DeepSeek V3", len(tokenizer)), tokenizer)
    candidate = tiny.make_candidate(tmp_path / "one", base, 1)

    def change(found):
        return found | {n.replace(".1.", ".2.", 1): t for n, t in found.items() if n.startswith("model.layers.1.")}

    for folder in (base, candidate):
        tensors(change)(folder)
    config = tiny.write_config(tmp_path / "my.yaml", base, [candidate], tmp_path / "out")
    assert len(open_models(load_config(config), fetch=lambda job: None).candidates) == 1
    for folder in (base, candidate):
        tiny.edit_checkpoint(folder, num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="num_hidden_layers is 2"):
        open_models(load_config(config), fetch=lambda job: None)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A text model, and a multimodal model around one of the same shapes, under present and former names."""
    place, tokenizer = tmp_path_factory.mktemp("multimodal"), tiny.bpe_tokenizer()
    text = architectures.configuration("Gemma 3", len(tokenizer))
    tiny.make_model(place / "text", text, tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    whole = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(whole).save_pretrained(place / "whole")
    tokenizer.save_pretrained(place / "whole")
    return place


def test_the_text_part_of_a_multimodal_candidate_is_merged(multimodal, tmp_path):
    config = tiny.write_config(tmp_path / "my.yaml", multimodal / "text", [multimodal / "whole"], tmp_path / "out")
    models = open_models(load_config(config), fetch=lambda job: None)
    assert any("the text part of a multimodal gemma3)" in note for note in models.notes)
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(multimodal / "whole" / ONE)
    right = next(
        tensor for stored_name, tensor in stored.items() if stored_name.endswith("layers.1.mlp.up_proj.weight")
    )
    assert torch.equal(models.candidates[0].read([name])[name], right)


def test_a_text_candidate_beside_a_multimodal_base_is_refused_by_what_both_are(multimodal, tmp_path):
    config = tiny.write_config(tmp_path / "my.yaml", multimodal / "whole", [multimodal / "text"], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"is gemma3_text, the base's is gemma3_text \(the text part of a multimodal"):
        open_models(load_config(config), fetch=lambda job: None)


def test_heads_of_the_same_shapes_are_refused_by_both_numbers(bench, tmp_path):
    change = settings(num_attention_heads=8, num_key_value_heads=4, head_dim=2)
    with pytest.raises(ConfigError, match=r"num_attention_heads is 8 \(base: 4\)"):
        opened(bench, tmp_path, "one", change)


def test_other_sizes_of_heads_are_refused_before_any_weight_is_looked_at(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", architectures.configuration("DeepSeek V3", len(tokenizer)), tokenizer)
    other = architectures.configuration("DeepSeek V3", len(tokenizer))
    other.qk_nope_head_dim, other.qk_rope_head_dim = 12, 4
    with pytest.raises(ConfigError, match=r"qk_nope_head_dim is 12 \(base: 8\)"):
        check_configuration(tmp_path, other, open_checkpoint(base, "base"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_an_attention_implementation_that_is_not_here_is_told_and_done_without(bench, tmp_path, key, more):
    change = settings(**{key: "flash_attention_2"})
    code, said = ended(bench, tmp_path, "base", change, merge_monster, "--quiet", "--overwrite", *more)
    assert code == 0, said
    assert "WARNING: " in said and "the attention implementation flash_attention_2" in said


def test_an_attention_implementation_that_is_not_here_is_no_matter_in_another_dtype(bench, tmp_path):
    folder = shutil.copytree(bench / "base", tmp_path / "base")
    settings(_attn_implementation="flash_attention_2")(folder)
    checkpoint = open_checkpoint(folder, "base")
    assert len(settle_attention(checkpoint)) == 1 and settle_attention(checkpoint) == []
    assert load_model(checkpoint, "cpu", "bfloat16").dtype == torch.bfloat16


def test_the_mapper_does_without_it_too(bench, tmp_path):
    code, said = ended(bench, tmp_path, "base", settings(_attn_implementation="flash_attention_2"), monster_mapper)
    assert code == 0 and "the attention implementation flash_attention_2" in said


MEANS = "differs from the base's: rms_norm_eps is 0.001 (base: 1e-06); the merged model keeps"


def test_another_meaning_is_a_warning_before_a_search_in_a_dry_run_and_in_a_replay(bench, tmp_path):
    change = settings(rms_norm_eps=1e-3, use_cache=False, unsloth_fixed=True)
    code, said = ended(bench, tmp_path, "one", change, merge_monster, "--quiet")
    assert code == 0 and said.startswith(f"WARNING: one: config.json {MEANS}"), said
    shutil.rmtree(tmp_path / "one")
    code, said = ended(bench, tmp_path, "one", change, merge_monster, "--quiet", "--dry-run", "--overwrite")
    assert code == 0 and f"WARNING: one: config.json {MEANS}" in said
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        replay = ["--replay", str(tmp_path / "out"), "--output", str(tmp_path / "again"), "--quiet"]
        code = merge_monster.main([*replay, "--source", f"base={bench / 'base'}"])
    accepted = any(
        d["ratio"] is not None
        for d in json.loads((tmp_path / "out/merge_monster_recipe.json").read_text())["decisions"]
    )
    assert accepted and code == 0 and f"WARNING: one: config.json {MEANS}" in output.getvalue()


def test_the_model_under_an_adapter_is_compared_too(bench, tmp_path):
    one = shutil.copytree(bench / "one", tmp_path / "one")
    settings(hidden_act="gelu")(one)
    adapter = bench / "adapter"
    candidates = [f"{one}+{adapter}", adapter]
    config = tiny.write_config(tmp_path / "my.yaml", bench / "base", candidates, tmp_path / "out")
    warnings = open_models(load_config(config), fetch=lambda job: None).warnings
    assert len(warnings) == 1 and "one+adapter: " in warnings[0] and "hidden_act is gelu" in warnings[0]


def test_experts_of_another_number_are_refused_by_both_numbers(tmp_path):
    folders = []
    for name, experts in (("base", 4), ("one", 2)):
        config = architectures.configuration("Mixtral", 300)
        config.num_local_experts = experts
        folders.append(tiny.make_model(tmp_path / name, config, tiny.bpe_tokenizer()))
    config = tiny.write_config(tmp_path / "my.yaml", folders[0], folders[1:], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"num_local_experts is 2 \(base: 4\)"):
        open_models(load_config(config), fetch=lambda job: None)
