"""Models whose only tokenizer file is one of SentencePiece, or looks like one."""

import json

import pytest
import sentencepiece
import tiny
from safetensors.torch import load_file

import merge_monster
from modules.checkpoints.checkpoint import load_tokenizer

TEXT = "The apple is in the kitchen, na\u00efve \U0001f642\n  and more."
GEMMA = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False, "control_symbols": "<mask>"}
GEMMA |= {"bos_piece": "<bos>", "eos_piece": "<eos>"}


def folder_of(place, model_type, content, name="tokenizer.model", tokenizer_class=None):
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    (place / name).write_bytes(content)
    if tokenizer_class:
        (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    return place


FAMILIES = {
    "llama": ("llama", "bpe", {}, "LlamaTokenizer"),
    "llama without settings": ("llama", "bpe", {}, None),
    "mistral": ("mistral", "bpe", {}, "LlamaTokenizer"),
    "gemma": ("gemma", "bpe", GEMMA, "GemmaTokenizer"),
    "stablelm": ("stablelm", "bpe", {}, None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_alone_encodes_as_sentencepiece_does(tmp_path, family):
    model_type, kind, more, tokenizer_class = FAMILIES[family]
    content = tiny.sentencepiece_model(kind, **more)
    tokenizer = load_tokenizer(folder_of(tmp_path / "model", model_type, content, tokenizer_class=tokenizer_class))
    expected = sentencepiece.SentencePieceProcessor(model_proto=content).encode(TEXT)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected


def test_models_that_have_nothing_else_are_merged(place):
    content = tiny.sentencepiece_model("bpe")
    size = sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()
    for seed, name in enumerate(("base", "one")):
        tiny.make_model(place / name, tiny.llama_config(size, layers=1), None, seed)
        (place / name / "tokenizer.model").write_bytes(content)
    path = tiny.write_config(place / "my.yaml", place / "base", [place / "one"], place / "out", merge_ratios=[0.5])
    assert merge_monster.main(["--config", str(path)]) == 0
    assert (place / "out/tokenizer.model").read_bytes() == content
    assert load_tokenizer(place / "out").get_vocab() == load_tokenizer(place / "base").get_vocab()
    assert load_file(place / "out/model.safetensors").keys() == load_file(place / "base/model.safetensors").keys()
