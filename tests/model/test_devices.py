"""Models that accelerate spreads over devices: hooks, layers that are copied for every forward, where layers go.

No second device is needed: hooks are forced onto a model on the CPU, and layers are offloaded from the CPU to the CPU,
which takes the same path through accelerate as from a GPU.
"""

import pytest
import tiny
import torch
from accelerate import cpu_offload, dispatch_model
from architectures import ARCHITECTURES, configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.load import load_config
from modules.model.base_model import ResidentModel
from modules.model.loading import device_map_of, load_model
from modules.model.memory import place_layers, placement_of, weights_of
from modules.scoring.budget import Budget
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs
from modules.search.search import Search

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", index) for index in range(3)]


def hooked(module):
    """Every part with a hook that moves what it is given to its device."""
    return dispatch_model(module, device_map_of(module, CPU, [CPU] * 3), main_device="cpu", force_hooks=True)


def offloaded(module):
    """The middle layer without data, copied to the device for every forward."""
    cpu_offload(next(child for name, child in module.named_modules() if name.endswith((".layers.1", ".h.1"))), CPU)
    return module


MODELS = {
    "llama": lambda size: tiny.llama_config(size),
    "tied": lambda size: tiny.llama_config(size, tied=True),
    "gpt2": lambda size: tiny.gpt2_config(size),
}


@pytest.fixture(scope="module", params=MODELS)
def folders(request, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp(request.param), tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", MODELS[request.param](len(tokenizer)), tokenizer)
    return base, tiny.make_candidate(folder / "one", base)


def searched(place, base, other, spread):
    """Decisions and tensors of a search on a model that is spread in some way."""
    config = load_config(
        tiny.write_config(
            place / "my.yaml", base, [other], place / "out", merge_ratios=[0.3, 0.8], merge_method=["lerp", "slice"]
        )
    )
    checkpoint = open_checkpoint(base, "base")
    module = spread(AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False))
    model, tokenizer = ResidentModel(module, checkpoint, None), AutoTokenizer.from_pretrained(base)
    model.check_weights()
    encoded = encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens)
    search = Search(model, build_scorer(model, encoded, Budget(tokens=40)), config, tokenizer)
    candidate = open_candidate(open_checkpoint(other, "other"), checkpoint, model.module)
    decisions = list(search.candidate(candidate))
    return decisions, model.tensors


def plain(module):
    return module


@pytest.mark.sampled(4)
@pytest.mark.parametrize("spread", [hooked, offloaded], ids=lambda spread: spread.__name__)
def test_a_spread_model_is_searched_like_any_other(tmp_path, folders, spread):
    expected, tensors = searched(tmp_path, *folders, plain)
    found, others = searched(tmp_path, *folders, spread)
    assert found == expected and any(decision.ratio for decision in found if decision.layer == 1)
    assert others.keys() == tensors.keys()
    assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_device_map_places_every_tensor_once(name):
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(configuration(name, 300))
    placed = device_map_of(module, GPUS[0], GPUS[1:])
    for tensor, _ in (*module.named_parameters(), *module.named_buffers()):
        owners = [part for part in placed if tensor == part or tensor.startswith(f"{part}.")]
        assert len(owners) == 1, tensor
        numbers = [part for part in tensor.split(".") if part.isdecimal()]
        assert placed[owners[0]] == (GPUS[1 + int(numbers[0])] if numbers else GPUS[0])


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "OPT"])
def test_a_model_is_loaded_by_such_a_map(tmp_path, name):
    """As accelerate and transformers take it, without a device that is not there."""
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path, configuration(name, len(tokenizer)), tokenizer)
    checkpoint = open_checkpoint(base, "base")
    loaded = load_model(checkpoint, "cpu", "bfloat16", placement=[CPU, CPU])
    expected = load_model(checkpoint, "cpu", "bfloat16").module.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.module.state_dict().items())
    assert loaded.describe()["Device"] == "cpu"


def test_layers_fill_one_device_after_another():
    layers = [10] * 8
    assert place_layers(layers, 5, 20, {GPUS[0]: 105}) is None  # all fit
    assert place_layers(layers, 5, 20, {GPUS[0]: 104}) == [GPUS[0]] * 7 + [CPU]
    assert place_layers(layers, 5, 20, {GPUS[0]: 50, GPUS[1]: 50, GPUS[2]: 90}) == (
        [GPUS[0]] * 2 + [GPUS[1]] * 3 + [GPUS[2]] * 3
    )
    assert place_layers(layers, 5, 20, {GPUS[0]: 50, GPUS[1]: 20, GPUS[2]: 45}) == (
        [GPUS[0]] * 2 + [GPUS[2]] * 2 + [CPU] * 4
    )
    assert place_layers(layers, 500, 20, {GPUS[0]: 50, GPUS[1]: 50}) == [GPUS[1]] * 3 + [CPU] * 5


def test_only_where_the_choice_is_left_layers_are_spread(folders, monkeypatch):
    module = AutoModelForCausalLM.from_pretrained(folders[0])
    weights = weights_of(module, torch.float16, True)
    monkeypatch.setattr("modules.model.memory.free_on_accelerators", lambda: {GPUS[0]: 0})
    assert placement_of("cpu", module, torch.float16, weights) is None
    assert placement_of("cuda:1", module, torch.float16, weights) is None
    monkeypatch.setattr(
        "modules.model.memory.free_on_accelerators", lambda: {GPUS[0]: weights.held - 1, GPUS[1]: 10**9}
    )
    assert placement_of("cuda", module, torch.float16, weights) == [GPUS[0]] * 2 + [GPUS[1]]
    monkeypatch.setattr("modules.model.memory.free_on_accelerators", lambda: {GPUS[0]: weights.held, GPUS[1]: 10**9})
    assert placement_of("auto", module, torch.float16, weights) is None


@pytest.mark.gpu
def test_layers_that_stay_on_the_cpu_are_searched_too(tmp_path, folders):
    base, other = folders
    expected, _ = searched(tmp_path, base, other, lambda module: module.to(GPUS[0]))

    def left_over(module):
        places = [GPUS[0], CPU, GPUS[0]]
        return dispatch_model(module, device_map_of(module, GPUS[0], places), main_device=GPUS[0])

    found, _ = searched(tmp_path, base, other, left_over)
    assert [(d.layer, d.ratio) for d in found] == [(d.layer, d.ratio) for d in expected]
