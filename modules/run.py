"""One whole merge, from the configuration to the saved model.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from modules import report
from modules.candidates import Candidate, open_candidate
from modules.checkpoints import (
    SETTINGS_FILE,
    Checkpoint,
    candidate_paths,
    check_output,
    load_tokenizer,
    new_folder,
    open_checkpoint,
)
from modules.composition import Merge, mean_shares
from modules.config import Config, ConfigError
from modules.console import BANNER, Console
from modules.models import ResidentModel, load_model, without_weights
from modules.phrases import encode_pairs
from modules.probability import build_scorer
from modules.search import Decision, Search


def merge_models(config: Config, console: Console, overwrite: bool = False) -> None:
    """Search, merge and save as configured. Nothing is left at the output directory unless all went well.

    Raises ConfigError for what can't be used, found before any work; CheckpointError or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    console.line(BANNER)
    console.timed("THE MERGE MONSTER HUNGERS")
    base, candidates = open_models(config, console, overwrite)
    with new_folder(Path(config.directories.output_directory)) as folder:
        model = load_model(base, config.device, config.dtype, config.trust_remote_code)
        search = start_search(config, console, model, candidates)
        origins = search_all(config, console, search, candidates)
        console.lines(["Merge composition:", *report.composition_lines(mean_shares(origins)), ""])
        console.timed(f"Saving to {config.directories.output_directory}")
        model.save(folder)
        (folder / SETTINGS_FILE).write_text(config.text, encoding="utf-8", newline="")
    console.timed(f"Done. The log is {console.log_path}")


def prepare_libraries(seed: int) -> None:
    """Same bits from the same config, and no chatter from the libraries between our lines."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def open_models(config: Config, console: Console, overwrite: bool) -> tuple[Checkpoint, list[Candidate]]:
    """The base and the candidates, opened; everything that can be checked without their weights is.

    Raises ConfigError, for all unfit candidates together.
    """
    paths, notes = candidate_paths(config)
    console.lines(notes)
    base_path = Path(config.directories.model_path1)
    check_output(Path(config.directories.output_directory), [base_path, *paths], overwrite)
    names = distinct_names([base_path, *paths])
    base = open_checkpoint(base_path, names[0], config.trust_remote_code)
    module = without_weights(base, config.trust_remote_code)
    candidates, problems = [], []
    for path, name in zip(paths, names[1:], strict=True):
        try:
            checkpoint = open_checkpoint(path, name, config.trust_remote_code)
            candidates.append(open_candidate(checkpoint, base, module))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return base, candidates


def start_search(config: Config, console: Console, model: ResidentModel, candidates: Sequence[Candidate]) -> Search:
    """Score the base, print the summary and the phrase table; the search that goes on from there."""
    tokenizer = load_tokenizer(model.checkpoint.path, config.trust_remote_code)
    scorer = build_scorer(model, encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens))
    search = Search(model, scorer, config, tokenizer)
    console.lines(report.summary(config, model.describe(), scorer.describe(), [c.name for c in candidates]))
    console.lines([f"WARNING: {warning}" for warning in search.warnings])
    console.lines(report.phrase_table(config.pairs, search.weights, search.log_probabilities))
    return search


def search_all(config: Config, console: Console, search: Search, candidates: Sequence[Candidate]) -> list[list[Merge]]:
    """Search one candidate after another; the accepted merges of every layer and, last, of the header."""
    layers = len(search.model.layers)
    origins: list[list[Merge]] = [[(1.0, search.model.checkpoint.name)] for _ in range(layers + 1)]
    start = search.log_probabilities
    with console.progress(len(candidates) * search.steps_per_candidate()) as bar:
        for number, candidate in enumerate(candidates, start=1):
            console.timed(f"Candidate {number}/{len(candidates)}: {candidate.name}")
            for decision in search.candidate(candidate):
                merges = origins[layers if decision.layer is None else decision.layer]
                if decision.ratio is not None:
                    merges.append((decision.share, candidate.name))
                show_decision(console, decision, merges, layers, len(config.merge_method) > 1)
                bar.update(search.steps(decision.layer, decision.method))
            console.lines(report.phrase_table(config.pairs, search.weights, search.log_probabilities, start))
    return origins


def show_decision(
    console: Console, decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool
) -> None:
    """The two lines of a decision and the rule below them."""
    if decision.warning:
        console.line(f"WARNING: {decision.warning}")
    composition, outcome = report.decision_lines(decision, merges, layers, name_method)
    console.line(composition)
    console.timed(outcome)
    console.line("----")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names; where different folders have the same one, as much of their paths as tells them apart."""
    paths = [path.resolve() for path in paths]
    names = []
    for path in paths:
        parts = 1
        while any(other.parts[-parts:] == path.parts[-parts:] for other in paths if other != path):
            parts += 1
        names.append("/".join(path.parts[-parts:]))
    return names
