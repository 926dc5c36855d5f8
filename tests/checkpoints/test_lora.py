"""LoRA adapters as candidates, against PEFT's own merge_and_unload."""

import re
import shutil
import time

import architectures
import peft
import pytest
import tiny
import torch
from adapters import make_adapter, make_bench, write_adapter
from peft.utils.other import get_pattern_key
from runs import digest, log_of, merge, refused, stored
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.checkpoints import lora
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.lora import match_alphas, open_adapter
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Base models by name."""
    folder, tokenizer = tmp_path_factory.mktemp("bases"), tiny.bpe_tokenizer()
    vocabulary = len(tokenizer)
    half = {"seed": 1, "dtype": torch.bfloat16}
    return {
        "llama": tiny.make_model(folder / "llama", tiny.llama_config(vocabulary), tokenizer),
        "other": tiny.make_model(folder / "other", tiny.llama_config(vocabulary), tokenizer, seed=9),
        "biased": tiny.make_model(folder / "biased", tiny.llama_config(vocabulary, attention_bias=True), tokenizer),
        "tied": tiny.make_model(folder / "tied", tiny.llama_config(vocabulary, tied=True), tokenizer),
        "half": tiny.make_model(folder / "half", tiny.llama_config(vocabulary), tokenizer, **half),
        "sharded": tiny.make_model(folder / "sharded", tiny.llama_config(vocabulary), tokenizer, shard="60KB"),
        "gpt2": tiny.make_model(folder / "gpt2", tiny.gpt2_config(vocabulary), tokenizer),
        "neox": tiny.make_model(folder / "neox", architectures.configuration("GPT-NeoX", vocabulary), tokenizer),
    }


def candidate_of(place, base, source):
    """A candidate as the program opens it, with the names of its layers' and header's tensors."""
    config = load_config(tiny.write_config(place / "open.yaml", base, [source], place / "out"))
    models = open_models(config, lambda job: None)
    return models.candidates[0]


SETTINGS = {
    "plain": ("llama", {}),
    "rank-stabilised": ("llama", {"use_rslora": True, "r": 9}),
    "ranks and alphas of their own": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 1, r"layers\.[12]\..*k_proj": 20},
        },
    ),
    "some layers only": ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "whole tensors": ("llama", {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]}),
    "biases": ("biased", {"bias": "all"}),
    "biases where there is LoRA": ("biased", {"bias": "lora_only", "target_modules": ["q_proj"]}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "bfloat16": ("half", {}),
    "sharded base": ("sharded", {}),
    "GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "GPT-NeoX": ("neox", {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}),
    "tied": ("tied", {}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_reads_as_peft_merges_it(place, bases, name):
    base, settings = SETTINGS[name]
    adapter, whole = make_adapter(place, bases[base], **settings)
    found, expected = candidate_of(place, bases[base], adapter), candidate_of(place, bases[base], whole)
    names = [tensor for tensor in expected.conversion if tensor in found.conversion]
    assert len(names) == len(set(expected.conversion)) >= 12
    ours, theirs, before = found.read(names), expected.read(names), open_checkpoint(bases[base], "base").read
    exact = {"atol": 1e-6, "rtol": 1e-5} if base != "half" else {"atol": 1e-2, "rtol": 2e-2}
    changed = 0
    for tensor in names:
        assert ours[tensor].dtype == theirs[tensor].dtype
        torch.testing.assert_close(ours[tensor], theirs[tensor], **exact, msg=tensor)
        stored_name = found.conversion.stored_name(tensor)
        rows = torch.arange(len(ours[tensor]))[3:11]
        torch.testing.assert_close(found.rows(tensor, rows), theirs[tensor][rows], **exact, msg=tensor)
        changed += not torch.equal(ours[tensor], before([stored_name])[stored_name])
    assert changed >= 2


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["plain", "embedding and head", "GPT-2", "tied"])
def test_a_merge_with_an_adapter_is_that_with_the_merged_model(place, bases, name):
    base, settings = SETTINGS[name]
    adapter, whole = make_adapter(place, bases[base], **settings)
    before = digest(adapter)
    totals = []
    for candidate in (adapter, whole):
        arguments = ["--overwrite", "--output", str(place / f"{candidate.name}-out")]
        assert merge(place, (bases[base], candidate), *arguments) == 0
        found = re.findall(r" - (?:CHANGED - \S+ > |RETAINED - )(\S+)", log_of(place))
        totals.append([float(total) for total in found])
        assert "CHANGED" in log_of(place)
    assert totals[0] == pytest.approx(totals[1], rel=1e-3, abs=1e-5)
    assert stored(place / "adapter-out") == stored(bases[base])
    assert digest(adapter) == before and AutoModelForCausalLM.from_pretrained(place / "adapter-out")


def test_a_model_with_an_adapter_of_its_own(place, bases):
    adapter, whole = make_adapter(place, bases["other"])
    source = f"{bases['other']}+{adapter}"
    found, expected = candidate_of(place, bases["llama"], source), candidate_of(place, bases["llama"], whole)
    assert (found.name, found.notes) == ("other+adapter", [])
    for name, tensor in expected.read(list(expected.conversion)).items():
        torch.testing.assert_close(found.read([name])[name], tensor, atol=1e-6, rtol=1e-5)
    notes = candidate_of(place, bases["llama"], adapter).notes
    assert notes == [f"adapter: the adapter was trained on {bases['other']}, but is applied to llama"]


def test_an_adapter_in_a_bin_file(place, bases):
    adapter, whole = make_adapter(place, bases["llama"])
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found, expected = candidate_of(place, bases["llama"], adapter), candidate_of(place, bases["llama"], whole)
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found.read([name]), expected.read([name]), atol=1e-6, rtol=1e-5)


def test_experts_that_are_stored_one_by_one(place, bases):
    """The adapter changes what is stored, before the architecture's rules fuse it."""
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    mixtral = tiny.make_model(place / "mixtral", architectures.configuration("Mixtral", len(tokenizer)), tokenizer)
    adapter, _ = make_adapter(place, mixtral, target_modules=["q_proj"])
    stored_as = "model.layers.0.block_sparse_moe.experts.1.w1"
    low = {"A": torch.randn(4, 32), "B": torch.randn(64, 4)}
    added = {f"base_model.model.{stored_as}.lora_{side}.weight": tensor for side, tensor in low.items()}
    save_file(load_file(adapter / "adapter_model.safetensors") | added, adapter / "adapter_model.safetensors")
    found, plain = candidate_of(place, mixtral, adapter), load_file(mixtral / "model.safetensors")
    fused = found.read(["model.layers.0.mlp.experts.gate_up_proj"]).popitem()[1]
    expected = plain[f"{stored_as}.weight"] + 6 / 4 * low["B"] @ low["A"]
    torch.testing.assert_close(fused[1, :64], expected)
    torch.testing.assert_close(fused[1, 64:], plain[stored_as.replace("w1", "w3") + ".weight"])


