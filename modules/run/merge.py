"""One whole merge, from the configuration to the saved model.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from modules.checkpoints import (
    Ahead,
    Models,
    begin_download,
    check_space,
    fetch_now,
    load_tokenizer,
    locations_of,
    looked_up,
    open_models,
    remove_downloads,
)
from modules.config import Config
from modules.model import ResidentModel, load_model, own_device
from modules.output import (
    JournalCopy,
    Place,
    RunRecord,
    Unfinished,
    check_apart,
    check_output,
    held_place,
    input_paths,
    is_finished,
    unfinished_output,
    written_paths,
)
from modules.output import tables as report
from modules.run.conductor import Clock, Conductor
from modules.run.estimate import calibrate, estimate, plan_lines
from modules.run.plan import Plan, Room, check, find_room, plan_run
from modules.run.steps import note_source, prepare_libraries, save, write_results
from modules.runtime import BANNER, Console, postponed
from modules.runtime.distributed import ALONE, Group
from modules.scoring import Budget, Encoded, Packing, Scorer, build_scorer, doubtful_phrases, encode_pairs
from modules.search import Search, mean_shares


@dataclass(frozen=True)
class Start:
    """What the process that leads tells the others, for them to begin the search: all that is not in the YAML file."""

    journal: JournalCopy
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
        group.from_first(Start(JournalCopy(record.journal.records), plan.budget))
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


def follow_merge(config: Config, console: Console, options: Options, group: Group) -> None:
    """Search along from when the process that leads begins, until all candidates are searched.

    Raises as `merge_models` does, and ProcessLost when another process ends before its time.
    """
    prepare_libraries(config.random_seed)
    start = group.from_first()
    if start is NOTHING_TO_SEARCH:
        return
    models = open_models(config, partial(fetch_now, console))
    with Ahead(models.jobs, partial(begin_download, console)) as ahead:
        ahead.wait(0)
        record = RunRecord(start.journal, config)
        conductor = begin_search(config, console, models, record, ahead, start.budget, group)
        conductor.conduct(models.candidates)
