"""Carries out a whole merge, from the configuration to the saved model.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.downloads import Prefetcher, check_space, fetching
from modules.checkpoints.open_models import Models
from modules.config.inputs import check_apart, input_paths, read_neutral_texts
from modules.config.schema import Config
from modules.metrics.evaluator import Evaluator
from modules.metrics.metric import Context
from modules.metrics.own_answers import NO_ANSWERS, Answers, base_answers
from modules.metrics.registry import METRICS
from modules.metrics.texts import drift_texts
from modules.model.arithmetic import Arithmetic
from modules.model.base_model import ResidentModel
from modules.model.loading import ModelLoader, release_memory
from modules.output import tables as report
from modules.output.folder import OutputFolder, check_output, locked_output, unfinished_output, written_paths
from modules.output.journal import JOURNAL_FILE, Journal, Line, read_journal
from modules.output.recipe import Recipe, is_finished
from modules.output.records import Source
from modules.output.run_record import RunRecord, begun_run
from modules.run.conductor import Clock, Conductor, show_results
from modules.run.joint import JointConductor
from modules.run.plan import Plan, estimate_seconds, make_plan, plan_lines
from modules.run.replay import rebuild_of
from modules.run.samples import Samples
from modules.run.steps import ask, end, finish, note_source, prepare_libraries, save, with_chats_rendered
from modules.run.tasks import base_on_tasks, check_tasks
from modules.runtime.console import Console
from modules.runtime.distributed import ALONE, Group
from modules.scoring.budget import Budget, Packing
from modules.scoring.chats import Asked
from modules.scoring.layout import build_scorer
from modules.scoring.narrowness import check_float16
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import Encoded, doubtful_phrases, encode_pairs
from modules.search.search import Search, WeighedMetric
from modules.search.strategies import total_rounding


@dataclass(frozen=True)
class Start:
    """What the main process sends the others at the start of a search: all that is not in the YAML file."""

    journal: list[Line]  # its lines
    compute: Arithmetic
    budget: Budget


NOTHING_TO_SEARCH = None  # said in place of a Start
NOBODY_ASKED = Asked()


@dataclass(frozen=True)
class Options:
    """Options of the command line that are not in the configuration."""

    settings_file: Path | None  # is read, and must not be overwritten
    overwrite: bool = False  # replace an output that exists
    resume: bool = False
    restart: bool = False
    dry_run: bool = False  # only check everything and say what the run would need
    table: str = "full"  # one of TABLES: how much of the phrase table is shown
    is_part: bool = False  # of a longer run, which prints the last lines

    def inputs(self, config: Config) -> list[Path]:
        """The files and folders that a run reads."""
        return [*([self.settings_file] if self.settings_file else []), *input_paths(config)]


def merge_models(config: Config, console: Console, options: Options, group: Group = ALONE) -> None:
    """Search, merge and save as configured. The output directory appears only when everything succeeded.

    group: this is its main process. Raises ConfigError for what can't be used, found before any work; CheckpointError
    or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    output = Path(config.directories.output_directory)
    check_apart(written_paths(output), options.inputs(config))
    with locked_output(output, console, options.dry_run) as target:
        if options.resume and not options.dry_run and is_finished(config, output):
            console.final(f"This run is already finished; its output is in {output}")
        else:
            check_output(target, options.overwrite)
            read_neutral_texts(config.neutral_texts)  # reports their errors before any work
            check_tasks(config)
            loader = ModelLoader(config, console, group.rank)
            models = loader.open()
            earlier_run = begun_run(read_journal(target.partial / JOURNAL_FILE)) if options.resume else None
            loader, prompts = ask(loader, models, earlier_run and earlier_run.settings)
            check_space(models.jobs)
            config = replace(loader.config, device=loader.device)
            plan = make_plan(config, models, loader.rank.local_world_size, earlier_run and earlier_run.computed)
            console.warnings([*doubtful_phrases(config.pairs), *plan.warnings])
            loader = replace(loader, compute=plan.arithmetic)
            if not options.dry_run:
                loader.in_range(
                    lambda ranged_loader: _merge(ranged_loader, options, group, target, models, plan, prompts)
                )
                return
            console.timed("Measuring the speed of this machine")
            console.lines(plan_lines(plan, estimate_seconds(plan, models.module)))
            console.final(f"Dry run: wrote only {', '.join([f'the log {console.log_path}', *models.written])}")
    group.broadcast(NOTHING_TO_SEARCH)


