"""The plan of a run against what a run then really does, and what is refused before one begins."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
from huggingface_hub import constants
from plans import GB, GIB, made_up, opened, planned, start
from runs import log_of, make_models
from safetensors.torch import load_file

import merge_monster
from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.config_diff import layer_settings, setting
from modules.checkpoints.hub import Repository
from modules.checkpoints.safetensors_files import SafetensorsReader
from modules.config.locations import Location
from modules.config.phrase_lists import Pair
from modules.model.loading import load_model
from modules.model.memory import Memory, sizes_of, weights_of
from modules.model.part import BLOCKS
from modules.run import plan as preflight
from modules.run.plan import check, estimate_seconds, plan_lines
from modules.runtime.errors import ConfigError
from modules.runtime.text import duration

METHODS = ["lerp", "cyclic", "lerp"]  # nothing forbids to try one twice


# ---------------------------------------------------------------------------------------------------------------------
# What is planned is what happens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "dtype, setting, family, shard, tied",
    [
        (torch.float32, "auto", "bpe", None, False),
        (torch.float16, "auto", "spm", "60KB", True),
        (torch.float32, "bfloat16", "spm", None, True),
        (torch.bfloat16, "float32", "bpe", "60KB", False),
    ],
)
def test_the_plan_is_what_a_run_does(place, dtype, setting, family, shard, tied):
    models = make_models(place / "models", dtype, family, shard, tied)
    settings = {"dtype": setting, "merge_method": METHODS, "merge_ratios": [0.3, 0.5, 0.7]}
    plan = planned(*opened(place, models, **settings))
    assert plan.warnings == ()
    assert merge_monster.main(["--config", str(place / "my.yaml")]) == 0
    log = log_of(place)
    packs = "1 pack" if len(plan.packs) == 1 else f"{len(plan.packs)} packs"
    assert re.search(rf"Scoring +: {sum(plan.packs)} tokens per pass .*, {packs}, layout forest\n", log)
    assert f"Dtype            : {plan.arithmetic.name}, saved as" in log
    assert len(re.findall("CHANGED|RETAINED", log)) == 2 * plan.decisions == 2 * (3 * len(METHODS) + 1)
    weights = sorted(place.glob("out/*.safetensors"))
    others = [path for path in models[0].iterdir() if path.suffix != ".safetensors"]
    tensors = sum(tensor.nbytes for file in weights for tensor in load_file(file).values())
    assert plan.output == tensors + sum(path.stat().st_size for path in others)
    written = [path for path in (place / "out").rglob("*") if path.is_file()]
    assert plan.output < sum(path.stat().st_size for path in written) < plan.disk_needed


@pytest.mark.parametrize("setting, tied", [("float32", True), ("bfloat16", False)])
def test_memory_is_that_of_the_real_tensors(place, setting, tied):
    models = make_models(place / "models", tied=tied)
    config, found = opened(place, models, dtype=setting)
    memory = planned(config, found).memory
    model = load_model(found.base, "cpu", setting)
    everything = {id(t): t.nbytes for t in (*model.module.parameters(), *model.module.buffers())}
    parts = [sum(tensor.nbytes for tensor in part.tensors.values()) for part in (model.layer(1), model.header())]
    assert (memory.base, memory.layer, memory.header) == (sum(everything.values()), *parts)
    largest = max(tensor.numel() for part in (model.layer(1), model.header()) for tensor in part.tensors.values())
    assert memory.arriving == (4 * largest // BLOCKS if setting == "bfloat16" else 0)  # a candidate in float32
    assert planned(*opened(place, models, dtype=setting, merge_headers=False)).memory.header == 0


def test_activations_hold_what_grows_with_ratios_and_phrases(place, models):
    def activations(count, **settings):
        config, found = opened(place, models, **settings)
        pairs = tuple(Pair("BAD", f"apple{number}", f"Question {number}: where ") for number in range(count))
        return planned(replace(config, bad_phrases=pairs), found).memory.activations

    few, more, stacked = activations(2), activations(20), activations(2, merge_ratios=[0.1 * n for n in range(1, 9)])
    assert few < more and few < stacked
    # Logits are read in chunks and phrases are packed: more pairs do not take more memory for ever.
    assert activations(300) < 1.1 * activations(200)


@pytest.mark.parametrize("headers, layers", [(True, None), (False, "0-1"), (True, [0, 2])], ids=str)
def test_the_planned_work_is_that_of_the_search(place, models, headers, layers):
    config, found = opened(place, models, merge_method=["lerp", "cyclic"], merge_headers=headers, layers=layers)
    plan, search = planned(config, found), start(config, found)
    assert plan.decisions == len(list(search.candidate(found.candidates[0])))


def test_no_weight_is_read_for_the_plan(place, models, monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "stream", read)
    monkeypatch.setattr(SafetensorsReader, "read_file", read)
    config, found = opened(place, models)
    assert planned(config, found).warnings == ()


def sizes_by_layer(model_type, **settings):
    from architectures import SIZES
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 4, "vocab_size": 300, **settings})
        module = AutoModelForCausalLM.from_config(config)
    return sizes_of(module), module, config


def test_layers_of_different_heads_are_planned_for_by_the_largest():
    settings = {"head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": 300}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0}
    sizes, module, config = sizes_by_layer("gemma4_text", **settings, **kinds)
    assert (sizes.heads, sizes.hidden) == (4, 32)
    assert layer_settings(config, "head_dim") == [8, 16, 8, 16] and setting(config, "head_dim") == [8, 16, 8, 16]
    weights = [sum(p.numel() for p in layer.parameters()) for layer in module.model.layers]
    assert weights_of(module, torch.float32, False).layer == 4 * max(weights) > sum(weights)


def test_a_setting_is_that_of_each_layer():
    from transformers import AutoConfig

    own = {1: {"num_attention_heads": 8}, 3: {"num_key_value_heads": 4, "sliding_window": 8}}
    config = AutoConfig.for_model(
        "qwen3", num_hidden_layers=4, num_attention_heads=4, hidden_size=32, per_layer_config=own
    )
    assert setting(config, "num_attention_heads") == [4, 8, 4, 4] and setting(config, "hidden_size") == 32
    assert layer_settings(config, "hidden_size") == [32] * 4 and setting(config, "nothing of the kind") is None
    listed = AutoConfig.for_model("llama", num_hidden_layers=3)
    listed.num_query_heads = [2, 4, 6]
    assert setting(listed, "num_query_heads") == [2, 4, 6]


def test_layers_with_and_without_attention_are_planned_for():
    sizes, _, _ = sizes_by_layer("jamba", mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2)
    assert sizes.heads == 4


def test_what_the_base_cannot_take_is_found_by_the_plan(place, models):
    config, found = opened(place, models)
    long = Pair("BAD", "apple", "apple " * 300)
    with pytest.raises(ConfigError, match="the base model takes 256"):
        planned(replace(config, bad_phrases=(long,)), found)


def test_downloads_are_those_that_are_missing(place, models):
    config, found = opened(place, models)

    def of_hub(checkpoint, folder, size):
        """The same checkpoint, its weights still to be fetched."""
        empty = place / "cache" / folder
        shutil.copytree(checkpoint.path, empty, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        hub = Repository(Location("org/x", None, "org/x"), empty, {"model.safetensors": size}, commit="abc")
        return replace(checkpoint, repository=hub)

    base = of_hub(found.base, "base", 5 * GB)
    one, two = found.candidates
    one = replace(one, checkpoint=of_hub(one.checkpoint, "one", 7 * GB))
    two = replace(two, checkpoint=of_hub(two.checkpoint, "base", 5 * GB))  # as an adapter of the base: fetched once
    found = replace(found, base=base, candidates=[one, two])
    for keep in (True, False):  # what is not to be kept is there until the output is written
        plan = planned(replace(config, keep_downloads=keep), found)
        output = plan.output + int(plan.output * preflight.MARGIN) + preflight.MARGIN_FLAT
        assert (plan.downloads, plan.disk_needed) == (12 * GB, output + 12 * GB)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def refusal(plan):
    with pytest.raises(ConfigError) as caught:
        check(plan)
    return str(caught.value).splitlines()


def test_with_room_for_everything_there_is_nothing_to_say(place):
    assert check(made_up(place)) == check(made_up(place, free=None)) == []
    assert check(made_up(place, disk_free=17 * GB)) == []


def test_all_that_is_missing_is_named_at_once_with_what_is_needed_and_free(place):
    disk, memory = refusal(made_up(place, disk_free=16 * GB, free=GIB))
    assert str(place / "out") in disk and "17.00 GB of disk space needed, 16.00 GB free" in disk
    assert "cuda:0: 19.00 GiB of memory needed in bfloat16, 1.00 GiB free" in memory


def test_memory_that_surely_and_that_perhaps_does_not_suffice(place):
    plan = made_up(place, memory=Memory(15 * GIB, GIB // 2, 0, GIB // 2, GIB // 4))
    assert "16.50 GiB of memory needed" in refusal(replace(plan, free=int(16.5 * GIB) - 1))[0]
    on_cpu = replace(plan, device=torch.device("cpu"))
    assert "17.00 GiB of memory needed" in refusal(replace(on_cpu, free=17 * GIB - 1))[0]  # it can't do with less
    # The activations alone refuse nothing: what they take is not known so well.
    assert check(replace(plan, free=plan.memory.reserved)) == []
    (warning,) = check(replace(plan, free=17 * GIB))
    assert "17.25 GiB needed on cuda:0, 17.00 GiB free" in warning and "merge_ratios" in warning


def test_layers_that_stay_in_the_memory_of_the_cpu_are_a_warning(place):
    (warning,) = check(made_up(place, placement=(torch.device("cuda:0"), torch.device("cpu"))))
    assert "1 of 32 layers" in warning


def test_free_is_what_the_machine_says(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=11))
    assert preflight._free_on(torch.device("cpu"), 2) == 5
    assert preflight._free_on(torch.device("mps"), 1) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (13 if device.index == 1 else 0, 99))
    assert preflight._free_on(torch.device("cuda:1"), 2) == 13


def test_disk_is_that_of_the_output_with_what_an_unfinished_run_has_left(place, models, monkeypatch):
    config, found = opened(place, models)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "not/there/yet"))
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=10**9)

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    (place / "out.partial").mkdir()
    (place / "out.partial/model-00001-of-00002.safetensors").write_bytes(b"weights")
    assert planned(config, found).disk_free == 10**9 + 7 and asked == [place]


# ---------------------------------------------------------------------------------------------------------------------
# How long it will take, and the plan in words
# ---------------------------------------------------------------------------------------------------------------------


def test_the_estimate_is_a_timed_forward_times_the_work(place, monkeypatch):
    timed = []
    monkeypatch.setattr(preflight, "seconds_of_a_layer", lambda _, tokens, *more: timed.append(tokens) or 2.0)
    plan = made_up(place)
    plan = replace(plan, config=replace(plan.config, baselines=False))
    layers = sum(range(1, 33))  # forwards that all layers take, for one ratio
    assert plan.forwards == 2 * (8 * layers + 4 * 32) and plan.decisions == 65
    per_token = 2.0 / 1000
    assert estimate_seconds(plan, None) == pytest.approx(per_token * plan.forwards * 1076)
    more = replace(plan, trial_tokens=100, neutral_tokens=50)
    assert estimate_seconds(more, None) == pytest.approx(per_token * (plan.forwards * 1176 + 3 * 50 * 32))
    whole = replace(plan, config=replace(plan.config, baselines=True))
    assert estimate_seconds(whole, None) == pytest.approx(per_token * (plan.forwards + 2 * 32) * 1076)
    some = replace(plan, config=replace(plan.config, layers=(31,), merge_headers=False))
    assert some.forwards == 2 * 8 and timed == [1000] * 3


@pytest.mark.parametrize("search", ["greedy", "joint"])
def test_a_real_model_has_an_estimate_and_stays_as_it_is(place, models, search):
    config, found = opened(place, models)
    plan = planned(replace(config, search=search), found)
    assert 0 < estimate_seconds(plan, found.module) < 1000
    assert len(found.module.model.layers) == 3 and all(one.is_meta for one in found.module.parameters())
    assert estimate_seconds(plan, SimpleNamespace()) is None


def test_the_plan_in_words(place):
    plan = made_up(place, downloads=31 * GB)
    text = "\n".join(plan_lines(plan, 612.0))
    for part in ("2 (one, two)", "lerp, slerp at 0.1, 0.3, 0.5, 0.7", "LM head", "65 per candidate, 130 in total"):
        assert part in text
    for part in ("14, 1,076 tokens", "16.00 GB for", "900.00 GB free", "20.00 GiB on cuda:0", "79.00 GiB free"):
        assert part in text
    assert "31.00 GB from the hub" in text and "about 10 min" in text
    text = "\n".join(plan_lines(made_up(place, free=None), None))
    assert "Downloads" not in text and "GiB free" not in text and "unknown" in text


DURATIONS = {0.04: "0.0 s", 42.4: "42 s", 5900.0: "98 min", 7199.0: "2 h 00 min", 100_000.0: "27 h 47 min"}


@pytest.mark.parametrize("seconds", DURATIONS)
def test_durations(seconds):
    assert duration(seconds) == DURATIONS[seconds]
    assert duration(700_000.0) == "8 days 2 h"


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(place / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    candidate = tiny.make_candidate(place / "one", base)
    path = tiny.write_config(place / "my.yaml", base, [candidate], place / "out")
    before = sorted(place.iterdir())
    assert merge_monster.main(["--config", str(path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "Decisions        : 4 per candidate, 4 in total" in output and "Time (estimate)" in output
    assert "Dry run: wrote only the log logs" in output and "Layer 1/3" not in output
    assert sorted(path for path in place.iterdir() if path.name != "logs") == before
