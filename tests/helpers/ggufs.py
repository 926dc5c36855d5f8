"""Tiny models written as GGUF files, as llama.cpp's own converter writes them."""

import json

import gguf
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_gguf(file, folder, kind="F16", leave_out=(), architecture="llama", **keys):
    """A Llama of a folder as a GGUF file, its matrices stored as `kind`. leave_out: tensors, by their names there;
    keys: as in `write_tokenizer`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(file, architecture)
    _describe(writer, model.config)
    _add_keys(writer, {**_described(AutoTokenizer.from_pretrained(folder)), **keys})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        if stored not in leave_out:
            _add_tensor(writer, stored, _permuted(name, tensor, model.config).numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _describe(writer, config):
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)


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
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
