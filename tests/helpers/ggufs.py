"""Tiny models written as GGUF files, as llama.cpp's own converter writes them."""

import json
import math

import gguf
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NORMS_FROM_ONE = ("gemma2", "gemma3", "nemotron")  # whose norms' weights the converter stores with one added
GATE_AND_UP = "experts.gate_up_proj"


def write_gguf(
    file, folder, kind="F16", leave_out=(), architecture="llama", keys=None, tensors=None, name="tiny", **more
):
    """A model's folder as a GGUF file, its matrices stored as `kind`.

    leave_out: tensors and keys, by their names there. keys: further ones, without the architecture, or other values.
    tensors: further ones, by name. more: of the tokenizer, as in `write_tokenizer`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    for key, value in {**_settings(model.config), **_rope(model.config), **(keys or {})}.items():
        if key not in leave_out:
            _add_key(writer, key if key.startswith("other.") else f"{architecture}.{key}", value)
    _add_keys(writer, {**_described(AutoTokenizer.from_pretrained(folder)), "pre": "gpt-2", **more})
    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds.get(architecture, gguf.MODEL_ARCH.LLAMA), model.config.num_hidden_layers)
    for name, tensor in _stored(model, architecture):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if stored not in leave_out:
            _add_tensor(writer, stored, tensor.contiguous().numpy(), kind)
    for name, tensor in {**rope_factors(model.config), **(tensors or {})}.items():
        _add_tensor(writer, name, tensor.numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _stored(model, architecture):
    """A model's tensors as the converter stores them."""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith(GATE_AND_UP):
            half = tensor.shape[1] // 2
            for part, rows in (("gate", tensor[:, :half]), ("up", tensor[:, half:])):
                yield f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight", rows
        elif name.endswith("experts.down_proj"):
            yield f"blk.{name.split('.')[2]}.ffn_down_exps.weight", tensor
        elif name.endswith("shared_expert_gate.weight"):
            yield name, tensor.squeeze(0)  # as llama.cpp's quantiser leaves it
        elif architecture in NORMS_FROM_ONE and name.endswith("norm.weight"):
            yield name, tensor + 1
        else:
            yield name, _permuted(name, tensor, model.config) if architecture == "llama" else tensor


def _settings(config):
    """The keys of an architecture, without its name."""
    heads = config.num_attention_heads
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    for key, names in {
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("norm_epsilon", "layer_norm_eps"),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
        "attention.sliding_window": ("sliding_window",),
        "expert_count": ("num_experts",),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    }.items():
        value = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        if value is not None:
            found[key] = value
    return found


def _rope(config):
    """The keys of the rotary embedding, without the architecture."""
    rope = config.rope_parameters
    found = {}
    if "sliding_attention" in rope:
        found["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found["rope.freq_base"] = rope["rope_theta"]
    found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if "beta_fast" in rope:
            found["rope.scaling.yarn_beta_fast"] = rope["beta_fast"]
        if "attention_factor" in rope:
            found["rope.scaling.attn_factor"] = rope["attention_factor"] / (0.1 * math.log(rope["factor"]) + 1)
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        grown = config.max_position_embeddings / original
        found["rope.scaling.original_context_length"] = original
        usual = math.sqrt(1 + math.log(grown) / math.log(original))
        found["rope.scaling.attn_factor"] = rope.get("attention_factor", usual)
    return found


def rope_factors(config):
    """The tensors of the rotary embedding."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    low, high, old = (rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    factors = []
    for i in range(0, config.head_dim, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        smooth = (old / length - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < old / high else rope["factor"] if length > old / low else between)
    return {"rope_freqs.weight": torch.tensor(factors)}


def _add_key(writer, key, value):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def write_tokenizer(file, tokenizer, leave_out=(), **keys):
    """A byte-level tokenizer as a GGUF file that has nothing else. leave_out, keys: of tokenizer.ggml, by the end of
    their names; keys are put in the place of what the tokenizer has."""
    return _write_keys(file, {**_described(tokenizer), **keys}, leave_out)


def write_sentencepiece(file, content, leave_out=(), **keys):
    """The same of a model of SentencePiece, as it is in a file."""
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    numbers = range(model.get_piece_size())
    described = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(number) for number in numbers],
        "scores": [model.get_score(number) for number in numbers],
        "token_type": [_piece_type(model, number) for number in numbers],
    }
    roles = {"bos": model.bos_id(), "eos": model.eos_id(), "unknown": model.unk_id(), "padding": model.pad_id()}
    described |= {f"{role}_token_id": number for role, number in roles.items() if number >= 0}
    return _write_keys(file, {**described, **keys}, leave_out)


def _piece_type(model, number):
    kinds = (
        (model.is_unknown, gguf.TokenType.UNKNOWN),
        (model.is_byte, gguf.TokenType.BYTE),
        (model.is_control, gguf.TokenType.CONTROL),
        (model.is_unused, gguf.TokenType.UNUSED),
    )
    return next((kind for is_kind, kind in kinds if is_kind(number)), gguf.TokenType.NORMAL)


def _described(tokenizer):
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    rows = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = {
        token.content: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        for token in tokenizer.added_tokens_decoder.values()
    }
    described = {
        "model": "gpt2",
        "tokens": rows,
        "token_type": [kinds.get(row, gguf.TokenType.NORMAL) for row in rows],
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
    }
    return {key: value for key, value in described.items() if value is not None}


def _write_keys(file, described, leave_out):
    writer = gguf.GGUFWriter(file, "llama")
    _add_keys(writer, {key: value for key, value in described.items() if key not in leave_out})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def _add_keys(writer, described):
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in described.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        add[type(value)](name, value)


def _add_tensor(writer, name, values, kind):
    kind = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _permuted(name, tensor, config):
    """llama.cpp has the two halves of a head's rotation side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
