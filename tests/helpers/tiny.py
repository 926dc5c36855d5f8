"""Tiny seeded models and tokenizers, written to disk as real checkpoints."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from modules.config.phrase_lists import Pair

TEXT = [
    "Her body quivers with anticipation, and the atmosphere is thick with anticipation.",
    "Filled with an unwavering determination, her eyes were filled with determination.",
    "It sent shivers down her spine. His voice was barely above a whisper.",
    "The apple is in the bedroom because that is where you dropped the apple.",
    "Question: where is the apple? Explain your reasoning. Answer: The apple is in the kitchen.",
    "Crème brûlée, naïve café: \u65e5\u672c\u8a9e and \U0001f642 too.",
]

PAIRS = (
    Pair("BAD", "anticipation", "Her body quivers with ", 10.0),
    Pair("BAD", "anticipation", "The atmosphere is thick with ", 10.0),
    Pair("BAD", "unwavering", "Filled with an", 1.0),
    Pair("BAD", "determination", "Her eyes were filled with ", 2.0),
    Pair("GOOD", "The apple is in the bedroom", "Question: where is the apple? Explain your reasoning. Answer: ", 3.0),
)


def bpe_tokenizer(extra=(), eos="</s>"):
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it; no BOS is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT * 2, trainer)
    tokenizer.add_special_tokens(list(extra))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)


def spm_tokenizer(extra=(), eos="</s>"):
    """SentencePiece-like BPE, as Llama 1 and 2 and Mistral have it: a dummy space in front, byte fallback, BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special)
    tokenizer.train_from_iterator([line.encode("ascii", "ignore").decode() for line in TEXT * 2], trainer)
    tokenizer.pre_tokenizer = None
    data = json.loads(tokenizer.to_str())
    # Bytes are ordinary tokens: a special one would be found in the middle of a text.
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens(list(extra))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, unk_token="<unk>")


def sentencepiece_model(kind="bpe", **more):
    """A model of SentencePiece as it is in a file."""
    written, settings = io.BytesIO(), {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings |= {"vocab_size": 350, "byte_fallback": True, **more}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 9), model_writer=written, model_type=kind, minloglevel=2, **settings
    )
    return written.getvalue()


TOKENIZERS = {"bpe": bpe_tokenizer, "spm": spm_tokenizer}


class WithoutOffsets:
    """A tokenizer of the kind that gives no offsets: a fast one, asked for ids only."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


def llama_config(vocabulary, layers=3, hidden=32, tied=False, positions=256, **more):
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        **more,
    )


def gpt2_config(vocabulary, layers=3):
    return GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=layers, n_head=4, n_positions=128)


def make_model(folder, config, tokenizer=None, seed=0, dtype=torch.float32, scale=4.0, shard=None):
    """A seeded random model with weights large enough that phrases differ in probability by far more than rounding."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)


def make_candidate(folder, base, seed=1, amount=0.05, dtype=None, change=None):
    """A fine-tune of a base: every weight moved, relative to its size; `change` may alter the model further."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * amount * 10 * parameter.float().std()
            parameter.copy_((parameter.float() + noise).to(parameter.dtype))
        if change:
            change(model)
    model.to(dtype or model.dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return Path(folder)


def phrase_entries(pairs, kind):
    return [
        {"phrase": list(pair.variants) or pair.phrase, "weight": pair.weight, "contexts": [pair.context]}
        for pair in pairs
        if pair.kind == kind
    ]


def write_config(path, base, candidates, output, pairs=PAIRS, **more):
    """A YAML file as a user would write it."""
    document = {
        "device": "cpu",
        "neutral_texts": [],  # each of thousands of tests would measure drift,
        "own_texts": [],  # on answers of the base as well,
        "baselines": False,  # score its candidates whole,
        "samples": [],  # and ask base and merge
        "directories": {"model_path1": str(base), "output_directory": str(output)},
        "models_to_merge": [str(candidate) for candidate in candidates],
        "bad_phrases": phrase_entries(pairs, "BAD"),
        "good_phrases": phrase_entries(pairs, "GOOD"),
        **more,
    }
    path = Path(path)
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return path


def save_as_bin(folder):
    """Turn a checkpoint's safetensors file into a .bin file."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def rewritten_tokenizer(tokenizer, rows=None, names=None, **special):
    """A tokenizer's vocabulary at other rows (by token) or under other names (by token); it can't encode.

    special: its bos_token and eos_token, where they are others.
    """
    data, names = json.loads(tokenizer.backend_tokenizer.to_str()), names or {}
    rows = rows or tokenizer.get_vocab()
    data["model"]["merges"], data["post_processor"] = [], None
    data["model"]["vocab"] = {names.get(token, token): rows[token] for token in data["model"]["vocab"]}
    for token in data["added_tokens"]:
        token["id"], token["content"] = rows[token["content"]], names.get(token["content"], token["content"])
    roles = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, **special}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **roles)


def change_vocabulary(folder, tokenizer, rows=None, names=None):
    """Give a checkpoint another tokenizer and so many rows: a token's row moves with it, other rows are random.

    names: what a token of the new tokenizer was called in the old one.
    """
    old, names = AutoTokenizer.from_pretrained(folder).get_vocab(), names or {}
    model, rows = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), rows or len(tokenizer)
    before = [tensor.clone() for tensor in header_tensors(model)]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for tensor, was in zip(header_tensors(model), before, strict=True):
            tensor.copy_(torch.randn(tensor.shape) * was.float().std())
            for token, row in tokenizer.get_vocab().items():
                place = old.get(names.get(token, token), len(was))
                if row < rows and place < len(was):
                    tensor[row] = was[place]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def header_tensors(model):
    """The weights of a model that have a row for every token."""
    head = model.get_output_embeddings()
    tensors = {id(tensor): tensor for tensor in (model.get_input_embeddings().weight, head.weight, head.bias)}
    return [tensor for tensor in tensors.values() if tensor is not None]


def edit_checkpoint(folder, change=None, **settings):
    """Change the tensors of a checkpoint's only file, a dict, and settings of its config.json."""
    tensors = load_file(folder / "model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")


def bfloat16_depends_on_shape():
    """Whether this processor's bfloat16 products of many rows differ in some digit from those of single rows. One
    without instructions for bfloat16 computes both alike, and there is no rounding to be seen."""
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(96, 64, generator=chance).bfloat16()
    weight = torch.randn(160, 64, generator=chance).bfloat16()
    each = [torch.nn.functional.linear(row[None], weight) for row in rows]
    return not torch.equal(torch.nn.functional.linear(rows, weight), torch.cat(each))
