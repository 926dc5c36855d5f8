"""Tokenizers of GGUF files: against those that the files were made of; what is mended, doubted and refused."""

import json

import gguf
import pytest
import sentencepiece
import tiny
from ggufs import write_gguf, write_sentencepiece, write_tokenizer
from huggingface_hub import constants
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import merge_monster
from modules.checkpoints.gguf_files import as_folder
from modules.checkpoints.gguf_tokenizer import check_rebuilt, rebuild_tokenizer
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.runtime.errors import ConfigError

BAR = "\uff5c"
CONTROL = (f"<{BAR}User{BAR}>", f"<{BAR}end\u2581of\u2581sentence{BAR}>", "<|im start|>", "[INST]", "<|\u00e9|>")
USER_DEFINED = ("<think>", "    ", "\u2581x")
NUMBERS = [
    "In 2024 or 1984, 12345678 of 1,000,000.\n\n10. Ten\n   11. Eleven\n",
    "It's 1st; they'LL, don't (well)... \"No!\"\n\n",
    "def f(x):\n    return x**2  # 3\n\n\n",
    "caf\u00e9 Cr\u00e8me \u65e5\u672c\u8a9e2024\u5e74 \u4e2d\u6587 \u0440\u0443\u0441 12",
]
TEXTS = [*tiny.TEXT, *NUMBERS, "  two  spaces ", "x\n \n  y\t\tz"]

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def cutting(*patterns):
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns] + [byte_level(False)]


# As the tokenizer.json of the first models of each kind has it.
FAMILIES = {
    "gpt-2": [byte_level()],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level()],
    "llama-bpe": cutting(LLAMA_3),
    "qwen2": cutting(LLAMA_3.replace("{1,3}", "")),
    "stablelm2": cutting(LLAMA_3.replace("{1,3}", "")),
    "deepseek-coder": cutting(
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"
    ),
    "deepseek-v3": cutting(
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        byte_level(),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
}  # fmt: skip


