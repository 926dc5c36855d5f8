"""One whole merge, from the configuration to the saved model.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import transformers

from modules import report
from modules.apart import check_apart, input_paths, written_paths
from modules.candidates import Candidate
from modules.card import CARD_FILE, write_card
from modules.checkpoints import Checkpoint, load_tokenizer
from modules.composition import Merge, mean_shares
from modules.config import Config
from modules.console import BANNER, Console
from modules.forecast import calibrate, estimate, plan_lines
from modules.group import ALONE, Group
from modules.hub import Ahead, Bar, Job, Repository, check_space
from modules.journal import Record, naming
from modules.memory import Budget, Packing
from modules.models import ResidentModel, load_model, own_device
from modules.opening import Models, locations_of, looked_up, open_models
from modules.outputs import Unfinished, check_output, held_place, unfinished_output
from modules.phrases import Encoded, doubtful_phrases, encode_pairs
from modules.pictures import MERGE_MAP_FILE, PHRASE_CHART_FILE, merge_map, phrase_chart
from modules.places import SETTINGS_FILE, Place
from modules.preflight import Plan, Room, check, find_room, plan_run
from modules.probability import Scorer, build_scorer
from modules.record import RunRecord, compare_fingerprints, is_finished, write_recipe
from modules.search import Decision, Search
from modules.stopping import postponed
from modules.weights import CheckpointError, first_line


@dataclass(frozen=True)
class Start:
    """What the process that leads tells the others, for them to begin the search: all that is not in the YAML file."""

    records: list[Record]  # the journal's
    budget: Budget


NOTHING_TO_SEARCH = None  # said in place of a Start


@dataclass(frozen=True)
class Options:
    """What the command line says beside what is in the configuration."""

    settings_file: Path  # which is read, and must not be written
    overwrite: bool = False  # an output that is there already
    resume: bool = False
    restart: bool = False
    dry_run: bool = False  # check everything and say what it would take, and no more
    table: str = "full"  # one of TABLES: how much of the phrase table is shown


def merge_models(config: Config, console: Console, options: Options, group: Group = ALONE) -> None:
    """Search, merge and save as configured. Nothing is at the output directory before all is well.

    group: of which this process leads; the others follow. Raises ConfigError for what can't be used, found before any
    work; CheckpointError or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    console.lines(BANNER.split("\n"))
    console.timed("THE MERGE MONSTER HUNGERS")
    output = Path(config.directories.output_directory)
    check_apart(written_paths(output), [options.settings_file, *input_paths(config)])
    with held_place(output, console, options.dry_run) as place:
        if options.resume and not options.dry_run and is_finished(config, output):
            console.final(f"This run has finished: its output is in {output}")
        else:
            check_output(place, options.overwrite)
            console.lines(looked_up(locations_of(config)))
            models = open_models(config, partial(fetch_now, console))
            plan, room = _checked_plan(config, console, models, group)
            if not options.dry_run:
                _merge(config, console, options, group, place, models, plan)
                return
            console.lines(plan_lines(plan, room, estimate(plan, calibrate(plan))))
            console.final("Dry run: nothing was written")
    group.from_first(NOTHING_TO_SEARCH)


def _checked_plan(config: Config, console: Console, models: Models, group: Group) -> tuple[Plan, Room]:
    """What the run will do and take, and what room there is. Raises ConfigError if it is too little."""
    console.lines(models.notes)
    console.warnings(models.warnings)
    check_space(models.jobs, config.keep_downloads)
    plan = plan_run(replace(config, device=own_device(config.device, group.seat)), models, group.seat.count_here)
    room = find_room(plan)
    console.warnings([*doubtful_phrases(config.pairs), *plan.doubts, *check(plan, room)])
    return plan, room


