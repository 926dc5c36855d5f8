"""KL under trials, by tail forwards and by whole ones, against plain transformers with whole logits."""

from functools import partial

import pytest
import reference
import tiny
import torch
from architectures import configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.checkpoints.candidate import open_candidate
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.schema import Config, Directories
from modules.metrics.kl import NAME, TrialKL
from modules.metrics.metric import Context
from modules.metrics.texts import Texts
from modules.model.embeddings import aligned_header
from modules.model.loading import load_model
from modules.runtime.console import WorkerConsole
from modules.runtime.distributed import Rank
from modules.scoring import drift as measure
from modules.scoring.budget import Budget
from modules.scoring.drift import full_passage
from modules.search.trial import merged, trying

NAMES = ["GPT-2", "Gemma 2", "BLOOM", "Mixtral"]
WINDOWS = [tuple(range(5, 30)), tuple(range(40, 65)), (3, 4, 9), tuple(range(7, 19))]
RATIOS = [0.3, 0.9]


class Case:
    """A base, a candidate, KL under trials in each process; and the base as a plain model."""

    def __init__(self, folder, config, tokenizer, rank=None, budget=None):
        base = tiny.make_model(folder / "base", config, tokenizer, scale=3.0)
        other = tiny.make_candidate(folder / "other", base, amount=0.05)
        self.model = load_model(open_checkpoint(base, "base"), "cpu", "float32")
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.candidate = open_candidate(open_checkpoint(other, "other"), self.model.checkpoint, self.model.module)
        self.plain, self.now = (AutoModelForCausalLM.from_pretrained(base).eval() for _ in range(2))
        config, console = Config(Directories("base", "out"), max_drift=1.0), WorkerConsole(1)
        budget = budget or Budget()
        self.metrics = []
        texts = Texts(neutral_for_trials=list(map(full_passage, WINDOWS)))
        for one in rank or [Rank()]:
            context = Context(config, console, self.model, self.tokenizer, budget, one, texts)
            self.metrics.append(TrialKL(context, NAME, texts.neutral_for_trials))

    def theirs(self, layer):
        """A part, and the candidate's tensors for it."""
        if layer is None:
            return self.model.header(), aligned_header(self.model, self.tokenizer, self.candidate)[0]
        part = self.model.layer(layer)
        return part, part.adopt(self.candidate.stream(part.tensors), "other")

    def tries(self, layer):
        part, theirs = self.theirs(layer)
        return [partial(trying, part, "lerp", theirs, ratio, part.space()) for ratio in RATIOS]

    def expected(self, layer):
        """The same trials, each on a whole plain model."""
        found = []
        for trial in self.tries(layer):
            with trial():
                self.now.load_state_dict(self.model.module.state_dict())
            found.append(reference.plain_drift(self.plain, self.now, WINDOWS)[0])
        return found

    def install(self, layer):
        part, theirs = self.theirs(layer)
        found = merged(part, "lerp", theirs, 0.5, part.space())
        part.install(found)
        self.model.has_base_header &= layer is not None

    def under_trials(self, layer, by_tails=True):
        """Of all processes together."""

        def of(metric):
            if layer is None:
                return metric.under_header_trials(self.tries(None))
            metric.tails.at_layer(layer)
            return metric.under_trials(self.tries(layer), by_tails)

        return [sum(parts) for parts in zip(*map(of, self.metrics), strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_trials_drift_as_whole_models_do(tmp_path, name):
    tokenizer = tiny.bpe_tokenizer()
    case = Case(tmp_path, configuration(name, len(tokenizer)), tokenizer)
    for layer in (0, 1, None):
        found, expected = case.under_trials(layer), case.expected(layer)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-8) and min(expected) > 1e-5
        case.install(layer)
    (metric,) = case.metrics
    case.now.load_state_dict(case.model.module.state_dict())
    assert metric.value() == pytest.approx(reference.plain_drift(case.plain, case.now, WINDOWS)[0], rel=1e-5)
    metric.tails.restart()  # another candidate's turn, after the header was changed
    assert case.under_trials(1) == pytest.approx(case.expected(1), rel=1e-4)


@pytest.mark.parametrize("by_tails", [True, False])
@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_the_way_makes_no_difference(tmp_path, monkeypatch, by_tails, cache):
    monkeypatch.setattr(measure, "BLOCK", 4 * 75 * 50)  # a few rows of the head at a time
    tokenizer = tiny.bpe_tokenizer()
    case = Case(tmp_path, tiny.llama_config(len(tokenizer)), tokenizer, budget=Budget(cache=cache))
    case.install(0)
    assert case.under_trials(2, by_tails) == pytest.approx(case.expected(2), rel=1e-4)


@pytest.mark.parametrize("count", [3, 7])
def test_the_shares_of_all_processes_make_the_mean(tmp_path, count):
    tokenizer = tiny.bpe_tokenizer()
    ranks = [Rank(number, count) for number in range(count)]
    case = Case(tmp_path, tiny.llama_config(len(tokenizer), tied=True), tokenizer, ranks)
    for layer in (1, None):
        assert case.under_trials(layer) == pytest.approx(case.expected(layer), rel=1e-4)
        case.install(layer)
    case.now.load_state_dict(case.model.module.state_dict())
    expected = reference.plain_drift(case.plain, case.now, WINDOWS)[0]
    assert sum(metric.value() for metric in case.metrics) == pytest.approx(expected, rel=1e-5)


def test_a_model_without_a_change_has_no_drift(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    case = Case(tmp_path, tiny.llama_config(len(tokenizer)), tokenizer)
    (metric,) = case.metrics
    part = case.model.layer(1)
    same = partial(part.holding, {name: tensor.clone() for name, tensor in part.tensors.items()})
    metric.tails.at_layer(1)
    assert metric.value() < 1e-9 and max(metric.under_trials([same, same], True)) < 1e-9


def test_drift_that_is_no_number_stays_none(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    case = Case(tmp_path, tiny.llama_config(len(tokenizer)), tokenizer)
    part = case.model.layer(1)
    broken = partial(part.holding, {name: torch.full_like(tensor, torch.nan) for name, tensor in part.tensors.items()})
    case.metrics[0].tails.at_layer(1)
    assert all(value != value for value in case.metrics[0].under_trials([broken], True))
