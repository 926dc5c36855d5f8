"""Learns an adapter for the base, from the configuration to PEFT's files.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modules.checkpoints.checkpoint import load_tokenizer
from modules.checkpoints.downloads import check_space, fetching
from modules.checkpoints.open_models import Models
from modules.config.inputs import check_apart, read_neutral_texts
from modules.config.locations import repositories_in
from modules.config.schema import Config
from modules.learn.adapter import Adapter, check_rank, linear_layers
from modules.learn.card import adapter_card
from modules.learn.gradient import DriftText, LearningObjective, Loss
from modules.learn.kept_texts import Texts, answers_in, read_kept_texts, taught_by
from modules.learn.plan import LearnPlan, plan_learning, tokens_of_a_step
from modules.learn.state import read_state, save_state
from modules.learn.steps import Learner, LearnState
from modules.metrics.evaluator import Evaluator
from modules.metrics.kl import NATS
from modules.metrics.metric import Context
from modules.metrics.registry import columns_of
from modules.model.arithmetic import Arithmetic
from modules.model.base_model import is_finite
from modules.model.devices import free_memory, resolve_device
from modules.model.loading import ModelLoader
from modules.model.memory import sizes_of
from modules.output import tables as report
from modules.output.card_settings import settings_file
from modules.output.changes import without_paths
from modules.output.folder import (
    SETTINGS_FILE,
    STATE_FILE,
    OutputFolder,
    check_output,
    locked_output,
    unfinished_output,
    written_paths,
)
from modules.output.journal import JOURNAL_FILE, read_journal
from modules.output.licence import common_licence
from modules.output.model_card import CARD_FILE
from modules.output.recipe import Recipe
from modules.output.records import Sample
from modules.output.run_record import RunRecord, begun_run
from modules.run.merge import Options, load_base
from modules.run.plan import seconds_of_a_layer
from modules.run.samples import Samples
from modules.run.steps import ask, end, prepare_libraries
from modules.runtime.console import Console, Progress
from modules.runtime.distributed import ALONE
from modules.runtime.errors import ConfigError, naming
from modules.runtime.program import postponed
from modules.runtime.text import duration, in_memory
from modules.scoring.chats import Asked
from modules.scoring.layout import NOT_TAKEN
from modules.scoring.tokenization import doubtful_phrases, encode_pairs, spread
from modules.search.joint import largest_factor
from modules.search.strategies import scores, total

# metrics that max_drift limits
NEUTRAL_KL = "kl"
OWN_KL = "own_kl"
NEUTRAL_PART = 0.25  # of learn.drift_tokens; answers are where a model that learns drifts
ALL = 1 << 20  # tokens to learn with: more than there are in half of the neutral texts and half of the answers
CHECKED = 8  # passages of each text on which max_drift is held
FORWARDS_OF_A_STEP = 3  # forward, once more for the gradient, backward: weights of the base need none


def learn_adapter(config: Config, console: Console, options: Options) -> None:
    """Learn an adapter for the base and write it. The output directory appears only when everything succeeded.

    config: see `to_learn`. Raises ConfigError for what can't be used, found before any work; CheckpointError or OSError
    if a file fails.
    """
    prepare_libraries(config.random_seed)
    output = Path(config.directories.output_directory)
    check_apart(written_paths(output), options.inputs(config))
    with locked_output(output, console, options.dry_run) as target:
        check_output(target, options.overwrite)
        read_neutral_texts(config.neutral_texts)  # reports their errors before any work
        loader = ModelLoader(config, console)
        models = loader.open()
        check_rank(linear_layers(models.module), config.learn.rank)
        earlier_run = begun_run(read_journal(target.partial / JOURNAL_FILE)) if options.resume else None
        if earlier_run and earlier_run.settings.learn != without_paths(config).learn:
            raise ConfigError(
                f"keys of learn have changed since {target.partial} was started; start over with --restart"
            )
        kept_texts = read_kept_texts(config.learn.texts) if config.learn.texts else {}
        loader, prompts = ask(loader, models, earlier_run and earlier_run.settings, extra_prompts=tuple(kept_texts))
        check_space(models.jobs)
        goes_on = earlier_run and config.compute_dtype == config.dtype == "auto"
        loader = replace(loader, compute=Arithmetic.named(earlier_run.computed)) if goes_on else loader.fitting(models)
        console.warnings(doubtful_phrases(loader.config.pairs))
        if options.dry_run:
            console.timed("Measuring the speed of this machine")
            console.lines(_plan_lines(loader, models))
            console.final(f"Dry run: wrote only {', '.join([f'the log {console.log_path}', *models.written])}")
            return
        loader.in_range(lambda ranged_loader: _learn(ranged_loader, options, target, models, prompts))
    if not options.is_part:
        console.line(f"To merge it, add to your config: models_to_merge: [{config.directories.output_directory}]")
        end(console, config, models, config.directories.output_directory)


def _learn(loader: ModelLoader, options: Options, target: OutputFolder, models: Models, prompts: Asked) -> None:
    """Learn in the loader's arithmetic, and put the result into its place."""
    config = loader.config
    console = loader.console
    with (
        unfinished_output(target, options.resume, options.restart) as unfinished,
        fetching(console, models.jobs) as prefetcher,
    ):
        record = RunRecord(unfinished.journal, config, loader.compute.name)
        prefetcher.wait(0)
        record.source(0, models.base_where, models.base)
        plan = _plan(loader, models)
        placement = loader.placement(models, with_header=False)
        wide_loader = replace(loader, config=replace(config, neutral_tokens=ALL))
        context = load_base(wide_loader, models, plan.budget, ALONE, placement, record, prompts, weighs=False)
        lesson = Lesson(context, plan, record, unfinished.folder, prompts)
        recipe = lesson.recipe(lesson.learn(options.resume, options.table))
        console.timed(f"Saving to {config.directories.output_directory}")
        lesson.save(recipe, target.output.name)
        with postponed(lambda: None):  # it takes a moment, in which Ctrl-C is not heard unless it comes twice
            console.warnings(unfinished.commit(options.overwrite))


