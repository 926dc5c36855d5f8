"""Models scored by a configuration's phrases, the base among them: no merge, no output.

Knows: the order of the steps. Refuses to know: how any of them is done.

The base is in memory, every other model is read one layer at a time, as a candidate taken whole is in a merge.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

from modules.checkpoints import Candidate, Models, check_space, fetching, remove_downloads
from modules.config import Config, read_neutral_texts, without_folders
from modules.model import HeaderSkipped, ModelLoader, Settings, matched_header, settings_of
from modules.output import check_file, write_text
from modules.output.standings import (
    Scored,
    ScoredPairs,
    by_other_settings,
    probability_table,
    score_document,
    standing_table,
)
from modules.output.tables import neutral_text_lines, score_summary
from modules.run.merge import load_base
from modules.run.steps import end, prepare_libraries, with_chats_rendered
from modules.run.watch import Watch
from modules.runtime import BrokenWeights, CheckpointError, ConfigError, Console, TooNarrow
from modules.scoring import Budget, doubled_tokens, doubtful_phrases
from modules.search.search import Search


def score_models(config: Config, console: Console, file: Path | None, overwrite: bool) -> None:
    """Print how the base and the configuration's candidates score, each taken whole; file: gets the same as JSON.

    Raises ConfigError for what can't be used, found before any work; CheckpointError or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    if file:
        check_file("--json", file, overwrite)
    read_neutral_texts(config.neutral_texts)  # what is wrong with them is told before any work
    loader = ModelLoader(replace(config, samples=()), console)  # nobody is asked anything
    models = loader.open()
    check_space(models.jobs, config.keep_downloads)
    loader = with_chats_rendered(loader.fitting(models, with_header=True), models)
    config = loader.config
    console.warnings(doubtful_phrases(config.pairs))
    search, watch, scored = loader.in_range(lambda wide: _scored(wide, models))
    weights = [*search.weights, *watch.weights]
    pairs = ScoredPairs(config.pairs, watch.pairs, weights, search.rounding)
    console.lines(standing_table([one.standing for one in scored], scored[0].standing))
    console.lines(probability_table(pairs, scored))
    if file:
        write_text(file, json.dumps(score_document(pairs, scored), ensure_ascii=False, indent=1) + "\n")
        console.timed(f"All scores are in {file}")
    end(console, config, models)


def _scored(loader: ModelLoader, models: Models) -> tuple[Search, Watch, list[Scored]]:
    """The base and what has scored it; all models' scores, the base's first."""
    config, console = loader.config, loader.console
    with fetching(console, models.jobs) as prefetcher:
        prefetcher.wait(0)
        search, windows, _ = load_base(loader, models, Budget(), placement=loader.placement(models, with_header=True))
        model, tokenizer, scorer = search.model, search.tokenizer, search.scorer
        if not scorer.has_tails:
            raise ConfigError(
                f"{models.base.path}: can't be computed a layer at a time, so no other can be scored beside it"
            )
        names = [candidate.name for candidate in models.candidates]
        console.lines(score_summary(config, model.describe(saving=False), scorer.describe(), names))
        console.warnings([*doubled_tokens(tokenizer, config.pairs), *search.warnings])
        watch = Watch(config, console, model, tokenizer, Budget(), windows)
        console.lines(neutral_text_lines(watch.start.drift))
        name, found = models.base.name, search.log_probabilities
        start = watch.standing(search, f"{name} (base)", found, watch.start)
        scored = [Scored(name, without_folders(models.base_where), start, found, watch.start.held_out)]
        for number, candidate in enumerate(models.candidates, start=1):
            try:
                prefetcher.wait(number)
                console.timed(f"Model {number}/{len(names)}: {candidate.name}")
                scored.append(_score(console, search, watch, candidate))
            except CheckpointError as error:
                if config.on_error == "stop" or isinstance(error, TooNarrow):
                    raise
                console.warning(f"{error}; it has no row")
            if not config.keep_downloads:
                later = [repository for one in models.candidates[number:] for repository in one.repositories]
                remove_downloads(console, candidate.repositories, [models.base.repository, *later])
    console.lines(search.notes)
    return search, watch, scored


def _score(console: Console, search: Search, watch: Watch, candidate: Candidate) -> Scored:
    """One model beside the base. Raises CheckpointError if it can't be scored."""
    try:
        console.lines(_about_header(console, search, candidate))
        own = settings_of(search.model, candidate.checkpoint) if candidate.otherwise else Settings()
        if own is None:
            console.warning(f"{candidate.name} can't be computed beside the base by its own settings")
        name = candidate.name if own else by_other_settings(candidate.name)
        seen = watch.look_at_whole(search, candidate, own=own or Settings())
        while seen is None and search.take_less_memory():
            seen = watch.look_at_whole(search, candidate, own=own or Settings())
    except (BrokenWeights, CheckpointError) as error:
        if isinstance(error, TooNarrow) and search.model.may_widen:
            raise
        raise CheckpointError(f"{candidate.name} can't be scored: {error}") from None
    finally:
        candidate.checkpoint.release()
    if seen is None:
        raise CheckpointError(f"{candidate.name} can't be scored: there is too little memory")
    found, sight, _ = seen
    if any(map(math.isnan, (*found, *sight.held_out))):
        raise CheckpointError(f"{candidate.name} can't be scored: what it computes is no number")
    standing = watch.standing(search, name, found, sight)
    return Scored(candidate.name, without_folders(candidate.where), standing, found, sight.held_out)


def _about_header(console: Console, search: Search, candidate: Candidate) -> list[str]:
    """What had to be matched of a model's vocabulary, that the phrases may mean the same tokens in it."""
    try:
        note = matched_header(search.model, search.tokenizer, candidate).note_of_scores
    except HeaderSkipped as error:
        console.warning(f"{error}; it is scored with the base's embedding and head")
        return []
    return [note] if note else []