def test_names_as_older_versions_wrote_them(place, bases):
    adapter, whole = make_adapter(place, bases["llama"], modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    older = {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t
        for name, t in tensors.items()
    }
    head = older.pop("base_model.model.lm_head.weight")
    older["base_model.model.lm_head.modules_to_save.default.weight"] = head
    save_file(older, adapter / "adapter_model.safetensors")
    found, expected = candidate_of(place, bases["llama"], adapter), candidate_of(place, bases["llama"], whole)
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        torch.testing.assert_close(found.read([name]), expected.read([name]), atol=1e-6, rtol=1e-5)


def test_an_adapter_is_found_in_the_model_directory(place, bases):
    (place / "models").mkdir()
    shutil.move(make_adapter(place, bases["llama"])[0], place / "models/lora")
    directories = {
        "model_path1": str(bases["llama"]),
        "model_directory": str(place / "models"),
        "output_directory": "out",
    }
    config = tiny.write_config(place / "my.yaml", bases["llama"], [], place / "out", directories=directories)
    models = open_models(load_config(config), lambda job: None)
    assert [candidate.name for candidate in models.candidates] == ["lora"]


def test_an_adapter_beside_a_models_weights_is_not_applied_silently(place, bases, capsys):
    adapter, _ = make_adapter(place, bases["llama"])
    both = shutil.copytree(bases["other"], place / "both")
    shutil.copy(adapter / "adapter_config.json", both)
    assert merge(place, (bases["llama"], both)) == 0
    assert "both also contains an adapter, which is not applied" in log_of(place)
    shutil.rmtree(place / "out")
    refused(place, (both, bases["llama"]), capsys, "contains both a model and an adapter")
    refused(place, (adapter, bases["llama"]), capsys, "this is an adapter")


# ---------------------------------------------------------------------------------------------------------------------
# What can't be applied
# ---------------------------------------------------------------------------------------------------------------------

KINDS = [
    ({"use_dora": True}, "use_dora: True"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: "),
    ({"lora_bias": True}, "lora_bias: True"),
    ({"peft_type": "IA3"}, "peft_type: IA3"),
]


@pytest.mark.parametrize("settings, words", KINDS, ids=[words for _, words in KINDS])
def test_kinds_that_are_refused_by_their_key(place, bases, settings, words):
    write_adapter(place / "adapter", bases["llama"], **settings)
    with pytest.raises(ConfigError, match=f"adapters with {words}.*PEFT"):
        open_adapter(place / "adapter", "adapter")


def test_whole_tensors_of_other_shapes(place, bases, capsys):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.resize_token_embeddings(410, mean_resizing=False)
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(place / "adapter")
    words = ".weight has shape (410, 32), but (400, 32) in llama"
    refused(place, (bases["llama"], place / "adapter"), capsys, words)


def test_an_adapter_for_another_model(place, bases, capsys):
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    wide = tiny.make_model(place / "wide", tiny.llama_config(len(tokenizer), hidden=48), tokenizer)
    adapter, _ = make_adapter(place, wide)
    refused(place, (bases["llama"], adapter), capsys, ["adds a matrix (48, ", "to model.layers.0."])
    adapter, _ = make_adapter(place / "again", bases["gpt2"], target_modules=["c_attn"], fan_in_fan_out=True)
    refused(place, (bases["llama"], adapter), capsys, "changes transformer.h.0.attn.c_attn.weight, which llama")


SETTINGS_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = {
    "no JSON": (SETTINGS_FILE, b"{", "not a PEFT adapter configuration"),
    "alpha as text": (SETTINGS_FILE, b'{"lora_alpha": "x"}', "not a PEFT adapter configuration"),
    "no number as alpha": (SETTINGS_FILE, b'{"lora_alpha": NaN}', "not a PEFT adapter configuration"),
    "a huge alpha": (SETTINGS_FILE, b'{"lora_alpha": 1' + b"0" * 400 + b"}", "not a PEFT adapter configuration"),
    "no alpha for a pattern": (SETTINGS_FILE, b'{"alpha_pattern": {"q": null}}', "not a PEFT adapter configuration"),
    "a text for a truth": (SETTINGS_FILE, b'{"use_rslora": "false"}', "not a PEFT adapter configuration"),
    "no settings": (SETTINGS_FILE, b"{}", "peft_type: None"),
    "broken weights": (WEIGHTS, b"broken", "adapter_model.safetensors: can't be read"),
    "no weights": (WEIGHTS, None, "no adapter weights found"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapters(place, bases, name):
    file, content, words = BROKEN[name]
    write_adapter(place / "adapter", bases["llama"])
    (place / "adapter" / file).unlink()
    if content is not None:
        (place / "adapter" / file).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        open_adapter(place / "adapter", "adapter")
    assert str(refused.value).startswith(str(place / "adapter")) and words in str(refused.value)


def refused_with(place, base, change, words):
    """An adapter with other tensors is refused with these words."""
    write_adapter(place / "adapter", base)
    tensors = load_file(place / "adapter" / WEIGHTS)
    change(tensors)
    save_file(tensors, place / "adapter" / WEIGHTS)
    with pytest.raises(ConfigError, match=re.escape(words)):
        open_adapter(place / "adapter", "adapter")


MODULE = "base_model.model.model.layers.2.self_attn.q_proj"
SHAPES = {"gathered by nobody": ((0,), (0,)), "rank 0": ((0, 32), (32, 0)), "two ranks": ((3, 32), (32, 4))}
SHAPES |= {"a number": ((), (32, 4)), "three axes": ((4, 32), (32, 4, 1))}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_make_no_product(place, bases, name):
    a, b = map(torch.zeros, SHAPES[name])
    sides = {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b}
    refused_with(place, bases["llama"], lambda tensors: tensors.update(sides), "incompatible shapes")


def test_tensors_that_make_no_adapter(place, bases):
    refused_with(place, bases["llama"], lambda tensors: tensors.popitem(), "has only one of lora_A and lora_B")
    shutil.rmtree(place / "adapter")
    refused_with(place, bases["llama"], dict.clear, "contains no tensors")


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "vera_lambda_b", "lora_C.weight"])
def test_tensors_that_are_no_part_of_plain_lora(place, bases, name):
    """What a kind of adapter brings that is not known here, whatever its settings say."""
    more = {f"{MODULE}.{name}": torch.ones(2)}
    refused_with(
        place, bases["llama"], lambda tensors: tensors.update(more), f"{name} is not part of a plain LoRA adapter"
    )


@pytest.mark.parametrize("name", ["score.weight", "model.embed_tokens_extra.weight"])
def test_whole_tensors_that_the_model_has_no_place_for(place, bases, capsys, name):
    adapter, _ = make_adapter(place, bases["llama"], target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, f"base_model.model.{name}": torch.ones(2, 32)}, adapter / "adapter_model.safetensors")
    refused(place, (bases["llama"], adapter), capsys, f"the adapter contains {name}, which llama")


def test_two_models_where_the_second_is_no_adapter(place, bases, capsys):
    assert merge(place, (bases["llama"], f"{bases['other']}+{bases['half']}")) == 2
    assert f"{bases['half']}: not an adapter: adapter_config.json is missing" in capsys.readouterr().err


NAMES = [
    *("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj"),
    *("lm_head", "model.embed_tokens"),
]
PATTERNS = [
    ["proj", "q_proj"],
    ["up_proj", "layers.1.*", "layers.0.self_attn.q_proj"],
    [r"layers\.[01]\..*(q|k)_proj", "^lm_head", r".*"],
    ["^model.layers.0.self_attn.q_proj$", r"model\.layers\.(?!0)\d+\.\w+\.\w+"],
    ["a)|(lm_head"],  # no pattern by itself, but one where PEFT puts it
    ["", "x"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=map(str, PATTERNS))
def test_a_pattern_of_alphas_means_what_it_means_to_peft(patterns):
    alphas = {pattern: number for number, pattern in enumerate(patterns)}
    expected = {name: alphas.get(get_pattern_key(patterns, name), 99) for name in NAMES}
    assert match_alphas(alphas, 99, NAMES) == expected


@pytest.mark.parametrize("pattern", [r"(\w|.|[a-z])+\d", "((((a{100}){100}){100}){100})", "(", "(?R)"])
def test_a_hostile_or_broken_pattern_is_refused_soon(tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(lora, "_MATCH_SECONDS", 0.2)
    make_bench(tmp_path)
    write_adapter(tmp_path / "hostile", tmp_path / "base", alpha_pattern={pattern: 3})
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*alpha_pattern"):
        open_adapter(tmp_path / "hostile", "hostile")
    assert time.monotonic() - began < 3


def test_an_alpha_of_its_own_counts_for_the_modules_that_it_names(tmp_path):
    make_bench(tmp_path)
    scales = []
    for number, own in enumerate(({}, {"up_proj": 10}, {r"layers\.[1-9]": 10}, {r"layers\.0\..*": 6, "up_proj": 10})):
        write_adapter(tmp_path / str(number), tmp_path / "base", alpha_pattern=own)
        scales += [product.scale for product in open_adapter(tmp_path / str(number), "one").products.values()]
    assert scales == [2, 5, 2, 3]