def _plan(loader: ModelLoader, models: Models) -> LearnPlan:
    device = resolve_device(loader.device)
    return plan_learning(models.module, loader.config.learn.rank, loader.compute, device, free_memory(device))


class Lesson:
    """Carries out the steps of learning: journal, console, resumption, the files at the end."""

    def __init__(self, context: Context, plan: LearnPlan, record: RunRecord, folder: Path, prompts: Asked) -> None:
        """context: with a search. folder: where the output is written. Raises ConfigError if not all layers of the base
        are on the device, or if drift counts and there is no text to measure it on."""
        config = context.config
        search = context.search
        self.config = config
        self.console = context.console
        self.search = search
        self.model = context.model
        self.record = record
        self.folder = folder
        if any(tensor.is_meta for tensor in self.model.module.parameters()):
            raise ConfigError("--learn needs all layers on the device, but some are in CPU memory")
        self.evaluator = Evaluator(context)
        self.samples = Samples(context, prompts)
        self.start = self._start()
        kept_texts = read_kept_texts(config.learn.texts) if config.learn.texts else {}
        self.texts = _texts_of(context, kept_texts, prompts)
        self.adapter = Adapter(self.model.module, config.learn.rank, config.random_seed)
        weight = _drift_weight(config, scores(self.start, search.weights))
        scorer = search.scorer
        texts = [text for text in self.texts if weight or text.occurrences]
        packed = scorer.encoded, search.weights, scorer.layout, plan.budget
        objective = LearningObjective(self.model, self.adapter, *packed, texts, weight, plan.keeps_activations)
        self.learner = Learner(objective, config.learn, config.random_seed)
        learn = config.learn
        rows = {
            "Trained on": f"{len(config.pairs)} pairs and {sum(text.taught for text in texts)} phrases in answers",
            "Adapter": f"rank {learn.rank}, {plan.parameters:,} parameters",
            "Learning": f"{learn.steps} steps of {learn.pairs} pairs, learning rate {learn.learning_rate:g}",
            "KL penalty": f"{weight:.5g} per nat on {' and '.join(text.name for text in texts)}" if texts else "none",
        }
        self.console.lines(report.learn_summary(config, self.model.describe(saving=False), scorer.describe(), rows))
        self.console.warnings(search.warnings)

    def _start(self) -> list[float]:
        """Note the base's scores, or take those that an earlier run noted. Returns the log-probabilities."""
        search = self.search
        record = self.record
        packing = search.scorer.packing
        start = record.line("start", 0) or record.note(
            "start",
            number=0,
            log_probabilities=search.log_probabilities,
            packing=packing,
            weights=search.weights,
            rounding=search.rounding,
        )
        search.log_probabilities = list(start.log_probabilities)
        search.weights = list(start.weights)
        self.evaluator.take_noted_scores()
        if record.lines("learned"):
            self.console.warnings(record.warnings(packing))
        return list(start.log_probabilities)

    def learn(self, resume: bool, table: str) -> list[Sample]:
        """Make the remaining steps and show the result. Returns the answers of base and adapter.

        table: how much of the phrase tables is shown. resume: whether the user asked to go on with an earlier run.
        """
        console = self.console
        steps = self.config.learn.steps
        self._show_table(table)
        state = read_state(self.folder) if self.record.lines("learned") else None
        if state:
            self.learner.go_to(state)
            console.timed(f"Resuming after step {state.step} of {steps}")
        elif resume:
            console.timed("Nothing to resume; starting a new run")
        with console.progress(steps) as bar, postponed(console.on_interrupt) as end_if_asked:
            bar.skip(self.learner.step)
            self._steps(bar, end_if_asked)
        self._hold_limit()
        self.evaluator.evaluate("adapter")
        samples = self.samples.compare(self.evaluator, "adapter")
        self._show_table(table, self.start)
        self._show_metrics()
        console.lines(report.sample_lines(samples, "adapter"))
        return samples

    def _steps(self, bar: Progress, end_if_asked: Callable[[], None]) -> None:
        """Make all steps. A state is kept, in memory and on disk, once its loss and gradient are numbers."""
        learner = self.learner
        sound_state = self.learner.state
        while True:
            end_if_asked()
            began = time.monotonic()
            is_done = learner.step == self.config.learn.steps
            gradient, loss = ([], None) if is_done else learner.gradient()
            if not (self._is_sound() if is_done else _are_numbers(gradient, loss)):
                self._undo(sound_state)
                continue
            sound_state = learner.state
            save_state(self.folder, sound_state)
            if is_done:
                return
            learner.move(gradient)
            self._report_step(loss, time.monotonic() - began)
            bar.update(1)
            bar.tell(f"step {learner.step}/{self.config.learn.steps}, loss {loss.loss:.3f}")

    def _is_sound(self) -> bool:
        """Whether the present model's score of every phrase is a number."""
        self.search.measure()
        return not any(map(math.isnan, self.search.log_probabilities))

    def _undo(self, sound_state: LearnState) -> None:
        """Undo the step after which the loss was no number. Before the first step, raises as for the base's scores."""
        if self.learner.step == 0:
            raise self.model.no_numbers("its gradients")
        self.learner.undo(sound_state)
        rate = self.learner.rate
        self.console.warning(
            f"the loss was NaN after step {sound_state.step + 1}; undid it, the learning rate is now {rate:.3g}"
        )

    def _report_step(self, loss: Loss, seconds: float) -> None:
        """Note and show the loss with which a step began."""
        step = self.learner.step
        metrics = {"loss": loss.loss, "total": loss.total, **loss.drift}
        if step > len(self.record.lines("learned")):  # else an earlier run has
            self.record.note("learned", step=step, metrics=metrics, seconds=round(seconds, 3))
        drift = "".join(f" - KL on {name} {value:.4f}" for name, value in loss.drift.items())
        summary = f"loss {loss.loss:.3f} - total {loss.total:.3f}{drift}"
        self.console.timed(f"Step {step}/{self.config.learn.steps} - {summary} - {seconds:.1f} s")

    def _hold_limit(self) -> None:
        """Scale the adapter until the drift on each text is within max_drift."""
        limit = self.config.max_drift
        objective = self.learner.objective
        if limit is None:
            return

        def is_allowed(factor: float) -> bool:
            self.adapter.scale(factor)
            checked = [(text, spread(range(len(text.passages)), CHECKED)) for text in self.texts]
            return all(objective.drift(text, numbers) <= limit for text, numbers in checked)

        factor = largest_factor(is_allowed)
        self.adapter.scale(factor)
        if factor < 1:
            self.console.timed(f"Scaled the adapter by {factor:.3f} to hold max_drift {limit:g}")
            self.search.measure()

    def _show_table(self, kind: str, start: Sequence[float] | None = None) -> None:
        search = self.search
        state = self.config.pairs, search.weights, search.log_probabilities, start
        full_table = report.phrase_table(*state, "full", search.rounding)
        self.console.lines(report.phrase_table(*state, kind, search.rounding), full_table)

    def _show_metrics(self) -> None:
        """Show how metrics changed, and which phrases improved only on the taught contexts."""
        phrases = self.evaluator.phrases
        base = self.evaluator.start
        current = self.evaluator.now
        self.console.line(report.metrics_line(base.metrics, current.metrics))
        if phrases.pairs:
            taught = report.gains(self.config.pairs, self.search.weights, self.start, self.search.log_probabilities)
            held_out = report.gains(phrases.pairs, phrases.weights, base.held_out, current.held_out)
            self.console.lines(report.overfit_lines(taught, held_out))
        limit = math.inf if self.config.max_drift is None else self.config.max_drift
        for column in columns_of(current.metrics):
            drift = current.metrics[column.name]
            if column.name in (NEUTRAL_KL, OWN_KL) and drift > limit:
                finding = f"{column.label} is {drift:.4g} on held-out text"
                self.console.warning(f"{finding}, above max_drift {limit:g}; lower max_drift")

    def recipe(self, samples: Sequence[Sample]) -> Recipe:
        """The adapter's recipe, from which its card and its settings are written."""
        search = self.search
        phrases = self.evaluator.phrases
        start = self.evaluator.start
        current = self.evaluator.now
        return self.record.recipe(
            self.config.pairs,
            search.weights,
            search.log_probabilities,
            {},
            {"base": start.metrics, "merge": current.metrics},
            (phrases.pairs, phrases.weights, start.held_out, current.held_out),
            samples,
            self.model.dtypes(),
            {},
        )

    def save(self, recipe: Recipe, output: str) -> None:
        """Write the adapter, its card and its settings; remove the state. output: the name of its folder."""
        where = recipe.sources[0].where
        ids = repositories_in(where)
        base, revision = ids[0] if ids else (where, None)
        texts = " and ".join(text.name for text in self.learner.objective.texts)
        licence = common_licence([self.model.checkpoint.repository.folder])
        files = {
            CARD_FILE: adapter_card(recipe, output, texts, licence),
            SETTINGS_FILE: settings_file(recipe, output),
        }
        with naming(self.folder):
            self.adapter.save(self.folder, base, revision)
            for name, text in files.items():
                (self.folder / name).write_text(text, encoding="utf-8", newline="\n")
            (self.folder / STATE_FILE).unlink()