def _merge(
    loader: ModelLoader,
    options: Options,
    group: Group,
    target: OutputFolder,
    models: Models,
    plan: Plan,
    prompts: Asked,
) -> None:
    """Search in the loader's arithmetic, and move the result to the output. prompts: those of the samples."""
    clock = Clock()
    config = loader.config
    console = loader.console
    goes_on = loader.compute != plan.arithmetic  # with the decisions in the plan's arithmetic, which was too narrow
    resume = options.resume or goes_on
    with (
        unfinished_output(target, resume, options.restart and not goes_on) as unfinished,
        fetching(console, models.jobs) as prefetcher,
    ):
        record = RunRecord(unfinished.journal, config, loader.compute.name)
        prefetcher.wait(0)
        clock.lap("download")
        group.broadcast(Start(record.journal.records, loader.compute, plan.budget))
        conductor = begin_search(loader, models, record, prefetcher, plan.budget, group, plan.placement, prompts)
        clock.lap("load")
        conductor.conduct(models.candidates, resume, options.table)
        recipe, devices, tokenizer = _conclude(conductor, models)
        clock.lap("search")
        del conductor
        release_memory()  # the model's: saving reads the files again
        record.source(0, models.base_where, models.base)
        accepted = _accepted(record, recipe, models)
        layout = loader.layout(models)
        rebuild = rebuild_of(recipe, layout, devices, lambda: tokenizer, accepted)
        save(console, rebuild, models.base, unfinished, config.directories.output_directory)
        clock.lap("save")
        recipe = recipe.model_copy(update={"seconds": {**clock.seconds, **recipe.seconds}})
        needed = [(source, models.candidates[source.number - 1]) for source in recipe.needed_sources[1:]]
        finish(console, unfinished, recipe, target.output, layout, needed, options.overwrite)
    if not options.is_part:
        end(console, config, models, config.directories.output_directory)


def _accepted(record: RunRecord, recipe: Recipe, models: Models) -> Iterator[tuple[Source, Candidate]]:
    """The candidates with accepted merges, and their sources. Raises ConfigError if a file has changed since."""
    for source in recipe.needed_sources[1:]:
        candidate = models.candidates[source.number - 1]
        if str(source.number) not in recipe.failures:  # of one that was given up, not every file can be read
            record.source(source.number, candidate.where, candidate.checkpoint)
        yield source, candidate


def _conclude(conductor: Conductor, models: Models) -> tuple[Recipe, dict[str, torch.device], Any]:
    """Report the result of a search. Returns the recipe, with the seconds of the search, and what saving needs once the
    model is released: the device on which each tensor was merged, and the tokenizer."""
    console = conductor.console
    config = conductor.config
    search = conductor.search
    evaluator = conductor.evaluator
    if conductor.is_base:
        console.warning(
            "no merge was accepted, so the output equals the base; monster_mapper.py shows how likely your phrases are"
        )
    samples = conductor.samples.compare(evaluator)
    show_results(conductor, models.candidates)
    console.lines(report.sample_lines(samples))
    names = [models.base.name, *(candidate.name for candidate in models.candidates)]
    console.lines(report.weight_lines(names, conductor.weights, conductor.layers))
    composition = conductor.composition
    console.line("Merge composition:")
    console.lines([*(f"{weight * 100:6.2f}%  {model}" for model, weight in composition.items()), ""])
    phrases = evaluator.phrases
    start = evaluator.start
    current = evaluator.now
    recipe = conductor.record.recipe(
        config.pairs,
        search.weights,
        search.log_probabilities,
        composition,
        {"base": start.metrics, "merge": current.metrics},
        (phrases.pairs, phrases.weights, start.held_out, current.held_out),
        samples,
        search.model.dtypes(),
        {"evaluation": round(evaluator.seconds + conductor.samples.seconds, 1)},
        conductor.weights,
    )
    devices = {name: tensor.device for name, tensor in search.model.tensors.items()}
    return recipe, devices, search.tokenizer


def begin_search(
    loader: ModelLoader,
    models: Models,
    record: RunRecord,
    prefetcher: Prefetcher,
    budget: Budget,
    group: Group,
    placement: Sequence[torch.device] | None = None,
    prompts: Asked | None = None,
) -> Conductor:
    """Load the base, score it and print the summary. Returns the conductor of the search.

    prefetcher: fetches the base as number 0, then the candidates, each while the previous one is searched. prompts:
    those of the samples.
    """
    config = loader.config
    console = loader.console
    note_source(record, group, 0, models.base_where, models.base)
    context = load_base(loader, models, budget, group, placement, record, prompts or Asked())
    search = context.search
    names = [candidate.name for candidate in models.candidates]
    weighed: dict[str, str] = {}
    for metric in search.weighed:
        weighed |= metric.describe(search.limits.weights.get(metric.name, 0.0))
    rounding = total_rounding(search.weights, search.rounding)
    about_model = search.model.describe()
    about_scorer = search.scorer.describe()
    console.lines(report.summary(config, about_model, about_scorer, names, weighed, rounding))
    console.warnings(search.warnings)

    # If the main process fails here, all processes raise.
    evaluator = group.on_main_process(lambda: Evaluator(context))
    task_scores = group.on_main_process(lambda: base_on_tasks(context, record))
    samples = Samples(context, prompts or Asked(), task_scores)
    conductor = JointConductor if config.search == "joint" else Conductor
    return conductor(config, console, search, record, prefetcher, evaluator, samples)


