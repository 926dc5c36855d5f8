"""Half types against float32 on the same stored weights, in every layout; some models overflow float16."""

import pytest
import tiny
import torch
from architectures import configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.arithmetic import FALLBACK, Arithmetic
from modules.model.loading import load_model
from modules.runtime.errors import TooNarrow
from modules.scoring.layout import build_scorer
from modules.scoring.narrowness import check_float16
from modules.scoring.packing import LAYOUTS
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import encode_pairs

NAMES = (
    "Llama",
    "Mistral, window 8",
    "Qwen3",
    "Gemma 2",
    "Phi",
    "GPT-2",
    "GPT-NeoX",
    "BLOOM",
    "Falcon",
    "Cohere 2",
    "Mixtral",
    "LFM2",
)
FLOAT16 = Arithmetic(torch.float16)
LAST_BITS = 8  # that a token's log-probability may be off; an overflow, or an inexact layout, is off by far more


def made(folder, name, scale):
    """A base in bfloat16. scale: of the weights of its MLPs, so that a large one overflows float16."""
    tokenizer = tiny.bpe_tokenizer()
    tiny.make_model(folder, configuration(name, len(tokenizer)), tokenizer, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for called, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("mlp" in called or "fc" in called):
                parameter.mul_(scale)
    model.save_pretrained(folder)
    return open_checkpoint(folder, "base"), AutoTokenizer.from_pretrained(folder)


def reference(folder, encoded):
    """Log-probability of every token of every phrase by plain forwards of transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for item in encoded:
        with torch.no_grad():
            logs = model(torch.tensor([item.tokens[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        found.append([float(logs[at - 1, item.tokens[at]]) for at in range(item.start, len(item.tokens))])
    return found


def scored(checkpoint, tokenizer, arithmetic):
    """A model and its scorer in float16, or in FALLBACK where that is too narrow."""
    try:
        model = load_model(checkpoint, "cpu", "auto", arithmetic, may_widen=arithmetic == FLOAT16)
        encoded = encode_pairs(tokenizer, tiny.PAIRS, model.vocabulary, model.max_tokens)
        scorer = build_scorer(model, encoded)
        check_float16(scorer, [])
        return model, scorer
    except TooNarrow:
        return scored(checkpoint, tokenizer, FALLBACK)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("scale", [1, 30, 3000])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_what_float32_gives(tmp_path, name, scale):
    checkpoint, tokenizer = made(tmp_path / "base", name, scale)
    model, scorer = scored(checkpoint, tokenizer, FLOAT16)
    assert model.arithmetic in (FLOAT16, FALLBACK)
    assert scale > 1 or model.arithmetic == FLOAT16
    expected = reference(tmp_path / "base", scorer.encoded)
    eps = torch.finfo(model.dtype).eps
    for layout in LAYOUTS[LAYOUTS.index(scorer.layout) :]:
        again = Scorer(model, scorer.encoded, layout, scorer.budget, scorer.tolerance).token_scores()
        for row, numbers in zip(again, expected, strict=True):
            assert row[: len(numbers)].tolist() == pytest.approx(numbers, rel=0, abs=LAST_BITS * eps)


def test_some_of_them_overflow(tmp_path):
    checkpoint, tokenizer = made(tmp_path / "base", "Llama", 3000)
    assert scored(checkpoint, tokenizer, FLOAT16)[0].arithmetic == FALLBACK
