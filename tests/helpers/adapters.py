"""LoRA adapters: trained ones, as PEFT saves them."""

import peft
import torch
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
