"""Tiny models in float64 that are mixed from candidates, and the same as whole plain models."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import reference
import tiny
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.model.arithmetic import Arithmetic
from modules.model.base_model import ResidentModel
from modules.model.loading import load_model
from modules.scoring.drift import DriftMeter, full_passage
from modules.scoring.layout import build_scorer
from modules.scoring.objective import Objective, Penalty
from modules.scoring.scorer import DEFAULT, ONLY, Scorer, of_pairs
from modules.scoring.tokenization import Encoded, encode_pairs
from modules.search.joint import Joint, JointState
from modules.search.mixing import Mix

WINDOWS = (tuple(range(5, 30)), tuple(range(40, 65)), (3, 4, 9))
DRIFT_WEIGHT = 5.0


class InDouble(TorchFunctionMode):
    """Models compute some things in float32, whatever their type is: within this they do it in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.view:  # of a file's bytes
            return function(*args, **(kwargs or {}))
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args, kwargs = map(_wider, args), {key: _wider(value) for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def _wider(value):
    return torch.float64 if value is torch.float32 else value


def everything_moved(model):
    """Norms, biases and position tables too, so that one that is forgotten is seen."""
    chance = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=chance) * 0.05 * (1 + parameter.abs().mean()))


def make(folder, config, count=2, tokenizer=None):
    """A base, and candidates that differ from it in every tensor."""
    base = tiny.make_model(folder / "base", config, tokenizer or tiny.bpe_tokenizer(), scale=3.0)
    numbers = range(1, 1 + count)
    return base, [tiny.make_candidate(folder / f"other-{n}", base, n, 0.02, change=everything_moved) for n in numbers]


@dataclass
class Mixed:
    """A base, resident in float64, and all that a mix of it needs."""

    folder: Path
    model: ResidentModel
    tokenizer: object
    encoded: list[Encoded]
    scorer: Scorer
    weights: list[float]
    meter: DriftMeter | None
    objective: Objective
    mix: Mix

    def measured(self, neutral=True):
        """What the twin measures."""
        items, weights = [(item.tokens, item.start) for item in self.encoded], list(self.weights)
        for number, item in enumerate(self.encoded):
            if item.another:  # it has the weight of the one before it
                weights.insert(number, weights[number - 1])
        return items, weights, WINDOWS if neutral else (), DRIFT_WEIGHT if neutral else 0.0

    def expected(self, shares, folders, neutral=True, outside=True):
        """Total, divergence and gradient of the twin."""
        base = plain(self.folder)
        others = [self._in_base_order(base, folder) for folder in folders]
        with InDouble():
            return reference.joint_gradient(base, others, shares, outside, *self.measured(neutral))

    def _in_base_order(self, base, folder):
        """A candidate with its header's rows where the base has those of the same tokens."""
        other, found = plain(folder), copy.deepcopy(base)
        naive = reference.NaiveMerge("", [], [], [], [], dtype=torch.float64)
        naive.tokenizer = self.tokenizer
        state, header = other.state_dict(), {id(tensor) for tensor in tiny.header_tensors(found)}
        with torch.no_grad():
            for name, tensor in found.state_dict(keep_vars=True).items():
                if id(tensor) not in header:
                    tensor.copy_(state[name])
            naive.mix_header(found, other, AutoTokenizer.from_pretrained(folder), 1.0)
        return found

    def found(self, shares):
        """Total, divergence and gradient by the streamed pass."""
        joint = Joint(self.mix, self.objective)
        with InDouble():
            joint.go_to(JointState.at(shares))
            value = joint.value()
            return value.total, value.metrics.get("kl", 0.0), joint.gradient(shares)


def plain(folder):
    """A whole model in float64, as transformers loads it."""
    config = open_checkpoint(folder, "plain").config
    config._experts_implementation = "eager"
    model = (
        AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64).eval().requires_grad_(False)
    )
    model.get_input_embeddings().padding_idx = None  # it has a gradient like any other row, where text has it
    return model


def opened(folder, model):
    return open_candidate(open_checkpoint(folder, folder.name), model.checkpoint, model.module)


def mixed(
    folder,
    candidates,
    layout=None,
    budget=DEFAULT,
    neutral=True,
    outside=True,
    compute="float64",
    rank=ONLY,
    pairs=tiny.PAIRS,
    layers=None,
):
    """A mix of a base in a folder with candidates: folders, or what opens one for a model. layout: None takes the
    fastest that is exact. layers: that are mixed, if not all are."""
    checkpoint = open_checkpoint(folder, "base")
    checkpoint.config._experts_implementation = "eager"  # the others have no float64
    model = load_model(checkpoint, "cpu", "auto", Arithmetic.named(compute))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = encode_pairs(tokenizer, pairs, model.vocabulary, model.max_tokens)
    scorer = build_scorer(model, encoded, budget)
    signs = [-1 if pair.kind == "GOOD" else 1 for pair in pairs]
    scores = of_pairs(scorer.score(), encoded)
    weights = [sign * math.exp(-score) for sign, score in zip(signs, scores, strict=True)]
    scorer = Scorer(model, encoded, layout or scorer.layout, *scorer.settings[1:], rank)
    with InDouble() if compute == "float64" else nullcontext():
        meter = DriftMeter(model, list(map(full_passage, WINDOWS))) if neutral else None
        objective = Objective(model, scorer, weights, [Penalty("kl", DRIFT_WEIGHT, meter)] if meter else [])
        found = [opened(one, model) if isinstance(one, Path) else one(model) for one in candidates]
        mix = Mix(model, tokenizer, found, outside, layers=layers)
    return Mixed(folder, model, tokenizer, encoded, scorer, weights, meter, objective, mix)


def with_rows_elsewhere(folder):
    """Models as `make` makes them; the second candidate has all rows at other places, of one token of the base none,
    and a token of its own."""
    tokenizer = tiny.bpe_tokenizer()
    base, folders = make(folder, tiny.llama_config(len(tokenizer)), tokenizer=tokenizer)
    order = {token: (row * 7 + 3) % len(tokenizer) for token, row in tokenizer.get_vocab().items()}
    missing = next(token for token, row in order.items() if row == len(tokenizer) - 1)
    other = tiny.rewritten_tokenizer(tokenizer, order, {missing: "another"})
    tiny.change_vocabulary(folders[1], other, len(tokenizer) + 5, {"another": missing})
    return base, folders