def _merge(
    config: Config, console: Console, options: Options, group: Group, place: Place, models: Models, plan: Plan
) -> None:
    """Search, and put the result into its place."""
    clock = Clock()
    with (
        unfinished_output(place, options.resume, options.restart) as unfinished,
        Ahead(models.jobs, partial(begin_download, console)) as ahead,
    ):
        record = RunRecord(unfinished.journal, config, models.base)
        ahead.wait(0)
        clock.lap("download")
        group.from_first(Start(record.journal.records, plan.budget))
        conductor = begin_search(config, console, models, record, ahead, plan.budget, group, plan.placement)
        clock.lap("load")
        conductor.conduct(models.candidates, options.resume, options.table)
        search, model = conductor.search, conductor.search.model
        composition = mean_shares(conductor.origins)
        if all(decision.ratio is None for decision in record.decisions()):
            console.warning("nothing was accepted, so the output is the base; the mapper shows what it would say")
        console.lines(["Merge composition:", *report.composition_lines(composition), ""])
        clock.lap("search")
        save(console, model, unfinished, config.directories.output_directory, config.text)
        clock.lap("save")
        recipe = record.recipe(
            config.pairs, search.weights, search.log_probabilities, composition, model.dtypes(), clock.seconds
        )
        write_results(console, unfinished.folder, recipe, place.output.name, models.base.path)
        put_in_place(console, unfinished, options.overwrite)
    if not config.keep_downloads:
        remove_downloads(console, [models.base.repository])
    console.final(f"Done. The log is {console.log_path}")


def put_in_place(console: Console, unfinished: Unfinished, overwrite: bool) -> None:
    """Make what is written the output. It takes a moment, in which Ctrl-C is not heard unless it comes twice."""
    with postponed(lambda: None):
        console.warnings(unfinished.take_place(overwrite))


def save(console: Console, model: ResidentModel, unfinished: Unfinished, output: str, settings: str) -> None:
    """Write the model and the text of the settings that made it; `output` is where they will be in the end."""
    console.timed(f"Saving to {output}")
    with naming(unfinished.folder):
        model.save(unfinished.folder)
    console.lines(model.checkpoint.companions.describe())
    with naming(unfinished.folder / SETTINGS_FILE):
        (unfinished.folder / SETTINGS_FILE).write_text(settings, encoding="utf-8", newline="")


def write_results(console: Console, folder: Path, recipe: Record, name: str, base: Path) -> None:
    """Write the recipe, and what shows people what is in it: two pictures and a model card.

    name: the output's. base: the base's folder.
    """
    write_recipe(folder, recipe)
    drawn = {
        MERGE_MAP_FILE: lambda: merge_map(recipe, folder / MERGE_MAP_FILE),
        PHRASE_CHART_FILE: lambda: phrase_chart(recipe, folder / PHRASE_CHART_FILE),
        CARD_FILE: lambda: write_card(folder, recipe, name, base, (MERGE_MAP_FILE, PHRASE_CHART_FILE)),
    }
    for file, write in drawn.items():
        try:
            with naming(folder / file):
                write()
        except Exception as error:  # no reason to lose a merge
            (folder / file).unlink(missing_ok=True)
            console.warning(f"{file} could not be made ({first_line(error)})")


