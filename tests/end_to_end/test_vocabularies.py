"""Candidates with another vocabulary, or tied otherwise than the base: what is merged, said and saved."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference
import tiny
import torch
import whole
from safetensors.torch import load_file
from transformers import PhiConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Case:
    """A base and one candidate, `one`: a fine-tune of the base whose vocabulary and files are then changed."""

    line: str | None  # what is printed about the header
    family: str = "bpe"
    own: Callable | None = None  # the base's tokenizer, made of the family's
    other: Callable | None = None  # the candidate's, made of the base's
    rows: tuple = (None, None)  # of base and candidate; None is one for each token
    names: dict | None = None  # what the candidate's tokens were called in the base
    edit: Callable | None = None  # of the two folders, when they are complete
    config: Callable = tiny.llama_config
    tied: bool = False  # the base, and the candidate where it is not edited
    dtype: torch.dtype = torch.float32
    seed: int = 5

    @property
    def skipped(self):
        return self.line is not None and self.line.startswith("WARNING")

    def build(self, folder):
        tokenizer = tiny.TOKENIZERS[self.family]()
        tokenizer = self.own(tokenizer) if self.own else tokenizer
        config = self.config(self.rows[0] or len(tokenizer), layers=2, tied=self.tied)
        base = tiny.make_model(folder / "base", config, tokenizer, dtype=self.dtype)
        one = tiny.make_candidate(folder / "one", base, self.seed)
        if self.other or self.rows[1]:
            other = self.other(tokenizer) if self.other else tokenizer
            tiny.change_vocabulary(one, other, self.rows[1], self.names)
        if self.edit:
            self.edit(base, one)
        return base, one


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def adding(count, **roles):
    """With more tokens at the end."""

    def change(tokenizer):
        changed = tiny.rewritten_tokenizer(tokenizer, **roles)
        changed.add_tokens(["<|im_end|>", *(f"<|{number}|>" for number in range(1, count))], special_tokens=True)
        return changed

    return change


def lacking(count):
    """With other tokens in the last rows."""

    def change(tokenizer):
        first = len(tokenizer) - count
        names = {token: f"<|{row}|>" for token, row in tokenizer.get_vocab().items() if row >= first}
        return tiny.rewritten_tokenizer(tokenizer, names=names)

    return change


def with_more(tokenizer):
    """With two tokens that no phrase has, for which a trimmed model may lack the rows."""
    tokenizer.add_tokens(["<|more|>", "<|most|>"], special_tokens=True)
    return tokenizer


def same(tokenizer):
    return tiny.rewritten_tokenizer(tokenizer)


def sentencepiece(_):
    return tiny.spm_tokenizer()


def reversed_rows(tokenizer):
    last = len(tokenizer) - 1
    return tiny.rewritten_tokenizer(tokenizer, {token: last - row for token, row in tokenizer.get_vocab().items()})


def renamed(tokenizer, bos="<start>", eos="<end>"):
    """BOS and EOS under other names, and at each other's place."""
    rows = tokenizer.get_vocab()
    rows["<s>"], rows["</s>"] = rows["</s>"], rows["<s>"]
    return tiny.rewritten_tokenizer(tokenizer, rows, {"<s>": bos, "</s>": eos}, bos_token=bos, eos_token=eos)


def exchanged(tokenizer):
    """Each in the other's part: the tokens are there, and are matched with themselves."""
    return tiny.rewritten_tokenizer(tokenizer, bos_token="</s>", eos_token="<s>")


def ending_as_it_begins(tokenizer):
    """As GPT-2: one token is BOS and EOS. The other is an ordinary token."""
    tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def without_bos(tokenizer):
    tokenizer.bos_token = None
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def remove_tokenizer(_, one):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (one / name).unlink()


