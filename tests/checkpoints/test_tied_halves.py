"""Adapters that change one half of a tied pair of embedding and head, against the model as PEFT runs it."""

import json
import shutil
import warnings

import peft
import pytest
import tiny
import torch
from adapters import make_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modules.checkpoints.architecture import without_weights
from modules.checkpoints.candidate import adapt, open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.checkpoints.lora import open_adapter
from modules.runtime.errors import ConfigError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIES = {"ensure_weight_tying": True}
SETTINGS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding, tied": {"target_modules": ["embed_tokens"], **TIES},
    "head, tied": {"target_modules": ["lm_head"], **TIES},
    "both, tied": {"target_modules": ["embed_tokens", "lm_head"], **TIES},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole embedding, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], **TIES},
    "whole head, tied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **TIES},
    "embedding, whole head": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
}
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models by name: one tied, another that is tied, one that is not."""
    folder, tokenizer = tmp_path_factory.mktemp("bases"), tiny.bpe_tokenizer()
    kinds = {"tied": (True, 0), "other": (True, 9), "untied": (False, 4)}
    return {
        name: tiny.make_model(
            folder / name, tiny.llama_config(len(tokenizer), tied=tied, layers=1), tokenizer, seed=seed
        )
        for name, (tied, seed) in kinds.items()
    }


def live(model, adapter):
    """Logits of the model with the adapter, as PEFT runs it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PEFT, about tied weights
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)(IDS).logits


def read(model, adapter, base):
    """The candidate that the adapter makes of a model, for a base."""
    checkpoint = open_checkpoint(base, "base")
    module = without_weights(checkpoint)
    adapted = adapt(open_checkpoint(model, "model"), open_adapter(adapter, "adapter"), checkpoint, module)
    return open_candidate(adapted, checkpoint, module)


def logits_of(candidate, model):
    """What the candidate's tensors make as a whole model, whose head is its own if the candidate has one."""
    names = list(candidate.conversion)
    tensors = candidate.read(names)
    module = AutoModelForCausalLM.from_pretrained(model)
    if HEAD in tensors:
        module.lm_head.weight = torch.nn.Parameter(torch.empty_like(module.lm_head.weight))
    module.load_state_dict(tensors, strict=False)
    for name in {EMBEDDING, HEAD} & tensors.keys():
        rows = torch.tensor([7, 8, 2])
        torch.testing.assert_close(candidate.rows(name, rows), tensors[name][rows])
    with torch.no_grad():
        return module(IDS).logits


@pytest.mark.parametrize("name", SETTINGS)
def test_each_half_is_as_peft_runs_it(place, bases, name):
    adapter, _ = make_adapter(place, bases["tied"], **SETTINGS[name])
    candidate = read(bases["tied"], adapter, bases["tied"])
    found, expected = logits_of(candidate, bases["tied"]), live(bases["tied"], adapter)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(bases["tied"])(IDS).logits
    assert not torch.allclose(found, plain, atol=0.1)


@pytest.mark.parametrize("name", ["embedding", "both, tied", "whole embedding", "whole head, tied"])
def test_on_another_model_than_it_was_trained_on(place, bases, name):
    """What PEFT saves beside its own tensors, the embedding of the model that it was trained on, counts there too."""
    adapter, _ = make_adapter(place, bases["tied"], **SETTINGS[name])
    for model in ("other", "untied"):
        candidate = read(bases[model], adapter, bases["tied"])
        torch.testing.assert_close(
            logits_of(candidate, bases[model]), live(bases[model], adapter), atol=1e-3, rtol=1e-4, msg=model
        )


@pytest.mark.parametrize("name", ["embedding", "whole head", "both, tied"])
def test_where_the_file_has_both_halves(place, bases, name):
    """As .bin files of tied models have them."""
    adapter, _ = make_adapter(place, bases["tied"], **SETTINGS[name])
    folder = shutil.copytree(bases["tied"], place / "twice")
    tiny.edit_checkpoint(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    found, expected = logits_of(read(folder, adapter, folder), folder), live(folder, adapter)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_halves_that_are_to_be_the_same_are_so_to_the_bit(place, bases):
    adapter, _ = make_adapter(place, bases["tied"], **SETTINGS["both, tied"])
    tensors = read(bases["tied"], adapter, bases["tied"]).read([EMBEDDING, HEAD])
    assert torch.equal(tensors[EMBEDDING], tensors[HEAD])


def test_halves_that_are_to_be_the_same_and_lack_the_first(place, bases):
    adapter, _ = make_adapter(place, bases["tied"], **SETTINGS["head"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **TIES}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop("base_model.model.lm_head.base_layer.weight", None)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"ensure_weight_tying.*model\.embed_tokens\.weight"):
        read(bases["tied"], adapter, bases["tied"])