def prepare_libraries(seed: int) -> None:
    """Same bits from the same config, and no chatter from the libraries between our lines."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, about later versions of theirs
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()


def begin_search(
    config: Config,
    console: Console,
    models: Models,
    record: RunRecord,
    ahead: Ahead,
    budget: Budget,
    group: Group,
    placement: Sequence[torch.device] | None = None,
) -> "Conductor":
    """Load the base and score it, print the summary; who leads the search from there.

    ahead: brings the base as number 0, then the candidates; each while the one before it is searched.
    """
    base = models.base
    note_source(record, group, 0, config.directories.model_path1, models.base_where, base)
    device = own_device(config.device, group.seat)
    model = load_model(base, device, config.dtype, config.trust_remote_code, placement=placement)
    tokenizer = load_tokenizer(base.path, config.trust_remote_code, base.companions)
    encoded = encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens)
    scorer = build_shared_scorer(model, encoded, budget, record.packing, group)
    search = Search(model, scorer, config, tokenizer, group)
    names = [candidate.name for candidate in models.candidates]
    console.lines(report.summary(config, model.describe(), scorer.describe(), names))
    console.warnings(search.warnings)
    return Conductor(config, console, search, record, ahead)


def build_shared_scorer(
    model: ResidentModel, encoded: Sequence[Encoded], budget: Budget, before: Packing | None, group: Group
) -> Scorer:
    """The same scorer in all processes, with a share of the packs in each.

    before: the packing with which an earlier run has scored; it is kept if the model still takes its layout and, on a
    CPU, where too little memory is the end, if the budget has room for it.
    """
    if before is not None and (model.device.type != "cpu" or before.tokens <= budget.tokens):
        budget = before.applied_to(budget)
    # How to score is measured once: another machine's rounding must not make another choice.
    scorer = group.together(lambda: build_scorer(model, encoded, budget, seat=group.seat) if group.seat.leads else None)
    settings = group.from_first(scorer and scorer.settings)
    scorer = group.together(lambda: scorer or Scorer(model, encoded, *settings, group.seat))
    if before is not None and before.layout == scorer.layout and before.applied_to(budget) == budget:
        group.together(lambda: scorer.pack_as(before))
    return scorer


def note_source(record: RunRecord, group: Group, number: int, text: str, where: str, checkpoint: Checkpoint) -> None:
    """Note which model a number is. Raises ConfigError if it is not what an earlier run, or another process, has."""
    noted = group.from_first(group.together(lambda: record.source(number, text, where, checkpoint)))
    here = f"is not the same in process {group.seat.number} as in process 0"
    group.together(lambda: compare_fingerprints(noted, checkpoint, here) if not group.seat.leads else None)


def resume_search(console: Console, search: Search, record: RunRecord, resume: bool) -> list[float]:
    """Note the base's scores or, where an earlier run has, go on from its own; those scores."""
    measured, packing = list(search.log_probabilities), search.scorer.packing
    search.log_probabilities, search.weights = record.start(measured, search.weights, packing)
    if record.count:
        console.warnings(record.warnings(packing))
        if measured != search.log_probabilities and record.compares(packing):
            console.warning("the base scores otherwise here than where the run began: its end may differ slightly")
        console.timed(f"Resuming: {record.count} decisions are carried out again from the journal")
    elif resume:
        console.timed("Nothing to resume: beginning at the beginning")
    return list(search.log_probabilities)


