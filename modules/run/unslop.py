"""--unslop: from a base to a merge that writes fewer cliches, by the other commands, one after another.

Knows: the order of the commands, what each leaves for the next, where that lies. Refuses to know: how any of them does
its work.

What they leave is in OUT.unslop; the same command goes on with what is missing there. The output is one of the merges,
built again from its recipe.

    found.yaml          the phrases, of --discover
    samples/            all texts that models have written
    base.json           of --score: how probable the phrases are
    adapter/            of --learn
    merge-1 to merge-3  joint merges of adapter and candidates
    front.json, .png    the models side by side
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from modules.checkpoints.downloads import fetch_now
from modules.checkpoints.open_models import Models, candidate_sources, open_models
from modules.config.inputs import LISTS, check_apart
from modules.config.load import to_learn
from modules.config.locations import names_folder, partial_of
from modules.config.schema import VERSION, Config
from modules.metrics.kl import NATS
from modules.model.loading import ModelLoader, release_memory
from modules.output.folder import check_output, holds_output, locked_output, written_paths
from modules.output.front import Point, best_candidate, chosen, front_table, write_front
from modules.output.recipe import Recipe, read_recipe
from modules.output.tables import sample_lines
from modules.output.text_files import write_text
from modules.run.learn import estimate_learning, learn_adapter
from modules.run.merge import Options, merge_models
from modules.run.plan import MARGIN_FLAT, estimate_seconds, make_plan, output_bytes, texts_to_write
from modules.run.replay import Replay, replay_recipe
from modules.run.score import score_models
from modules.run.steps import ask, prepare_libraries
from modules.run.tasks import check_tasks
from modules.runtime.console import Console
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.text import duration, in_memory, on_disk, pluralize
from modules.search.joint import start_of
from modules.slop.discover import NOTHING, find_cliches
from modules.slop.generate import FOLDER
from modules.slop.rate import count_written

FEWER = 4  # times the texts that models write to be counted than those in which phrases are found
FACTORS = {"merge-1": 0.25, "merge-2": 1.0, "merge-3": 4.0}  # of drift_weight
SETTINGS = "settings.json"
LIST = "found.yaml"
BASE = "base.json"
ADAPTER = "adapter"
FRONT = "front"
STAND_IN = LISTS / "fiction-cliches.yaml"  # phrases for an estimate before any are found


@dataclass(frozen=True)
class Asked:
    """What the command line asks for beside the configuration."""

    settings_file: Path | None
    output: Path
    load: Callable[[Sequence[str]], Config]  # the configuration with these phrase files in place of its own
    overwrite: bool = False
    restart: bool = False
    dry_run: bool = False

    @property
    def work(self) -> Path:
        """The folder that keeps what the commands leave."""
        return self.output.with_name(f"{self.output.name}.unslop")

    def part(self, folder: Path) -> Options:
        """How a command is asked to write a folder of it."""
        has_begun = folder.exists() or partial_of(folder).exists()
        return Options(self.settings_file, overwrite=True, resume=has_begun, table="summary", is_part=True)


def unslop(config: Config, console: Console, asked: Asked) -> int:
    """Find cliches, learn an adapter against them, merge it with the candidates, count, and save one of the merges.

    config: with a base, perhaps candidates and phrases. Returns an exit code: NOTHING where no phrase was found. Raises
    ConfigError for what can't be used, found before any work; CheckpointError or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    check_apart([asked.work, *written_paths(asked.output)], Options(asked.settings_file).inputs(config))
    with locked_output(asked.output, console, asked.dry_run) as target:
        check_output(target, asked.overwrite)
    check_tasks(config)
    config = _with_candidates(config, console)
    models = ModelLoader(config, console).open()
    if asked.dry_run:
        _tell_plan(config, models, console, asked)
        return 0
    _begin(config, models, asked)
    if not config.bad_phrases:
        if not _found(config, console, asked):
            return NOTHING
        config = _with_phrases(config, asked, asked.work / LIST)
    weights = _weights(config, console, asked)
    if config.learn.steps:
        # With the least weight: a merge can take less of an adapter than all, and not more.
        adapter = _learned(replace(config, drift_weight=min(weights.values())), console, asked)
        config = replace(config, models_to_merge=(adapter, *config.models_to_merge))
    recipes = _merged(config, weights, console, asked)
    name = _choice(_counted(config, recipes, console, asked), console)
    _save(config, recipes[name], console, asked, name)
    return 0


# -- before the first command ------------------------------------------------------------------------------------------