def _texts_of(context: Context, kept_texts: Texts, prompts: Asked) -> list[DriftText]:
    """The texts on which the model is to stay near the base.

    kept_texts: further texts of the base, beside its answers. Raises ConfigError if drift counts and there is no text.
    """
    config = context.config
    answers = [*context.answers.weighed, *answers_in(context.model, context.tokenizer, kept_texts, prompts)]
    answer_text = taught_by(context.tokenizer, answers, config.pairs, config.held_out_pairs, context.model.max_tokens)
    neutral = DriftText("neutral texts", context.texts.neutral_for_trials)
    if neutral.passages and answer_text.passages:
        neutral = replace(neutral, part=NEUTRAL_PART)
        answer_text = replace(answer_text, part=1 - NEUTRAL_PART)
    texts = [text for text in (neutral, answer_text) if text.passages]
    if config.is_guarded and not texts:
        raise ConfigError("neutral_texts: too little text to measure drift; add more, or set drift_weight: 0")
    return texts


def _drift_weight(config: Config, base_scores: Sequence[float]) -> float:
    """The loss that one nat of drift adds."""
    weight = config.weight_of_drift
    return total([abs(score) for score in base_scores]) / NATS if weight == "auto" else weight


def _are_numbers(gradient: Sequence[torch.Tensor], loss: Loss) -> bool:
    return math.isfinite(loss.loss) and all(map(is_finite, gradient))