def trained(steps, control=CONTROL, user_defined=USER_DEFINED):
    """A byte-level tokenizer that has learned to cut text by some steps."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*tiny.TEXT, *NUMBERS] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def with_tokens(tokens):
    """Every text before and behind every token."""
    return TEXTS + [text + token + text for text in TEXTS for token in tokens]


def ids(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_encodes_as_the_tokenizer_that_it_was_made_of(tmp_path, family):
    original = trained(FAMILIES[family])
    file = write_tokenizer(tmp_path / "tiny.gguf", original, pre=family)
    rebuilt = rebuild_tokenizer(file)
    assert rebuilt.doubts == [] and rebuilt.tokenizer.get_vocab() == original.get_vocab()
    texts = with_tokens([*CONTROL, *USER_DEFINED, "<s>"])
    assert ids(rebuilt.tokenizer, texts) == ids(original, texts)
    special = {token.content: token.special for token in rebuilt.tokenizer.added_tokens_decoder.values()}
    assert special == {token.content: token.special for token in original.added_tokens_decoder.values()}
    assert (rebuilt.tokenizer.bos_token, rebuilt.tokenizer.eos_token) == ("<s>", "</s>")
    assert (rebuilt.tokenizer.unk_token, rebuilt.tokenizer.pad_token) == (None, None)
    check_rebuilt(file, rebuilt.tokenizer, rebuilt.lists)


def test_the_rules_that_are_tried_are_told_apart():
    """Else the test above would pass with any of them."""
    cut = {
        str([pre_tokenizers.Sequence(steps).pre_tokenize_str(text) for text in TEXTS]) for steps in FAMILIES.values()
    }
    assert len(cut) == len(FAMILIES) - 1  # qwen2 and stablelm2 are the same


SENTENCEPIECE = {
    "llama": ({}, {}),
    "no prefix": ({"add_dummy_prefix": False}, {"add_space_prefix": False}),
    "a prefix, said": ({}, {"add_space_prefix": True}),
    "no bytes": ({"byte_fallback": False, "vocab_size": 100}, {}),
}


@pytest.mark.parametrize("family", SENTENCEPIECE)
def test_scores_and_bytes_are_read_as_sentencepiece_does(tmp_path, family):
    more, keys = SENTENCEPIECE[family]
    content = tiny.sentencepiece_model(control_symbols="<|im start|>,[INST]", **more)
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    file = write_sentencepiece(tmp_path / "tiny.gguf", content, **keys)
    rebuilt = rebuild_tokenizer(file)
    assert rebuilt.doubts == []
    assert ids(rebuilt.tokenizer, TEXTS) == [model.encode(text) for text in TEXTS]
    whole = model.piece_to_id("[INST]")
    expected = [[*model.encode(text), whole, *model.encode(text)] for text in TEXTS]
    assert ids(rebuilt.tokenizer, [f"{text}[INST]{text}" for text in TEXTS]) == expected
    assert rebuilt.tokenizer("a")["input_ids"] == [model.bos_id(), *model.encode("a")]
    known = [encoded for encoded in map(model.encode, TEXTS) if model.unk_id() not in encoded]
    assert [rebuilt.tokenizer.decode(encoded) for encoded in known] == [model.decode(encoded) for encoded in known]
    assert rebuilt.tokenizer.unk_token == "<unk>" and len(rebuilt.tokenizer) == model.get_piece_size()
    check_rebuilt(file, rebuilt.tokenizer, rebuilt.lists)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"pre": "gpt-2"}, "a"),
        ({"pre": "llama-bpe"}, "<s>a"),
        ({"pre": "llama-bpe", "add_bos_token": False}, "a"),
        ({"pre": "gpt-2", "add_bos_token": True}, "<s>a"),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, "<s>a</s>"),
    ],
)
def test_what_is_put_around_a_text(tmp_path, keys, expected):
    tokenizer = rebuild_tokenizer(write_tokenizer(tmp_path / "tiny.gguf", trained(FAMILIES["gpt-2"]), **keys)).tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert "".join(one.convert_ids_to_tokens(one("a")["input_ids"])) == expected


def test_whole_words_come_before_merges_where_the_name_says_so(tmp_path):
    original = trained(FAMILIES["llama-bpe"])
    last = json.loads(original.backend_tokenizer.to_str())["model"]["merges"]
    merges = [" ".join(pair) for pair in last if "".join(pair) != "\u0120anticipation"]
    row = original.get_vocab()["\u0120anticipation"]
    for name, is_whole in (("llama-bpe", True), ("qwen2", False)):
        file = write_tokenizer(tmp_path / f"{name}.gguf", original, pre=name, merges=merges)
        assert (ids(rebuild_tokenizer(file).tokenizer, [" anticipation"]) == [[row]]) == is_whole


def test_a_token_is_whole_though_its_type_is_wrong_or_missing(tmp_path):
    original = trained(FAMILIES["gpt-2"])
    texts = with_tokens(CONTROL)
    file = write_tokenizer(tmp_path / "untyped.gguf", original, leave_out=["token_type"], pre="gpt-2")
    rebuilt = rebuild_tokenizer(file)
    assert ids(rebuilt.tokenizer, texts) == ids(original, texts)
    assert len(rebuilt.doubts) == 1
    assert "token_type" in rebuilt.doubts[0]

    normal = [gguf.TokenType.NORMAL] * len(original)
    original.chat_template = "[INST]{{ messages[0].content }}<|\u00e9|> the "
    file = write_tokenizer(tmp_path / "normal.gguf", original, pre="gpt-2", token_type=normal)
    tokenizer = rebuild_tokenizer(file).tokenizer
    assert ids(tokenizer, texts) == ids(original, texts)
    whole = {token.content for token in tokenizer.added_tokens_decoder.values()}
    assert whole == {*CONTROL, *USER_DEFINED, "<s>", "</s>"} - {"<think>"}  # no text tells what that is


def test_an_ordinary_token_that_pads_stays_ordinary(tmp_path):
    original = trained(FAMILIES["gpt-2"])
    row = original.get_vocab()["!"]
    tokenizer = rebuild_tokenizer(
        write_tokenizer(tmp_path / "tiny.gguf", original, pre="gpt-2", padding_token_id=row, unknown_token_id=row)
    ).tokenizer
    assert tokenizer.pad_token is None and tokenizer.unk_token is None
    assert row not in tokenizer.added_tokens_decoder


def test_what_the_file_leaves_open_is_doubted(tmp_path):
    original = trained(FAMILIES["smollm"])
    doubts = [
        rebuild_tokenizer(write_tokenizer(tmp_path / "tiny.gguf", original, **keys)).doubts
        for keys in ({}, {"pre": "default"}, {"pre": "mystery"})
    ]
    assert [len(found) for found in doubts] == [1, 1, 1]
    assert "mystery" in doubts[2][0]
    assert all("tokenizer.ggml.pre" in found[0] and " key tokenizer " in found[0] for found in doubts)


BROKEN = {
    "no merges": ({"leave_out": ["merges"]}, "tokenizer.ggml.merges"),
    "a merge of three": ({"merges": ["a b c"]}, "can't be rebuilt"),
    "a merge of unknown parts": ({"merges": ["a \u00e9\u00e9\u00e9"]}, "\u00e9\u00e9\u00e9"),
    "a token twice": ({"tokens": ["a"] * 607}, "tokenizer.ggml.tokens"),
    "no tokens": ({"leave_out": ["tokens"]}, "tokenizer.ggml.tokens"),
    "types of others": ({"token_type": [1, 1, 1]}, "tokenizer.ggml.token_type"),
    "BOS beyond": ({"bos_token_id": 99999}, "tokenizer.ggml.bos_token_id"),
    "pad beyond": ({"padding_token_id": 99999}, "tokenizer.ggml.padding_token_id"),
    "a role by name": ({"eos_token_id": "</s>"}, "str"),
    "of another kind": ({"model": "mystery"}, "mystery"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_lists_that_make_no_tokenizer_are_refused(tmp_path, name):
    keys, cause = BROKEN[name]
    file = write_tokenizer(tmp_path / "tiny.gguf", trained(FAMILIES["gpt-2"]), **{"pre": "gpt-2", **keys})
    with pytest.raises(ConfigError) as refused:
        rebuild_tokenizer(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert cause in str(refused.value) and " key tokenizer " in str(refused.value)


def test_scores_that_are_missing_are_refused(tmp_path):
    file = write_sentencepiece(tmp_path / "tiny.gguf", tiny.sentencepiece_model(), leave_out=["scores"])
    with pytest.raises(ConfigError, match="merges"):
        rebuild_tokenizer(file)


def test_every_difference_is_found(tmp_path):
    original = trained(FAMILIES["gpt-2"])
    file = write_tokenizer(tmp_path / "tiny.gguf", original, pre="gpt-2")
    lists = rebuild_tokenizer(file).lists
    another = {"user_defined": USER_DEFINED[:2]}, {"user_defined": (*USER_DEFINED, "more")}, {"control": CONTROL[::-1]}
    for made in another:
        with pytest.raises(ConfigError, match="key tokenizer"):
            check_rebuilt(file, trained(FAMILIES["gpt-2"], **made), lists)
    for role, token in {"bos_token": "</s>", "eos_token": "<s>", "pad_token": "</s>"}.items():
        changed = trained(FAMILIES["gpt-2"])
        setattr(changed, role, token)
        with pytest.raises(ConfigError, match=role):
            check_rebuilt(file, changed, lists)
    framed = trained(FAMILIES["gpt-2"])
    framed.add_bos_token = True
    with pytest.raises(ConfigError, match="text"):
        check_rebuilt(file, framed, lists)
    state = json.loads(original.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "[INST]"]
    cut = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>")
    cut.eos_token = "</s>"
    with pytest.raises(ConfigError, match="INST"):
        check_rebuilt(file, cut, lists)


@pytest.fixture
def models_with_control_tokens(place, monkeypatch):
    """A base and a candidate as folders."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(place / "assets"))
    tokenizer = tiny.bpe_tokenizer(extra=CONTROL)
    base = tiny.make_model(place / "base", tiny.llama_config(len(tokenizer), layers=1), tokenizer)
    return base, tiny.make_candidate(place / "one", base)


