"""The plan of a run against what a run then really does, and what is refused before one begins."""

import math
import re
from dataclasses import replace
from pathlib import Path
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
from modules.checkpoints.hub import Repository
from modules.checkpoints.meaning import layer_settings, setting
from modules.config import Pair
from modules.config.locations import Location
from modules.model.arithmetic import Arithmetic
from modules.model.loading import load_model
from modules.model.memory import Memory, weights_of
from modules.model.part import BLOCKS
from modules.output import places as places
from modules.output.recipe import RECIPE_FILE
from modules.run import plan as preflight
from modules.run import room
from modules.run.room import Available, check, find_available
from modules.runtime.errors import ConfigError

PLENTY = Available(Path("/"), disk=10**15, memory=10**15, refusal=None)
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
    assert check(plan, find_available(plan)) == []
    assert merge_monster.main(["--config", str(place / "my.yaml")]) == 0
    log = log_of(place)
    packed = f"forest ({plan.packed_tokens} tokens packed from {plan.text_tokens}, {len(plan.packs)} pack)"
    assert f"Phrase layout    : {packed}\n" in log
    assert f"Dtype            : {str(plan.dtype).removeprefix('torch.')}, saved as" in log
    assert len(re.findall("CHANGED|RETAINED", log)) == 2 * plan.decisions == 2 * (3 * len(METHODS) + 1)
    weights = sorted(place.glob("out/*.safetensors"))
    others = [path for path in models[0].iterdir() if path.suffix != ".safetensors"]
    tensors = sum(tensor.nbytes for file in weights for tensor in load_file(file).values())
    assert plan.disk.output == tensors + sum(path.stat().st_size for path in others)
    written = [path for path in (place / "out").rglob("*") if path.is_file()]
    assert plan.disk.output < sum(path.stat().st_size for path in written) < plan.disk.needed
    records = sum((place / "out" / name).stat().st_size for name in ("merge_monster_journal.jsonl", RECIPE_FILE))
    assert 0.5 < records / plan.disk.records < 1.5


@pytest.mark.parametrize("setting", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
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


@pytest.mark.parametrize("layers", [None, [1], "0-1", [0, 2]], ids=str)
@pytest.mark.parametrize("headers", [True, False])
def test_work_and_reading_are_those_of_the_search(place, models, headers, layers):
    config, found = opened(place, models, merge_method=["lerp", "cyclic"], merge_headers=headers, layers=layers)
    plan, search, read = planned(config, found), start(config, found), []
    candidate, stored = found.candidates[0], found.candidates[0].checkpoint.tensors
    reading = replace(candidate, checkpoint=Recorded.of(candidate.checkpoint, read))
    decisions = list(search.candidate(reading))
    assert plan.decisions == len(decisions)
    assert plan.forwards_alone + plan.forwards_stacked == search.steps_per_candidate()
    assert plan.columns == search.scorer.columns
    assert dict(plan.disk.candidates)["one"] == sum(4 * math.prod(stored[name].shape) for name in set(read))


class Recorded(Checkpoint):
    """A checkpoint that notes what is read of it."""

    @classmethod
    def of(cls, checkpoint, noted):
        recorded = cls(checkpoint.path, checkpoint.name, checkpoint.config, checkpoint.tensors, checkpoint.companions)
        object.__setattr__(recorded, "noted", noted)
        return recorded

    def stream(self, names, **room):
        names = list(names)
        self.noted.extend(names)
        return super().stream(names, **room)

    def rows(self, name, rows):
        self.noted.append(name)
        return super().rows(name, rows)


def test_no_weight_is_read_for_the_plan(place, models, monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "stream", read)
    monkeypatch.setattr("modules.checkpoints.checkpoint.stream_tensors", read)
    config, found = opened(place, models)
    plan = planned(config, found)
    assert check(plan, find_available(plan)) == []


def test_of_stacked_experts_a_token_meets_a_few(place):
    from architectures import configuration
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(configuration("Mixtral", 300))
    experts = module.model.layers[0].mlp.experts
    idle = sum(weight.numel() for weight in experts.parameters()) / 2  # two of four are chosen
    sizes = preflight.sizes_of(module)
    assert sizes.active_weights == sizes.layer_weights - idle


def sizes_by_layer(model_type, **settings):
    from architectures import SIZES
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 4, "vocab_size": 300, **settings})
        module = AutoModelForCausalLM.from_config(config)
    return preflight.sizes_of(module), module, config


def test_layers_of_different_heads_are_planned_for_by_the_largest():
    settings = {"head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": 300}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0}
    sizes, module, config = sizes_by_layer("gemma4_text", **settings, **kinds)
    assert (sizes.heads, sizes.head_size, sizes.hidden) == (4, 16, 32)
    assert layer_settings(config, "head_dim") == [8, 16, 8, 16] and setting(config, "head_dim") == [8, 16, 8, 16]
    assert sizes.layer_weights == sum(p.numel() for p in module.model.layers.parameters()) / 4
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in module.model.layers)
    assert weights_of(module, torch.float32, False).layer == 4 * largest > 4 * sizes.layer_weights


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
    assert (sizes.heads, sizes.head_size) == (4, 8)


def test_what_the_base_cannot_take_is_found_by_the_plan(place, models):
    config, found = opened(place, models)
    long = Pair("BAD", "apple", "apple " * 300)
    with pytest.raises(ConfigError, match="the base model takes 256"):
        planned(replace(config, bad_phrases=(long,)), found)