@dataclass(frozen=True)
class Estimate:
    """What a run needs of memory and time."""

    plan: LearnPlan
    tokens: int  # of a step
    seconds: float | None  # of a step; None: not known


def estimate_learning(loader: ModelLoader, models: Models) -> Estimate:
    """The estimate of a run. loader: its `compute` is set."""
    config = loader.config
    device = resolve_device(loader.device)
    plan = _plan(loader, models)
    base = models.base
    sizes = sizes_of(models.module)
    tokenizer = load_tokenizer(base.path, base.companions)
    longest = getattr(models.module.config.get_text_config(), "max_position_embeddings", None)
    encoded = encode_pairs(tokenizer, config.pairs, sizes.vocabulary, longest)
    has_texts = (config.neutral_texts, config.own_texts) != ((), ())
    drift_tokens = config.learn.drift_tokens if has_texts else 0
    tokens = tokens_of_a_step(encoded, config.learn.pairs, drift_tokens, plan.budget)
    try:
        seconds_per_token = (
            seconds_of_a_layer(models.module, plan.budget.tokens, loader.compute.dtype, device) / plan.budget.tokens
        )
    except NOT_TAKEN:
        return Estimate(plan, tokens, None)
    return Estimate(plan, tokens, seconds_per_token * tokens * sizes.layers * FORWARDS_OF_A_STEP)


def _plan_lines(loader: ModelLoader, models: Models) -> list[str]:
    """The lines that tell the user what a run needs."""
    config = loader.config
    device = resolve_device(loader.device)
    estimate = estimate_learning(loader, models)
    learn = config.learn
    plan = estimate.plan
    tokens = estimate.tokens
    seconds = estimate.seconds
    free = free_memory(device)
    time_needed = "unknown for this model"
    if seconds is not None:
        time_needed = f"about {duration(seconds)} per step, {duration(seconds * learn.steps)} in total"
    parts = f"{in_memory(plan.base)} for the base, {in_memory(plan.adapter)} for the adapter"
    rows = {
        "Adapter": f"rank {learn.rank}, {plan.parameters:,} parameters",
        "Learning": f"{learn.steps} steps of {min(learn.pairs, len(config.pairs))} of {len(config.pairs)} pairs, "
        f"about {tokens:,} tokens each",
        "Memory needed": f"{in_memory(plan.needed)} on {device} ({parts})"
        + (f", {in_memory(free)} free" if free is not None else ""),
        "Time (estimate)": time_needed,
    }
    return [f"{name:<16} : {value}" for name, value in rows.items()]
