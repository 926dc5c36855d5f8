"""What rounding alone makes of scores: three ways to score the same, which differ by that and nothing else."""

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, configuration
from transformers import AutoTokenizer

from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.loading import load_model
from modules.runtime.distributed import Rank
from modules.scoring.budget import Budget
from modules.scoring.layout import build_scorer
from modules.scoring.packing import LAYOUTS
from modules.scoring.scorer import Scorer, other_ways, spreads
from modules.scoring.tokenization import encode_pairs


def scored(folder, config, dtype, layout=None, tokenizer=None):
    """The base's scores in every way, (ways, pairs)."""
    tokenizer = tokenizer or tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", config, tokenizer, scale=3.0)
    model = load_model(open_checkpoint(base, "base"), "cpu", dtype)
    encoded = encode_pairs(AutoTokenizer.from_pretrained(base), tiny.PAIRS, model.vocabulary, model.max_tokens)
    scorer = Scorer(model, encoded, layout) if layout else build_scorer(model, encoded)
    return [scorer.score(), *(way() for way in other_ways(scorer))]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_float32_all_ways_agree(tmp_path, name):
    tokenizer = tiny.bpe_tokenizer()
    ways = scored(tmp_path, configuration(name, len(tokenizer)), "float32", tokenizer=tokenizer)
    assert len(ways) == 3
    for other in ways[1:]:
        assert other == pytest.approx(ways[0], abs=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_a_half_type_they_differ_a_little(tmp_path, layout):
    ways = scored(tmp_path, tiny.llama_config(400), "bfloat16", layout)
    assert len(ways) == 3
    found = spreads(ways)
    assert (1e-6 if layout != "single" and tiny.bfloat16_depends_on_shape() else 0) <= max(found) < 0.3
    assert found == [max(column) - min(column) for column in torch.tensor(ways, dtype=torch.float64).T.tolist()]


def test_smaller_packs_in_all_processes_alike(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    model = load_model(open_checkpoint(base, "base"), "cpu", "float32")
    encoded = encode_pairs(tokenizer, tiny.PAIRS, model.vocabulary, model.max_tokens)
    shares = [Scorer(model, encoded, "rows", Budget(tokens=64), rank=Rank(number, 2)) for number in range(2)]
    smaller = [share.in_smaller_packs() for share in shares]
    assert smaller[0].packs == smaller[1].packs > shares[0].packs
    whole = [sum(parts) for parts in zip(*(share.score() for share in smaller), strict=True)]
    assert whole == pytest.approx(Scorer(model, encoded, "single").score(), abs=1e-4)
    assert Scorer(model, encoded, "single").in_smaller_packs() is None