def _with_candidates(config: Config, console: Console) -> Config:
    """The configuration with all candidates by name that fit the base; of each other one a line says why it does not.
    Raises ConfigError if the base can't be used, or there is nothing to merge."""
    directories = replace(config.directories, model_directory=None)
    fetch = partial(fetch_now, console)
    alone = replace(config, directories=directories, models_to_merge=())
    open_models(alone, fetch)
    fitting = []
    for text in dict.fromkeys(source.text for source in candidate_sources(config)[0]):
        try:
            open_models(replace(alone, models_to_merge=(text,)), fetch)
            fitting.append(text)
        except ConfigError as error:
            console.warning(f"goes on without {text}: {first_line(error)}")
    if not fitting and not config.learn.steps:
        raise ConfigError("nothing to merge: learn.steps is 0, and no candidate is named that fits the base")
    return replace(alone, models_to_merge=tuple(fitting))


def _disk(config: Config, models: Models, asked: Asked) -> tuple[int, int]:
    """Bytes that are still to be written, and those that are free."""
    missing = [name for name in FACTORS if not holds_output(asked.work / name)]
    needed = (len(missing) + 1) * (output_bytes(config, models.base) + MARGIN_FLAT)
    return needed, shutil.disk_usage(next(path for path in asked.output.absolute().parents if path.exists())).free


def _begin(config: Config, models: Models, asked: Asked) -> None:
    """Make the folder that keeps what commands leave, or go on with it. Raises ConfigError if it is another run's, or
    the disk is too small."""
    needed, free = _disk(config, models, asked)
    if needed > free:
        what = f"{len(FACTORS)} merges and the output need {on_disk(needed)}, {on_disk(free)} are free"
        raise ConfigError(f"{asked.output}: {what}; make room, or name a folder on a larger disk with --output")
    file = asked.work / SETTINGS
    settings = {"program": VERSION, **config.dumped()}
    if asked.restart and file.is_file():
        shutil.rmtree(asked.work)
    if not file.is_file():
        if asked.work.exists() and any(asked.work.glob("[!.]*")):
            raise ConfigError(f"{asked.work} was not written by --unslop and is in its way; move it")
        asked.work.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{file}: can't be read; begin again with --restart") from None
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise ConfigError(f"{', '.join(changed)} changed since {asked.work} was begun; begin again with --restart")


# -- one command after another -----------------------------------------------------------------------------------------


def _found(config: Config, console: Console, asked: Asked) -> bool:
    """Whether there is a list of what the base over-uses, be it of an earlier run."""
    if (asked.work / LIST).is_file():
        return True
    console.timed("1 of 6: what does the base say too often?")
    found = find_cliches(config, console, None, asked.work / LIST)
    release_memory()
    return found


def _with_phrases(config: Config, asked: Asked, file: Path) -> Config:
    """The configuration with the phrases of one more file."""
    read = asked.load([*config.phrase_files, str(file)])
    return replace(read, directories=config.directories, models_to_merge=config.models_to_merge)


def _weights(config: Config, console: Console, asked: Asked) -> dict[str, float]:
    """The drift_weight of each merge: less than what is configured, as much, and more."""
    weight = config.weight_of_drift
    file = asked.work / BASE
    if weight == "auto":
        if not file.is_file():
            console.timed("2 of 6: how probable is it?")
            alone = replace(config, models_to_merge=(), held_out_pairs=(), neutral_texts=(), own_texts=())
            score_models(alone, console, file, overwrite=True, is_part=True)
            release_memory()
        scores = json.loads(file.read_text(encoding="utf-8"))
        name = scores["models"][0]["name"]
        weight = math.fsum(one["weight"] * one["probabilities"][name] for one in scores["phrases"]) / NATS
    return {name: float(f"{factor * weight:.4g}") for name, factor in FACTORS.items()}


def _learned(config: Config, console: Console, asked: Asked) -> str:
    """The folder of the adapter that is learned from the phrases."""
    folder = asked.work / ADAPTER
    if not holds_output(folder):
        console.timed(f"3 of 6: learning an adapter against it, with drift_weight {config.drift_weight:g}")
        kept = sorted((asked.work / FOLDER).glob("*.jsonl"))
        if len(kept) == 1:  # the base's, in which the phrases were found: they teach too
            config = replace(config, learn=replace(config.learn, texts=str(kept[0])))
        learn_adapter(to_learn(config, folder), console, asked.part(folder))
        release_memory()
    return str(folder)


def _merged(config: Config, weights: Mapping[str, float], console: Console, asked: Asked) -> dict[str, Recipe]:
    """The merges' recipes by name; each begins where the last one ended. weights: on drift."""
    recipes: dict[str, Recipe] = {}
    joint = config.joint
    for name, weight in weights.items():
        console.timed(f"4 of 6: merging {name} of {len(weights)}, with drift_weight {weight:g}")
        folder = asked.work / name
        directories = replace(config.directories, output_directory=str(folder))
        own = replace(config, directories=directories, drift_weight=weight, joint=joint)
        merge_models(own, console, asked.part(folder))
        release_memory()
        recipes[name] = read_recipe(folder)
        joint = replace(joint, start=start_of(recipes[name].joint.weights, config.merge_headers))
    return recipes