def load_base(
    loader: ModelLoader,
    models: Models,
    budget: Budget,
    group: Group = ALONE,
    placement: Sequence[torch.device] | None = None,
    record: RunRecord | None = None,
    prompts: Asked = NOBODY_ASKED,
    weighs: bool = True,
) -> Context:
    """Load and score the base. Returns what metrics are measured with.

    record: of the run; None if there will be no trials. prompts: as the base reads them; only in the main process.
    weighs: whether there are trials that metrics may judge.
    """
    config = loader.config
    model, tokenizer = loader.load(models, placement)
    answers = shared_answers(model, tokenizer, loader, prompts, group, record)
    encoded = encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens)
    loader.console.timed("Scoring the base")
    scorer = build_shared_scorer(model, encoded, budget, record and record.packing, group)
    texts = drift_texts(config, model, tokenizer, answers)
    loader.console.lines(group.on_all_ranks(lambda: check_float16(scorer, texts.all)))
    context = Context(config, loader.console, model, tokenizer, budget, group.rank, texts, answers)

    def weigh() -> list[WeighedMetric]:
        weighed = [metric.weigh(context) for metric in METRICS if metric.weigh]
        return [metric for metric in weighed if metric is not None]

    weighed = group.on_all_ranks(weigh) if record and weighs else []
    return replace(context, search=Search(model, scorer, config, tokenizer, group, weighed))


def shared_answers(
    model: ResidentModel,
    tokenizer: Any,
    loader: ModelLoader,
    prompts: Asked,
    group: Group,
    record: RunRecord | None,
) -> Answers:
    """The base's answers: those that an earlier run noted, and those that the main process generates."""
    lines = record.lines("answers") if record else []
    noted = lines[-1].answers if lines else NO_ANSWERS
    generate = partial(base_answers, model, tokenizer, loader.config, prompts, loader.console, noted)
    answers = group.broadcast(group.on_main_process(generate))
    if record and (not lines or answers != noted):
        record.note("answers", answers=answers)
    return answers


def build_shared_scorer(
    model: ResidentModel, encoded: Sequence[Encoded], budget: Budget, earlier_packing: Packing | None, group: Group
) -> Scorer:
    """Build the same scorer in all processes, with a part of the packs in each.

    earlier_packing: with which an earlier run scored. It is kept if the model still takes its layout and, on a CPU
    (where too little memory ends the process), if the budget has room for it.
    """
    if earlier_packing is not None and (model.device.type != "cpu" or earlier_packing.tokens <= budget.tokens):
        budget = earlier_packing.applied_to(budget)
    # Only the main process chooses how to score: rounding on another machine must not lead to another choice.
    scorer = group.on_main_process(lambda: build_scorer(model, encoded, budget, rank=group.rank))
    settings = group.broadcast(scorer and scorer.settings)
    scorer = group.on_all_ranks(lambda: scorer or Scorer(model, encoded, *settings, group.rank))
    if (
        earlier_packing is not None
        and earlier_packing.layout == scorer.layout
        and earlier_packing.applied_to(budget) == budget
    ):
        group.on_all_ranks(lambda: scorer.pack_as(earlier_packing))
    return scorer


def merge_as_worker(config: Config, console: Console, options: Options, group: Group) -> None:
    """Search along in another process than the main one, from its start until all candidates are searched.

    Raises as `merge_models` does, and ProcessLost when another process ends too early.
    """
    prepare_libraries(config.random_seed)
    start = group.broadcast()
    if start is NOTHING_TO_SEARCH:
        return
    loader = ModelLoader(config, console, group.rank, start.compute)
    models = loader.open()

    def search_along(ranged_loader: ModelLoader) -> None:
        # When the main process begins again in another arithmetic, it broadcasts a new start.
        current_start: Start = start if ranged_loader is loader else group.broadcast()
        with fetching(console, models.jobs) as prefetcher:
            prefetcher.wait(0)
            ranged_loader = with_chats_rendered(ranged_loader, models, begun_run(current_start.journal).settings)
            record = RunRecord(Journal(current_start.journal), ranged_loader.config, current_start.compute.name)
            begin_search(ranged_loader, models, record, prefetcher, current_start.budget, group).conduct(
                models.candidates
            )

    loader.in_range(search_along)
