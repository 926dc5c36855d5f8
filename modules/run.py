"""One whole merge, from the configuration to the saved model.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import transformers

from modules import report
from modules.candidates import Candidate
from modules.checkpoints import SETTINGS_FILE, load_tokenizer, new_folder
from modules.composition import Merge, mean_shares
from modules.config import Config
from modules.console import BANNER, Console
from modules.hub import Ahead, Bar, Job, Repository, check_space
from modules.models import ResidentModel, load_model
from modules.opening import open_models
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
    models = open_models(config, overwrite, partial(fetch_now, console))
    console.lines(models.notes)
    base, candidates = models.base, models.candidates
    jobs = [Job(base.name, base.repository, base.files), *(candidate.job for candidate in candidates)]
    check_space(jobs, config.keep_downloads)
    with (
        new_folder(Path(config.directories.output_directory)) as folder,
        Ahead(jobs, partial(begin_download, console)) as ahead,
    ):
        ahead.wait(0)
        model = load_model(base, config.device, config.dtype, config.trust_remote_code)
        search = start_search(config, console, model, candidates)
        origins = search_all(config, console, search, candidates, ahead)
        console.lines(["Merge composition:", *report.composition_lines(mean_shares(origins)), ""])
        console.timed(f"Saving to {config.directories.output_directory}")
        model.save(folder)
        (folder / SETTINGS_FILE).write_text(config.text, encoding="utf-8", newline="")
    if not config.keep_downloads:
        remove_downloads(console, [base.repository])
    console.timed(f"Done. The log is {console.log_path}")


def prepare_libraries(seed: int) -> None:
    """Same bits from the same config, and no chatter from the libraries between our lines."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()


def start_search(config: Config, console: Console, model: ResidentModel, candidates: Sequence[Candidate]) -> Search:
    """Score the base, print the summary and the phrase table; the search that goes on from there."""
    tokenizer = load_tokenizer(model.checkpoint.path, config.trust_remote_code)
    scorer = build_scorer(model, encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens))
    search = Search(model, scorer, config, tokenizer)
    console.lines(report.summary(config, model.describe(), scorer.describe(), [c.name for c in candidates]))
    console.lines([f"WARNING: {warning}" for warning in search.warnings])
    console.lines(report.phrase_table(config.pairs, search.weights, search.log_probabilities))
    return search


def search_all(
    config: Config, console: Console, search: Search, candidates: Sequence[Candidate], ahead: Ahead
) -> list[list[Merge]]:
    """Search one candidate after another; the accepted merges of every layer and, last, of the header.

    ahead: brings the base as number 0, then the candidates; each while the one before it is searched.
    """
    layers = len(search.model.layers)
    origins: list[list[Merge]] = [[(1.0, search.model.checkpoint.name)] for _ in range(layers + 1)]
    start = search.log_probabilities
    with console.progress(len(candidates) * search.steps_per_candidate()) as bar:
        for number, candidate in enumerate(candidates, start=1):
            console.timed(f"Candidate {number}/{len(candidates)}: {candidate.name}")
            ahead.wait(number)
            for decision in search.candidate(candidate):
                merges = origins[layers if decision.layer is None else decision.layer]
                if decision.ratio is not None:
                    merges.append((decision.share, candidate.name))
                show_decision(console, decision, merges, layers, len(config.merge_method) > 1)
                bar.update(search.steps(decision.layer, decision.method))
            console.lines(report.phrase_table(config.pairs, search.weights, search.log_probabilities, start))
            if not config.keep_downloads:
                needed = [search.model.checkpoint.repository, *(r for c in candidates[number:] for r in c.repositories)]
                remove_downloads(console, candidate.repositories, needed)
    return origins


def fetch_now(console: Console, job: Job) -> None:
    """Fetch a job's files from the hub, if any are missing, and return when they are here."""
    with Ahead([job], partial(begin_download, console)) as ahead:
        ahead.wait(0)


def begin_download(console: Console, job: Job) -> Bar:
    """Say that a download begins; the bar that shows how far it is."""
    count = len(job.absent)
    console.timed(f"Downloading {job.name} ({count} {'file' if count == 1 else 'files'}, {job.size / 1e9:.2f} GB)")
    return console.download(job.name, job.size)


def remove_downloads(
    console: Console, repositories: Iterable[Repository | None], needed: Iterable[Repository | None] = ()
) -> None:
    """Remove from the hub's cache what this run has fetched of these, but for what is needed still."""
    folders = {repository.folder for repository in needed if repository}
    for repository in repositories:
        if repository is not None and repository.folder not in folders:
            try:
                repository.remove_fetched()
            except OSError as error:  # no reason to lose a merge
                console.line(f"WARNING: {repository.folder} could not be removed ({error.strerror})")


def show_decision(
    console: Console, decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool
) -> None:
    """The two lines of a decision and the rule below them; before them, what there is to say about it."""
    if decision.warning:
        console.line(f"WARNING: {decision.warning}")
    if decision.note:
        console.line(decision.note)
    composition, outcome = report.decision_lines(decision, merges, layers, name_method)
    console.line(composition)
    console.timed(outcome)
    console.line("----")
