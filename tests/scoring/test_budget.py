"""How much memory scoring allows itself, and that many long pairs stay within it."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from project import environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modules.model.memory import Sizes
from modules.scoring.budget import (
    FEWEST_TOKENS,
    LOGITS_ELSEWHERE,
    LOGITS_ON_CPU,
    TOKENS,
    Budget,
    budget_of,
    layer_bytes,
)
from modules.scoring.packing import Inputs, attention_mask, build_packs, depths, tree_mask
from modules.scoring.tokenization import Encoded

GIB = 1 << 30
LLAMA_7B = Sizes(32, 4096, 14336, 32, 32000)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_with_room_enough_packs_are_as_large_as_is_good():
    found = budget_of(LLAMA_7B, torch.float16, CUDA, 4, 60 * GIB)
    assert (found.tokens, found.logits, found.cache) == (TOKENS, LOGITS_ELSEWHERE, 15 * GIB)
    assert found.cache_beside > 0  # in the CPU's memory
    found = budget_of(LLAMA_7B, torch.float32, CPU, 4, 60 * GIB)
    assert (found.tokens, found.logits, found.cache, found.cache_beside) == (TOKENS, LOGITS_ON_CPU, 15 * GIB, 0)


@pytest.mark.parametrize("stack", [1, 4, 32])
@pytest.mark.parametrize("free", [GIB // 4, GIB, 3 * GIB])
@pytest.mark.parametrize("keeps_attention", [False, True])
def test_what_is_allowed_fits_into_what_is_free(stack, free, keeps_attention):
    sizes = replace(LLAMA_7B, keeps_attention=keeps_attention)
    found = budget_of(sizes, torch.float16, CUDA, stack, free)
    assert found.tokens & (found.tokens - 1) == 0  # a power of two: bytes more or less change nothing
    layer = layer_bytes(sizes, torch.float16, found.tokens, stack)
    assert layer <= free / 2 or found.tokens == FEWEST_TOKENS
    if found.tokens < TOKENS:
        assert layer_bytes(sizes, torch.float16, 2 * found.tokens, stack) > free / 2
    assert found.logits <= free / 8 and found.cache <= free / 4


@pytest.mark.parametrize("free", [0, -GIB, None])
def test_nothing_free_and_nothing_known_are_no_errors(free):
    found = budget_of(LLAMA_7B, torch.float16, CUDA, 4, free)
    assert found.tokens == (TOKENS if free is None else FEWEST_TOKENS) and found.logits > 0


def test_a_budget_can_be_halved_for_ever():
    budget = Budget()
    for _ in range(100):
        budget = budget.halved()
    assert (budget.tokens, budget.logits, budget.cache) == (1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=st.integers(0, 999))
def test_a_packs_mask_is_that_of_every_tokens_ancestors(seed, dtype):
    """The fast mask against the obvious one, on random lists with many shared beginnings."""
    chance = random.Random(seed)
    lists = [[chance.randrange(3) for _ in range(chance.randint(2, 9))] for _ in range(chance.randint(1, 30))]
    encoded = [Encoded(tuple(tokens), 1) for tokens in lists]
    for pack in build_packs(encoded, "forest", chance.choice([1, 10, 40, 1000])):
        found = Inputs.of(pack, CPU, dtype).arguments()
        seen = attention_mask(pack.parents)
        assert torch.equal(found["attention_mask"], tree_mask(seen, dtype))
        assert torch.equal(found["position_ids"], depths(seen))


# ---------------------------------------------------------------------------------------------------------------------
# 2,000 pairs with contexts up to 1,500 tokens
# ---------------------------------------------------------------------------------------------------------------------

SEARCH = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer, logging
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config import Pair
from modules.scoring.budget import Budget
from modules.model.loading import load_model
from modules.scoring.tokenization import encode_pairs
from modules.scoring.layout import build_scorer
from long_pairs import long_pairs

def resident(peak):
    if peak == 0:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

folder, count, layout = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
logging.set_verbosity_error()
model = load_model(open_checkpoint(Path(folder), "model"), "cpu", "float32")
encoded = encode_pairs(AutoTokenizer.from_pretrained(folder), long_pairs(count), model.vocabulary, model.max_tokens)
before = resident(0)
scorer = build_scorer(model, encoded, Budget(cache=count << 12))
scorer.at_layer(1)
part = model.layer(1)
theirs = {name: tensor + 0.01 for name, tensor in part.tensors.items()}
scores = scorer.score_trials([lambda: part.holding(theirs), lambda: part.holding(part.tensors)])
print(json.dumps({"bytes": resident(1) - before, "tokens": scorer.packed_tokens, "packs": len(scorer.packs_here),
    "layout": scorer.layout, "kept": sum(one is not None for one in scorer._from_layer._kept), "scores": scores}))
"""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{number}": number + 2 for number in range(500)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = tiny.llama_config(len(vocabulary), layers=2, positions=2048)
    return tiny.make_model(tmp_path_factory.mktemp("long"), config, fast)


def searched(folder, count):
    command = [sys.executable, "-c", SEARCH, str(folder), str(count), "forest"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from /proc")
@pytest.mark.parametrize("count", [60, 500])
def test_four_times_as_many_long_pairs_take_hardly_more_memory(small_model, count):
    few, many = searched(small_model, count), searched(small_model, 4 * count)
    assert many["layout"] == "forest" and many["tokens"] > 3 * few["tokens"] > 600 * count
    assert many["packs"] > 0.8 * count and 0 < many["kept"] < many["packs"]
    assert all(score < 0 for trial in many["scores"] for score in trial) and len(many["scores"][0]) == 4 * count
    # Four times the tokens. What grows is their ids and positions, and what Python makes of them on the way; the masks
    # of all packs would be 4,000 bytes for each of them.
    assert many["bytes"] - few["bytes"] < 100 * (many["tokens"] - few["tokens"]) + (4 << 20)
    assert many["bytes"] < 100 << 20