def test_a_file_as_base_or_candidate_has_the_rows_of_its_tokens(place, models_with_control_tokens, capsys):
    base, one = models_with_control_tokens
    file = write_gguf(place / "base.gguf", base, "F32")
    original = AutoTokenizer.from_pretrained(base)
    assert AutoTokenizer.from_pretrained(as_folder(file)[0]).get_vocab() == original.get_vocab()
    path = tiny.write_config(place / "my.yaml", file, [one], place / "out", merge_ratios=[0.5])
    assert merge_monster.main(["--config", str(path)]) == 0
    assert ids(AutoTokenizer.from_pretrained(place / "out"), CONTROL) == ids(original, CONTROL)
    assert "rows matched" not in capsys.readouterr().out  # for they are the same, row for row


def test_a_doubt_is_told_of_every_run(place, models_with_control_tokens):
    base, one = models_with_control_tokens
    doubtful = write_gguf(place / "doubtful.gguf", one, "F32", pre="mystery")
    for base_is_doubtful in (False, True):
        chosen = (doubtful, [one]) if base_is_doubtful else (base, [doubtful])
        path = tiny.write_config(place / "my.yaml", *chosen, place / "out")
        warnings = open_models(load_config(path), fetch=lambda job: None).warnings
        assert [f"{doubtful}: " in warning and "mystery" in warning for warning in warnings] == [True]
    path = tiny.write_config(place / "my.yaml", doubtful, [one], place / "out", tokenizer=str(base))
    assert open_models(load_config(path), fetch=lambda job: None).warnings == []
