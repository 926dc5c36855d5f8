"""An adapter learned for the base, from the configuration to PEFT's files.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modules.checkpoints.downloads import check_space, fetching
from modules.checkpoints.open_models import Models
from modules.config.inputs import check_apart, input_paths, read_neutral_texts
from modules.config.schema import Config
from modules.learn.adapter import Adapter, check_rank, linear_layers
from modules.learn.gradient import DriftText, LearningObjective, Loss
from modules.learn.state import read_state, save_state
from modules.learn.steps import Learner
from modules.metrics.evaluator import Evaluator
from modules.metrics.kl import NATS
from modules.metrics.metric import Context
from modules.model.loading import ModelLoader
from modules.output import tables as report
from modules.output.folder import OutputFolder, check_output, locked_output, unfinished_output, written_paths
from modules.output.journal import JOURNAL_FILE, read_journal
from modules.output.run_record import RunRecord, begun_run
from modules.run.merge import Options, load_base
from modules.run.samples import Samples
from modules.run.steps import ask, end, prepare_libraries
from modules.runtime.console import Console
from modules.runtime.errors import ConfigError
from modules.runtime.program import postponed
from modules.scoring.budget import Budget
from modules.scoring.chats import Asked
from modules.scoring.tokenization import doubtful_phrases, neutral_windows, spread
from modules.search.joint import largest_factor
from modules.search.strategies import total

HALF = 1 << 20  # tokens of each neutral text that are learned with: never more than half of it
CHECKED = 8  # windows of each text on which max_drift is held


def learn_adapter(config: Config, console: Console, options: Options) -> None:
    """Learn an adapter of the base and write it. Nothing is at the output directory before all is well.

    config: see `to_learn`. Raises ConfigError for what can't be used, found before any work; CheckpointError or OSError
    if a file fails.
    """
    prepare_libraries(config.random_seed)
    output = Path(config.directories.output_directory)
    check_apart(written_paths(output), [options.settings_file, *input_paths(config)])
    with locked_output(output, console, options.dry_run) as target:
        check_output(target, options.overwrite)
        read_neutral_texts(config.neutral_texts)  # what is wrong with them is told before any work
        loader = ModelLoader(config, console)
        models = loader.open()
        check_rank(linear_layers(models.module), config.learn.rank)
        begun = begun_run(read_journal(target.partial / JOURNAL_FILE)) if options.resume else None
        if begun and begun.settings.learn != config.learn:
            raise ConfigError(f"learn has changed since {target.partial} was begun; begin again with --restart")
        loader, asked = ask(loader, models, begun and begun.settings, config.prompts)
        check_space(models.jobs)
        loader = loader.fitting(models)
        console.warnings(doubtful_phrases(loader.config.pairs))
        loader.in_range(lambda own: _learn(own, options, target, models, asked))


def _learn(loader: ModelLoader, options: Options, target: OutputFolder, models: Models, asked: Asked) -> None:
    config, console = loader.config, loader.console
    with (
        unfinished_output(target, options.resume, options.restart) as unfinished,
        fetching(console, models.jobs) as prefetcher,
    ):
        record = RunRecord(unfinished.journal, config, loader.compute.name)
        prefetcher.wait(0)
        record.source(0, models.base_where, models.base)
        context = _halved(load_base(loader, models, Budget(), weighs=False))
        search = context.search
        evaluator = Evaluator(context)
        samples = Samples(config, console, context.model, context.tokenizer, asked)
        adapter = Adapter(context.model.module, config.learn.rank, config.random_seed)
        weight = total([abs(score) for score in search.base_scores]) / NATS
        objective = LearningObjective(
            context.model,
            adapter,
            search.scorer.encoded,
            search.weights,
            search.scorer.layout,
            replace(search.scorer.budget, tokens=512),
            [DriftText("neutral", context.neutral_for_trials, [[True] * len(w) for w in context.neutral_for_trials])],
            weight if config.weight_of_drift == "auto" else config.weight_of_drift,
        )
        learner = Learner(objective, config.learn, config.random_seed)
        with console.progress(config.learn.steps) as bar:
            while learner.step < config.learn.steps:
                began = time.monotonic()
                gradient, loss = learner.gradient()
                learner.move(gradient)
                seconds = time.monotonic() - began
                metrics = {"loss": loss.loss, "total": loss.total, **loss.drift}
                record.note("learned", step=learner.step, metrics=metrics, seconds=seconds)
                console.timed(f"step {learner.step} {metrics} {seconds:.2f} s")
                bar.update(1)
        start = list(search.log_probabilities)
        search.measure()
        evaluator.evaluate()
        state = config.pairs, search.weights, search.log_probabilities, start
        console.lines(report.phrase_table(*state, "full", search.rounding))
        console.line(report.metrics_line(evaluator.start.metrics, evaluator.now.metrics))
        console.lines(report.sample_lines(samples.compared()))
        adapter.save(unfinished.folder, "base", None)
        (unfinished.folder / "merge_monster.yaml").write_text("")
        unfinished.commit(options.overwrite)


def _halved(context: Context) -> Context:
    """The context with neutral texts halved: one half is learned with, drift is measured on the other."""
    texts = read_neutral_texts(context.config.neutral_texts)
    model = context.model
    measured, learned = neutral_windows(context.tokenizer, texts, model.vocabulary, model.max_tokens, HALF)
    return replace(context, neutral=measured, neutral_for_trials=learned)
