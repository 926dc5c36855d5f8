"""LoRA adapters: trained ones, as PEFT saves them, and the smallest that there is, written by hand."""

import json

import peft
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(folder, base, seed=5, **settings):
    """An adapter with trained weights, as PEFT saves it; the same merged by PEFT; both folders."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder / "adapter")
    whole = adapted.merge_and_unload()
    whole.save_pretrained(folder / "whole")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "whole")
    return folder / "adapter", folder / "whole"


def write_adapter(folder, base, **settings):
    """An adapter of one weight, two ranks and nothing else."""
    name = "model.layers.0.mlp.up_proj"
    shape = load_file(base / "model.safetensors")[f"{name}.weight"].shape
    sides = {"A": torch.ones(2, shape[1]), "B": torch.ones(shape[0], 2)}
    folder.mkdir()
    stored = {f"base_model.model.{name}.lora_{side}.weight": tensor for side, tensor in sides.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def make_bench(folder, **settings):
    """The smallest models that make a run: a base, a candidate `one`, an adapter with these settings; the folder."""
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(
        folder / "base", tiny.llama_config(len(tokenizer), layers=2, hidden=16, positions=64), tokenizer
    )
    tiny.make_candidate(folder / "one", base, 1)
    write_adapter(folder / "adapter", base, **settings)
    return folder
