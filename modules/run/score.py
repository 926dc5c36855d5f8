"""Scores the base and other models by a configuration's phrases: no merge, no output.

Knows: the order of the steps. Refuses to know: how any of them is done.

The base is in memory. Every other model is read one layer at a time, as a merge reads a candidate taken whole.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.downloads import check_space, fetching, remove_downloads
from modules.checkpoints.open_models import Models
from modules.config.inputs import read_neutral_texts
from modules.config.locations import without_folders
from modules.config.phrase_lists import Pair
from modules.config.schema import Config
from modules.metrics.evaluator import Evaluation, Evaluator
from modules.model.embeddings import HeaderSkipped, matched_header
from modules.model.loading import ModelLoader
from modules.model.settings import Settings, settings_of
from modules.output.tables import (
    ResultRow,
    by_other_settings,
    probability_table,
    results_table,
    score_summary,
)
from modules.output.text_files import check_file, write_text
from modules.run.merge import load_base
from modules.run.steps import ask, end, prepare_libraries
from modules.runtime.console import Console
from modules.runtime.errors import BrokenWeights, CheckpointError, ConfigError, TooNarrow
from modules.scoring.budget import Budget
from modules.scoring.chats import Asked
from modules.scoring.tokenization import doubled_tokens, doubtful_phrases
from modules.search.search import Search
from modules.search.strategies import probability


@dataclass(frozen=True)
class Scored:
    """A model and its scores."""

    name: str
    label: str  # its name in a table, with a remark
    where: str  # a commit of the hub, or a folder's name
    own_settings: bool  # whether it was computed with its own settings, not the base's
    evaluation: Evaluation

    @property
    def probabilities(self) -> list[float]:
        """The probability of each pair, the searched ones first."""
        return [probability(value) for value in (*self.evaluation.searched, *self.evaluation.held_out)]


def score_models(config: Config, console: Console, file: Path | None, overwrite: bool, is_part: bool = False) -> None:
    """Print the scores of the base and of each candidate taken whole. file: gets the same as JSON.

    is_part: of a longer run, which prints the last line. Raises ConfigError for what can't be used, found before any
    work; CheckpointError or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    if file:
        check_file("--json", file, overwrite)
    read_neutral_texts(config.neutral_texts)  # reports their errors before any work
    loader = ModelLoader(replace(config, samples=()), console)  # no model but the base answers
    models = loader.open()
    check_space(models.jobs)
    loader, prompts = ask(loader.fitting(models, with_header=True), models)
    config = loader.config
    console.warnings(doubtful_phrases(config.pairs))
    search, evaluator, scored = loader.in_range(lambda wide: _score_all(wide, models, prompts))
    held_out = evaluator.phrases.pairs
    console.lines(results_table([ResultRow(model.label, model.evaluation.metrics) for model in scored]))
    probabilities = {model.name: model.probabilities for model in scored}
    console.lines(probability_table(config.pairs, held_out, probabilities, search.rounding))
    if file:
        weights = [*search.weights, *evaluator.phrases.weights]
        document = _document([*config.pairs, *held_out], len(config.pairs), weights, scored)
        write_text(file, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        console.timed(f"Wrote all scores to {file}")
    if not is_part:
        end(console, config, models)


def _document(
    pairs: Sequence[Pair], searched: int, weights: Sequence[float], scored: Sequence[Scored]
) -> dict[str, Any]:
    """All scores for JSON, the base's first. searched: the number of searched pairs, which come first; the others are
    held out. weights: signed."""
    models = [
        {
            "name": model.name,
            "where": model.where,
            "settings": "own" if model.own_settings else "base",
            "metrics": model.evaluation.metrics,
        }
        for model in scored
    ]
    phrases = []
    for number, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
        probabilities = {model.name: model.probabilities[number] for model in scored}
        fields = {"weight": abs(weight), "held_out": number >= searched, "probabilities": probabilities}
        phrases.append({**pair.written(), **fields})
    return {"models": models, "phrases": phrases}


def _score_all(loader: ModelLoader, models: Models, prompts: Asked) -> tuple[Search, Evaluator, list[Scored]]:
    """Score all models. Returns the base's search and evaluator, and the scores, the base's first."""
    config = loader.config
    console = loader.console
    with fetching(console, models.jobs) as prefetcher:
        prefetcher.wait(0)
        placement = loader.placement(models, with_header=True)
        context = load_base(loader, models, Budget(), placement=placement, prompts=prompts)
        search = context.search
        model = search.model
        tokenizer = search.tokenizer
        scorer = search.scorer
        if not scorer.has_tails:
            raise ConfigError(
                f"{models.base.path}: --score is not supported for this model, which can't be computed layer by layer"
            )
        names = [candidate.name for candidate in models.candidates]
        console.lines(score_summary(config, model.describe(saving=False), scorer.describe(), names))
        console.warnings([*doubled_tokens(tokenizer, config.pairs), *search.warnings])
        evaluator = Evaluator(context)
        name = models.base.name
        where = without_folders(models.base_where)
        scored = [Scored(name, f"{name} (base)", where, own_settings=True, evaluation=evaluator.start)]
        for number, candidate in enumerate(models.candidates, start=1):
            try:
                prefetcher.wait(number)
                console.timed(f"Model {number}/{len(names)}: {candidate.name}")
                scored.append(_score(console, search, evaluator, candidate))
            except CheckpointError as error:
                if config.on_error == "stop" or isinstance(error, TooNarrow):
                    raise
                console.warning(f"{error}; it is left out")
            if not config.keep_downloads:
                later_repositories = [
                    repository
                    for later_candidate in models.candidates[number:]
                    for repository in later_candidate.repositories
                ]
                remove_downloads(console, candidate.repositories, [models.base.repository, *later_repositories])
    console.lines(search.notes)
    return search, evaluator, scored


def _score(console: Console, search: Search, evaluator: Evaluator, candidate: Candidate) -> Scored:
    """Score one model beside the base. Raises CheckpointError if it can't be scored."""
    try:
        try:
            note = matched_header(search.model, search.tokenizer, candidate).note_of_scores
            console.lines([note] if note else [])
        except HeaderSkipped as error:
            console.warning(f"{error}; scoring it with the base's embedding and LM head")
        own_settings = settings_of(search.model, candidate.checkpoint) if candidate.otherwise else Settings()
        if own_settings is None:
            console.warning(f"{candidate.name} can't be scored with its own settings; using the base's")
        evaluation = evaluator.evaluate_alone(candidate, own_settings or Settings())
        while evaluation is None and search.take_less_memory():
            evaluation = evaluator.evaluate_alone(candidate, own_settings or Settings())
    except (BrokenWeights, CheckpointError) as error:
        if isinstance(error, TooNarrow) and search.model.may_widen:
            raise
        raise CheckpointError(f"{candidate.name} can't be scored: {error}") from None
    if evaluation is None:
        raise CheckpointError(f"{candidate.name} can't be scored: not enough memory")
    if any(map(math.isnan, (*evaluation.searched, *evaluation.held_out))):
        raise CheckpointError(f"{candidate.name} can't be scored: its scores are NaN")
    name = candidate.name if own_settings else by_other_settings(candidate.name)
    return Scored(candidate.name, name, without_folders(candidate.where), own_settings is not None, evaluation)