def make_tokenizer_slow(_, one):
    """A tokenizer in Python, without tokenizer.json."""
    vocabulary = json.loads((one / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    remove_tokenizer(_, one)
    (one / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (one / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {"tokenizer_class": "CTRLTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    (one / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def add_head(tensors):
    generator = torch.Generator().manual_seed(7)
    embedding = tensors[EMBEDDING]
    tensors[HEAD] = embedding + embedding.std() * torch.randn(embedding.shape, generator=generator)


def add_equal_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def drop_head(tensors):
    del tensors[HEAD]


def drop_embedding(tensors):
    tensors.setdefault(HEAD, tensors[EMBEDDING])
    del tensors[EMBEDDING]


def editing(change=None, whose="one", **settings):
    """Change the tensors and settings of one of the two checkpoints."""
    return lambda base, one: tiny.edit_checkpoint({"base": base, "one": one}[whose], change, **settings)


def tie_in_bin(_, one):
    """A .bin file has the one tensor of a tied model under both names."""
    tiny.edit_checkpoint(one, drop_head, tie_word_embeddings=True)
    tensors = load_file(one / "model.safetensors")
    torch.save({**tensors, HEAD: tensors[EMBEDDING]}, one / "pytorch_model.bin")
    (one / "model.safetensors").unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Other architectures
# ---------------------------------------------------------------------------------------------------------------------


def gpt2(vocabulary, layers, tied):
    config = tiny.gpt2_config(vocabulary, layers)
    config.tie_word_embeddings = tied
    return config


def phi(vocabulary, layers, tied):
    """Its head has a bias."""
    return PhiConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The cases, and what is printed about each; "..." is anything
# ---------------------------------------------------------------------------------------------------------------------

ALL = "Embedding and LM head: 400 of 400 rows matched by token"
BOTH = "one ties its LM head to the embedding, which is merged into both of the base's"
UNUSED = "the base ties its LM head to the embedding, so one's own LM head is ignored"
PADDED = "400 of 448 rows matched by token; the base's rows stay: 48 (without a token); one has"
STAYS = "embedding and LM head are not merged"
OLD_NAMES = {"<start>": "<s>", "<end>": "</s>"}

VOCABULARIES = {
    "the same": Case(None),
    "the same padding": Case(None, rows=(448, 448), seed=8),
    "two tokens added": Case(
        "Embedding and LM head: 420 of 420 rows matched by token; one has 422 rows, "
        "2 of them for tokens that the base lacks",
        family="spm",
        other=adding(2),
    ),
    "300 tokens added": Case(
        f"{ALL}; one has 700 rows, 300 of them for tokens that the base lacks", other=adding(300), dtype=torch.float16
    ),
    "two tokens added in the padding": Case(
        f"Embedding and LM head: {PADDED} 448 rows, 2 of them for tokens that the base lacks",
        other=adding(2),
        rows=(448, 448),
        seed=8,
    ),
    "two tokens missing": Case(
        "Embedding and LM head: 398 of 400 rows matched by token; the base's rows stay: 2 (one lacks their tokens); "
        "one has 400 rows, 2 of them for tokens that the base lacks",
        other=lacking(2),
    ),
    "too many tokens missing": Case(
        f"WARNING: one shares only 359 of the base's 400 tokens (at least 90% required); {STAYS}", other=lacking(41)
    ),
    "padded candidate": Case(f"{ALL}; one has 448 rows", rows=(None, 448), dtype=torch.float16),
    "padded base": Case(f"Embedding and LM head: {PADDED} 400 rows", rows=(448, 400), seed=8),
    "trimmed candidate": Case(
        "Embedding and LM head: 360 of 400 rows matched by token; the base's rows stay: 40 (one lacks their tokens); "
        "one has 360 rows",
        rows=(None, 360),
    ),
    "trimmed too far": Case(
        f"WARNING: one shares only 359 of the base's 400 tokens (at least 90% required); {STAYS}", rows=(None, 359)
    ),
    "padded base, trimmed candidate": Case(
        "Embedding and LM head: 398 of 448 rows matched by token; the base's rows stay: 2 (one lacks their tokens) "
        "and in 48 (they have no token); one has 398 rows",
        rows=(448, 398),
        seed=8,
    ),
    "trimmed base": Case(
        f"{ALL}; one has 402 rows, 2 of them for tokens that the base lacks",
        own=with_more,
        other=same,
        rows=(400, None),
    ),
    "permuted": Case(f"{ALL}, 400 of them at a different index", other=reversed_rows),
    "permuted, SentencePiece": Case(
        "Embedding and LM head: 420 of 420 rows matched by token, 420 of them at a different index",
        family="spm",
        other=reversed_rows,
    ),
    "permuted, tied": Case(f"{ALL}, 400 of them at a different index", other=reversed_rows, tied=True),
    "permuted, a head with a bias": Case(f"{ALL}, 400 of them at a different index", other=reversed_rows, config=phi),
    "permuted, a tied head with a bias": Case(
        f"{ALL}, 400 of them at a different index", other=reversed_rows, config=phi, tied=True, seed=6
    ),
    "permuted, GPT-2": Case(
        f"{ALL}, 400 of them at a different index", other=reversed_rows, config=gpt2, tied=True, seed=8
    ),
    "another EOS beside the old one": Case(
        f"{ALL}; one has 401 rows, 1 of them for tokens that the base lacks",
        other=adding(1, eos_token="<|im_end|>"),
    ),
    "BOS and EOS exchanged": Case(None, other=exchanged),
    "BOS and EOS renamed": Case(
        f"{ALL}, BOS or EOS by role (<s> with <start>, </s> with <end>), 2 of them at a different index",
        other=renamed,
        names=OLD_NAMES,
    ),
    "BOS and EOS renamed, SentencePiece": Case(
        "Embedding and LM head: 420 of 420 rows matched by token, "
        "BOS or EOS by role (<s> with <start>, </s> with <end>), 2 of them at a different index",
        family="spm",
        other=renamed,
        names=OLD_NAMES,
    ),
    "one token for BOS and EOS": Case(
        "Embedding and LM head: 399 of 400 rows matched by token, "
        "BOS or EOS by role (</s> with <end>), 1 of them at a different index; "
        "the base's rows stay: 1 (one lacks their tokens); "
        "one has 400 rows, 1 of them for tokens that the base lacks",
        own=ending_as_it_begins,
        other=renamed,
        names=OLD_NAMES,
    ),
    "a base without BOS": Case(
        "Embedding and LM head: 399 of 400 rows matched by token, BOS or EOS by role (</s> with <end>), ...",
        own=without_bos,
        other=renamed,
        names=OLD_NAMES,
    ),
    "a tokenizer in Python": Case(None, edit=make_tokenizer_slow),
    "no tokenizer files": Case(
        f"WARNING: .../one: no usable tokenizer (...), so none of the 400 rows can be matched; {STAYS}",
        edit=remove_tokenizer,
    ),
    "no tokenizer files, GPT-2": Case(
        f"WARNING: .../one: no usable tokenizer (...), so none of the 400 rows can be matched; {STAYS}",
        config=gpt2,
        tied=True,
        edit=remove_tokenizer,
        seed=8,
    ),
    "wholly different": Case(
        f"WARNING: one shares only 121 of the base's 400 tokens (at least 90% required); {STAYS}", other=sentencepiece
    ),
}

TYINGS = {
    "untied candidate of a tied base": Case(
        f"{ALL}; {UNUSED}", tied=True, edit=editing(add_head, tie_word_embeddings=False)
    ),
    "tied candidate of an untied base": Case(f"{ALL}; {BOTH}", edit=editing(drop_head, tie_word_embeddings=True)),
    "tied candidate of an untied base, tokens added": Case(
        f"{ALL}; one has 402 rows, 2 of them for tokens that the base lacks; {BOTH}",
        other=adding(2),
        edit=editing(drop_head, tie_word_embeddings=True),
    ),
    "untied candidate of a tied base, permuted": Case(
        f"{ALL}, 400 of them at a different index; {UNUSED}",
        other=reversed_rows,
        tied=True,
        edit=editing(add_head, tie_word_embeddings=False),
    ),
    # transformers ties by the configuration, unless both are stored and differ.
    "candidate that says it is tied but has a head": Case(None, edit=editing(tie_word_embeddings=True)),
    "candidate that says it is tied but has a head, of a tied base": Case(
        f"{ALL}; {UNUSED}", tied=True, edit=editing(add_head)
    ),
    "tied candidate that stores its embedding twice": Case(
        f"{ALL}; {BOTH}", edit=editing(add_equal_head, tie_word_embeddings=True)
    ),
    "tied candidate that stores its embedding twice, of a tied base": Case(
        None, tied=True, edit=editing(add_equal_head)
    ),
    "tied candidate in a .bin file": Case(f"{ALL}; {BOTH}", edit=tie_in_bin),
    "tied candidate that stores only its head": Case(
        f"{ALL}; {BOTH}", edit=editing(drop_embedding, tie_word_embeddings=True), seed=6
    ),
    "tied candidate that stores only its head, of a tied base": Case(None, tied=True, edit=editing(drop_embedding)),
    "tied base that stores only its head": Case(None, tied=True, edit=editing(drop_embedding, "base")),
    "tied base that stores its embedding twice": Case(None, tied=True, edit=editing(add_equal_head, "base")),
    "base that says it is tied but has a head": Case(f"{ALL}; {BOTH}", tied=True, edit=editing(add_head, "base")),
    "untied candidate without a head": Case(f"WARNING: one has no {HEAD}; {STAYS}", edit=editing(drop_head)),
    "untied candidate without an embedding": Case(
        f"WARNING: one has no {EMBEDDING}; {STAYS}", edit=editing(drop_embedding)
    ),
}
CASES = VOCABULARIES | TYINGS


@pytest.fixture(scope="module")
def merged(tmp_path_factory, asked):
    """The cases, merged by the program; the outputs reopened together in one other process."""
    torch.set_num_threads(1)  # the fixture that does this for every test comes after this one
    place = tmp_path_factory.mktemp("vocabularies")
    runs = {name: run(place / str(number), case) for number, (name, case) in enumerate(CASES.items()) if name in asked}
    whole.reopen(runs.values())
    return runs


def run(folder, case):
    base, one = case.build(folder)
    return whole.run(folder, base, [one])


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_became_of_the_header(merged, name):
    assert merged[name].code == 0, merged[name].output
    output, expected = merged[name].output.splitlines(), CASES[name].line
    told = [
        line.startswith(("Embedding and LM head:", "WARNING:")) and " config.json differs " not in line
        for line in output
    ]
    lines = [number for number, one in enumerate(told) if one]
    assert len(lines) == (expected is not None), [output[number] for number in lines]
    if expected is not None:
        line, composition, decision = output[lines[0] : lines[0] + 3]
        assert re.fullmatch(re.escape(expected).replace(re.escape("..."), ".*"), line), line
        assert composition.startswith("[[1.0, 'base']") and " - Header - " in decision


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", CASES)
def test_the_run_decides_as_the_naive_merge(merged, name):
    one, case = merged[name], CASES[name]
    naive = reference.NaiveMerge(
        one.folder / "base",
        [one.folder / "one"],
        tiny.PAIRS,
        whole.RATIOS,
        ["lerp"],
        headers=not case.skipped,
        auto_weights=True,
        saved_dtype=case.dtype,
    ).run()
    decisions = one.decisions[:-1] if case.skipped else one.decisions
    assert len(decisions) == len(naive.decisions)
    for (_, changed, total), expected in zip(decisions, naive.decisions, strict=True):
        assert changed == (expected.ratio is not None)
        assert total == pytest.approx(expected.after, rel=1e-4, abs=1e-4)
    weights, tolerance = naive.model.state_dict(), 1e-6 if case.dtype == torch.float32 else 2e-3
    for key, tensor in reference.load(one.folder / "out", torch.float32).state_dict().items():
        assert torch.allclose(tensor, weights[key], atol=tolerance), key


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", CASES)
def test_layers_are_merged_and_the_header_unless_it_is_skipped(merged, name):
    *layers, (what, header_changed, _) = merged[name].decisions
    assert len(layers) == 2 and what == "Header"
    assert any(changed for _, changed, _ in layers), "nothing was merged: the test shows nothing"
    assert header_changed != CASES[name].skipped


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", CASES)
def test_what_was_scored_is_what_was_saved(merged, name):
    whole.check_reopened(merged[name])


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", CASES)
def test_the_output_has_the_bases_tensors(merged, name):
    whole.check_stored(merged[name])
