"""What a plan is made of, and what it is held against: models as a run opens them, a search as a run begins it."""

from dataclasses import replace

import tiny
import torch
from transformers import AutoTokenizer

from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.config.phrase_lists import Pair
from modules.config.schema import Config, Directories
from modules.metrics.kl import weigh
from modules.metrics.metric import Context
from modules.metrics.own_answers import NO_ANSWERS
from modules.metrics.texts import drift_texts
from modules.model.arithmetic import Arithmetic
from modules.model.loading import load_model
from modules.model.memory import Memory, Sizes
from modules.run.plan import Plan, make_plan
from modules.runtime.console import WorkerConsole
from modules.runtime.distributed import Rank
from modules.scoring.budget import Budget
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs
from modules.search.search import Search

GB, GIB = 10**9, 2**30


def opened(place, models, **settings):
    """A configuration and its models, as a run has them before anything is loaded."""
    base, *candidates = models
    path = tiny.write_config(place / "my.yaml", base, candidates, place / "out", **settings)
    config = load_config(path)
    return config, open_models(config, fetch=None)


def planned(config, found):
    """The plan of a run that begins now."""
    return make_plan(config, found)


def start(config, found):
    """A search on the base, as a run begins it."""
    model, tokenizer = load_model(found.base, "cpu", config.dtype), AutoTokenizer.from_pretrained(found.base.path)
    encoded = encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens)
    texts = drift_texts(config, model, tokenizer, NO_ANSWERS)
    metric = weigh(Context(config, WorkerConsole(1), model, tokenizer, Budget(), Rank(), texts))
    return Search(model, build_scorer(model, encoded), config, tokenizer, weighed=[metric] if metric else [])


def made_up(place, **changes):
    """The plan of a search on a model of 8 billion weights in half precision, with room for everything."""
    pairs = tuple(Pair("BAD", f"apple{number}", "where ") for number in range(14))
    config = Config(Directories("base", str(place / "out")), bad_phrases=pairs, merge_method=("lerp", "slerp"))
    plan = Plan(
        config=replace(config, merge_ratios=(0.1, 0.3, 0.5, 0.7), merge_headers=True),
        candidates=("one", "two"),
        device=torch.device("cuda:0"),
        arithmetic=Arithmetic(torch.bfloat16),
        sizes=Sizes(32, 4096, 14336, 32, 128256),
        packs=(1000, 76),
        trial_tokens=0,
        neutral_tokens=0,
        memory=Memory(15 * GIB, GIB // 2, 2 * GIB, 0, GIB // 2),
        free=79 * GIB,
        budget=Budget(),
        placement=None,
        output=16 * GB,
        disk_needed=17 * GB,
        disk_free=900 * GB,
        downloads=0,
    )
    return replace(plan, **changes)