class Conductor:
    """Leads a search through all candidates, from where an earlier run has left it."""

    def __init__(self, config: Config, console: Console, search: Search, record: RunRecord, ahead: Ahead) -> None:
        self.config, self.console, self.search, self.record, self.ahead = config, console, search, record, ahead
        self.layers = len(search.model.layers)
        # The accepted merges of every layer and, last, of the header.
        self.origins: list[list[Merge]] = [[(1.0, search.model.checkpoint.name)] for _ in range(self.layers + 1)]

    def conduct(self, candidates: Sequence[Candidate], resume: bool = False, table: str = "full") -> None:
        """Search one candidate after another, with a phrase table before the first and after each.

        resume: whether to go on with an earlier run was asked for. table: how much of the tables is shown.
        """
        console, search = self.console, self.search
        self._tell_of_memory()
        self._show_table(table, whole_in_log=True)
        start = resume_search(console, search, self.record, resume)
        steps = len(candidates) * search.steps_per_candidate()
        with console.progress(steps) as self.bar, postponed(console.heard) as self.end_if_asked:
            for number, candidate in enumerate(candidates, start=1):
                self._turn = f"{number}/{len(candidates)}"
                console.timed(f"Candidate {self._turn}: {candidate.name}")
                self._candidate(number, candidate)
                self.bar.left((len(candidates) - number) * search.steps_per_candidate())
                self._show_table(table, start, whole_in_log=number == len(candidates))
                if not self.config.keep_downloads:
                    later = [repository for other in candidates[number:] for repository in other.repositories]
                    remove_downloads(console, candidate.repositories, [search.model.checkpoint.repository, *later])

    def _show_table(self, kind: str, start: Sequence[float] | None = None, whole_in_log: bool = False) -> None:
        state = self.config.pairs, self.search.weights, self.search.log_probabilities, start
        whole = report.phrase_table(*state, "full") if whole_in_log else None
        self.console.lines(report.phrase_table(*state, kind), whole)

    def _candidate(self, number: int, candidate: Candidate) -> None:
        failure, group = None, self.search.group
        behind = self.search.repeated + len(self.record.decisions(number))
        try:
            group.together(lambda: self.ahead.wait(number))
            note_source(self.record, group, number, candidate.text, candidate.where, candidate.checkpoint)
            failure = self._search(number, candidate)
        except CheckpointError as error:
            if self.config.on_error == "stop":
                raise
            if self.search.repeated < behind:  # the recipe would tell of merges that the output does not have
                kept = f"what was accepted of {candidate.name} can't be built again, so it is not skipped"
                raise CheckpointError(f"{error}; {kept}") from None
            failure = str(error)
            self.search.measure()
        finally:
            candidate.checkpoint.release()
        if failure:
            self.console.warning(f"{candidate.name} is given up; what was accepted of it stays: {failure}")
        self._tell_of_memory()
        if self.record.end(number) is None:
            self.record.closed(number, self.search.log_probabilities, failure, self.search.scorer.packing)

    def _search(self, number: int, candidate: Candidate) -> str | None:
        """Decide what is not decided yet; why an earlier run has given the candidate up, if it has."""
        done, end = self.record.decisions(number), self.record.end(number)
        if end is not None:
            self.search.repeat(candidate, done)
            self.search.log_probabilities, failure = end
            self._count_repeated(done)
            return failure
        self._count_repeated(done)
        began, timed = time.monotonic(), not done  # the first one waits until what was done is done again
        # Closed whatever happens: the candidate is read by a thread.
        with closing(self.search.candidate(candidate, done)) as decisions:
            for decision in decisions:
                self.record.decided(number, decision, time.monotonic() - began, self.search.scorer.packing)
                self._count(decision, timed)
                merges = self.origins[self._place(decision)]
                self._tell_of_memory()
                show_decision(self.console, decision, merges, self.layers, len(self.config.merge_method) > 1)
                self.end_if_asked()
                began, timed = time.monotonic(), True
        return None

    def _tell_of_memory(self) -> None:
        self.console.lines(self.search.memory_notes)
        self.search.memory_notes.clear()

    def _count_repeated(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            self._count(decision, timed=False)

    def _count(self, decision: Decision, timed: bool) -> None:
        """Take note of a decision. timed: whether it took what a decision takes."""
        if decision.ratio is not None:
            self.origins[self._place(decision)].append((decision.share, decision.model))
        count = self.bar.update if timed else self.bar.skip
        count(self.search.steps(decision.layer, decision.method))
        accepted = sum(len(merges) - 1 for merges in self.origins)
        self.bar.tell(report.standing(self._turn, decision, self.layers, accepted))

    def _place(self, decision: Decision) -> int:
        return self.layers if decision.layer is None else decision.layer


class Clock:
    """Seconds that the phases of a run have taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def lap(self, phase: str) -> None:
        """A phase is over, the next one begins."""
        now = time.monotonic()
        self.seconds[phase], self._began = round(now - self._began, 1), now


def fetch_now(console: Console, job: Job) -> None:
    """Fetch a job's files from the hub, if any are missing, and return when they are here. Raises ConfigError if the
    disk is too small, CheckpointError if they can't be had."""
    check_space([job], keep=True)
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
                console.warning(f"{repository.folder} could not be removed ({error.strerror})")


def show_decision(
    console: Console, decision: Decision, merges: Sequence[Merge], layers: int, name_method: bool
) -> None:
    """The two lines of a decision and the rule below them; before them, what there is to say about it."""
    if decision.warning:
        console.warning(decision.warning)
    if decision.note:
        console.line(decision.note)
    composition, outcome = report.decision_lines(decision, merges, layers, name_method)
    console.line(composition)
    console.timed(outcome)
    console.line("----")