def _counted(config: Config, recipes: Mapping[str, Recipe], console: Console, asked: Asked) -> list[Point]:
    """What base, best candidate, adapter and merges write to fresh prompts, shown and kept: the base first."""
    console.timed("5 of 6: all of them write, by another seed")
    file = asked.work / FRONT
    recipe = next(iter(recipes.values()))
    discover = replace(config.discover, samples=max(1, config.discover.samples // FEWER))
    alone = replace(config, models_to_merge=(), random_seed=config.random_seed + 1, discover=discover)
    base = count_written(alone, console, file)
    write = partial(count_written, console=console, beside=file, prompts=base.prompts)
    counted = [(recipe.sources[0].name, base, recipe.metrics["base"])]
    numbers = range(1, len(recipe.sources))
    adapter = numbers[:1] if config.learn.steps else ()
    best = best_candidate(recipe, numbers[len(adapter) :], recipe.settings.weight_of_drift)
    for number in (*best, *adapter):
        rated = write(alone, candidate=config.models_to_merge[number - 1])
        counted.append((recipe.sources[number].name, rated, recipe.baselines.get(str(number), {})))
    for name, merge in recipes.items():
        directories = replace(config.directories, model_path1=str(asked.work / name))
        counted.append((name, write(replace(alone, directories=directories)), merge.metrics["merge"]))
    phrases = list(dict.fromkeys(pair.phrase for pair in config.bad_phrases))
    points = []
    for name, rated, metrics in counted:
        rate = rated.counts.rate(phrases)
        interval = rated.counts.interval(phrases)
        points.append(Point(name, rate, interval, rated.words, metrics, is_merge=name in recipes))
    console.lines(front_table(points))
    write_front(points, file)
    console.timed(f"Table and picture are in {file}.json and {file}.png")
    return points


def _choice(points: Sequence[Point], console: Console) -> str:
    """Which merge is saved: the program's choice, unless the person at the terminal names another."""
    best, why = chosen(points)
    console.line(why)
    names = [point.name for point in points if point.is_merge]
    while True:
        answer = console.ask(f"Which one is to be saved? {', '.join(names)}; Enter takes {best.name}:")
        if answer in ("", *names):
            return answer or best.name
        console.line(f"'{answer}' is none of them")


def _save(config: Config, recipe: Recipe, console: Console, asked: Asked, name: str) -> None:
    """Build a merge again as the output, and show what it answers."""
    console.timed(f"6 of 6: saving {name}")
    console.lines(sample_lines(recipe.samples))
    console.line(f"List, texts, adapter and all merges are in {asked.work}; delete it when you need none of them.")
    texts = [config.directories.model_path1, *config.models_to_merge]
    elsewhere = {one.name: texts[one.number] for one in recipe.sources if names_folder(one.where)}
    choices = {"overwrite": asked.overwrite, "trust_remote_code": config.trust_remote_code}
    replay_recipe(Replay(asked.work / name, asked.output, recipe.device, elsewhere, **choices), console)


# -- --dry-run ---------------------------------------------------------------------------------------------------------


def _tell_plan(config: Config, models: Models, console: Console, asked: Asked) -> None:
    """What all of it takes."""
    is_listed = bool(config.bad_phrases)
    config = config if is_listed else _with_phrases(config, asked, STAND_IN)
    loader, _ = ask(ModelLoader(config, console), models)
    console.timed("Measuring the speed of this machine")
    plan = make_plan(replace(loader.config, device=loader.device), models)
    learning = estimate_learning(replace(loader, compute=plan.arithmetic), models)
    writers = (1 + bool(models.candidates) + bool(config.learn.steps) + len(FACTORS)) / FEWER + (not is_listed)
    texts, writing = texts_to_write(plan, models.module, writers)
    seconds = {
        "to write texts": writing,
        "to learn": learning.seconds and learning.seconds * config.learn.steps,
        "to merge": (estimate_seconds(plan, models.module) or math.nan) * len(FACTORS),
    }
    parts = [f"{duration(value)} {what}" for what, value in seconds.items() if value and math.isfinite(value)]
    needed, free = _disk(config, models, asked)
    rows = {
        "Phrases": pluralize(len(config.pairs), "pair")
        + ("" if is_listed else f" of {STAND_IN.name}; yours are not known yet"),
        "Texts": f"{texts:,} of up to {config.discover.tokens} tokens",
        "Memory needed": f"{in_memory(max(plan.memory.reserved, learning.plan.needed))} on {plan.device}",
        "Bytes to write": f"{on_disk(needed)} to {asked.work} and {asked.output}, {on_disk(free)} free",
        "Time (estimate)": f"about {', '.join(parts)}" if parts else "not known for this model",
    }
    console.lines([f"{name:<16} : {value}" for name, value in rows.items()])
    console.final(f"Dry run: wrote only {', '.join([f'the log {console.log_path}', *models.written])}")