def test_downloads_are_those_that_are_missing(place, models):
    config, found = opened(place, models)

    def of_hub(checkpoint, folder, size):
        """The same checkpoint, its weights still to be fetched."""
        sizes = {"model.safetensors": size}
        return replace(checkpoint, repository=Repository(Location("org/x", None), place / folder, sizes))

    base = of_hub(found.base, "base", 5 * GB)
    one, two = found.candidates
    one = replace(one, checkpoint=of_hub(one.checkpoint, "one", 7 * GB))
    two = replace(two, checkpoint=of_hub(two.checkpoint, "base", 5 * GB))  # as an adapter of the base: fetched once
    found = replace(found, base=base, candidates=[one, two])
    for keep in (True, False):  # what is not to be kept is there until the output is written
        assert planned(replace(config, keep_downloads=keep), found).disk.downloads == 12 * GB


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def refusal(plan, **room):
    with pytest.raises(ConfigError) as caught:
        check(plan, replace(PLENTY, folder=plan.output.parent, **room))
    return str(caught.value).splitlines()


def test_with_room_for_everything_there_is_nothing_to_say(place):
    assert check(made_up(place), PLENTY) == []
    assert check(made_up(place), replace(PLENTY, memory=None)) == []


def test_all_that_is_missing_is_named_at_once(place):
    lines = refusal(made_up(place), disk=GB, memory=GIB, refusal="it can't be written")
    words = ["can't be written", "free: make room", "fit into the memory"]
    assert [re.search("|".join(words), line)[0] for line in lines] == words


def test_a_disk_that_is_too_small(place, monkeypatch):
    plan = made_up(place)
    assert plan.disk.needed == 16 * GB + 160_000_000 + 2**20
    assert check(plan, replace(PLENTY, disk=plan.disk.needed)) == []
    assert refusal(plan, disk=plan.disk.needed - 1) == [
        f"writing {place / 'out'} takes 16.16 GB, the disk of {place} has 16.16 GB free: make room, or name a "
        "directory on a larger disk with --output"
    ]
    (place / "out").mkdir()
    (place / "out/model.safetensors").write_text("")
    line = refusal(plan, disk=GB)[0]
    assert line.endswith("goes only after the new one stands, so moving it away makes room")
    # What is fetched meanwhile counts where it lies on the same disk.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "not/there/yet"))
    fetching = replace(plan, disk=replace(plan.disk, downloads=9 * GB))
    assert "takes 16.16 GB beside 9.00 GB of downloads, " in refusal(fetching, disk=20 * GB)[0]
    monkeypatch.setattr(room, "_same_disk", lambda *_: False)
    assert check(fetching, replace(PLENTY, disk=20 * GB)) == []


def test_memory_that_surely_does_not_suffice(place):
    plan = made_up(place, memory=Memory(15 * GIB, GIB // 2, 0, GIB // 2, GIB // 4))
    assert refusal(plan, memory=int(16.5 * GIB) - 1) == [
        "the base (15.00 GiB in bfloat16) and what is searched at a time (1.50 GiB) don't fit into the memory of "
        "cuda:0, which has 16.50 GiB free, 16.50 GiB are needed: end other programs that use it, or choose a device "
        "with more memory"
    ]
    # The activations alone refuse nothing: what they take is not known so well.
    assert check(plan, replace(PLENTY, memory=plan.memory.reserved)) == []
    (warning,) = check(plan, replace(PLENTY, memory=17 * GIB))
    assert warning == (
        "memory may not suffice: cuda:0 has 17.00 GiB free, about 17.25 GiB are needed, of which 0.25 GiB for "
        "activations; fewer merge_ratios need less"
    )


def test_what_would_help_against_too_little_memory(place):
    line = refusal(made_up(place), memory=18 * GIB)[0]
    assert "what is searched at a time (4.00 GiB)" in line and "or set merge_headers: false, or" in line
    assert "merge_headers" not in refusal(made_up(place), memory=16 * GIB - 1)[0]  # it would not help
    line = refusal(made_up(place, arithmetic=Arithmetic(torch.float32), device=torch.device("cpu")), memory=18 * GIB)[0]
    assert (
        "close other programs" in line
        and "set compute_dtype: bfloat16, which takes half, or use a machine with more" in line
    )


def test_room_is_what_the_machine_says(place, models, monkeypatch):
    plan = made_up(place, output=place / "new/deeper/out", device=torch.device("cpu"))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 if path == place else 0))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=11))
    assert find_available(plan) == Available(place, disk=5, memory=11, refusal=None)
    assert find_available(replace(plan, device=torch.device("mps"))).memory is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (13 if device.index == 1 else 0, 99))
    assert find_available(replace(plan, device=torch.device("cuda:1"))).memory == 13
    assert list(place.iterdir()) == []  # the folder that was tried is gone


def test_what_an_unfinished_run_has_left_makes_room(place, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    (place / "out.partial").mkdir()
    (place / "out.partial/model-00001-of-00002.safetensors").write_bytes(b"weights")
    assert find_available(made_up(place, device=torch.device("cpu"))).disk == 107


def test_a_place_where_nothing_can_be_made(place, monkeypatch):
    (place / "file").write_text("")
    plan = made_up(place, output=place / "file/out", device=torch.device("cpu"))
    assert "Not a directory" in find_available(plan).refusal

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(places.tempfile, "mkdtemp", read_only)
    told = find_available(replace(plan, output=place / "out")).refusal
    assert f"nothing can be made in {place} (Read-only file system); name another one" in told
    assert refusal(plan, refusal=told) == [told]


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(place / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    candidate = tiny.make_candidate(place / "one", base)
    path = tiny.write_config(place / "my.yaml", base, [candidate], place / "out")
    before = sorted(place.iterdir())
    assert merge_monster.main(["--config", str(path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "Decisions        : 4 a candidate, 4 in all" in output and "Time (estimate)" in output
    assert "Dry run: wrote only the log logs" in output and "Layer 1/3" not in output
    assert sorted(path for path in place.iterdir() if path.name != "logs") == before
