"""--unslop: from a base to a merge that writes fewer cliches, by the other commands, one after another.

Knows: the order of the commands, the files that each leaves for the next. Refuses to know: how any of them does its
work.

Their files are in OUT.unslop; the same command resumes with what is missing there. The output is one of the merges,
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
from modules.runtime.text import duration, in_memory, on_disk
from modules.search.joint import start_of
from modules.slop.discover import NOTHING, find_cliches
from modules.slop.generate import FOLDER
from modules.slop.rate import count_written

FEWER = 4  # models write this many times fewer texts for counting than for finding phrases
FACTORS = {"merge-1": 0.25, "merge-2": 1.0, "merge-3": 4.0}  # of drift_weight
SETTINGS = "settings.json"
LIST = "found.yaml"
BASE = "base.json"
ADAPTER = "adapter"
FRONT = "front"
STAND_IN = LISTS / "fiction-cliches.yaml"  # phrases for an estimate before any are found


@dataclass(frozen=True)
class Request:
    """What the command line requests beside the configuration."""

    settings_file: Path | None
    output: Path
    load: Callable[[Sequence[str]], Config]  # the configuration with these phrase files in place of its own
    overwrite: bool = False
    restart: bool = False
    dry_run: bool = False

    @property
    def work(self) -> Path:
        """The folder that keeps the files of the commands."""
        return self.output.with_name(f"{self.output.name}.unslop")

    def part(self, folder: Path) -> Options:
        """The options of a command that writes a folder in `work`."""
        has_begun = folder.exists() or partial_of(folder).exists()
        return Options(self.settings_file, overwrite=True, resume=has_begun, table="summary", is_part=True)


def unslop(config: Config, console: Console, request: Request) -> int:
    """Find cliches, learn an adapter against them, merge it with the candidates, count, and save one of the merges.

    config: with a base, perhaps candidates and phrases. Returns an exit code: NOTHING where no phrase was found. Raises
    ConfigError for what can't be used, found before any work; CheckpointError or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    check_apart([request.work, *written_paths(request.output)], Options(request.settings_file).inputs(config))
    with locked_output(request.output, console, request.dry_run) as target:
        check_output(target, request.overwrite)
    check_tasks(config)
    config = _with_candidates(config, console)
    models = ModelLoader(config, console).open()
    if request.dry_run:
        _print_plan(config, models, console, request)
        return 0
    _begin(config, models, request)
    if not config.bad_phrases:
        if not _find_phrases(config, console, request):
            return NOTHING
        config = _with_phrases(config, request, request.work / LIST)
    weights = _weights(config, console, request)
    if config.learn.steps:
        # With the least weight: a merge can take less of an adapter than all, and not more.
        adapter = _learn(replace(config, drift_weight=min(weights.values())), console, request)
        config = replace(config, models_to_merge=(adapter, *config.models_to_merge))
    recipes = _merge(config, weights, console, request)
    name = _choice(_count(config, recipes, console, request), console)
    _save(config, recipes[name], console, request, name)
    return 0


# -- before the first command ------------------------------------------------------------------------------------------


def _with_candidates(config: Config, console: Console) -> Config:
    """The configuration with all candidates that fit the base, by name; a warning says why another one does not fit.
    Raises ConfigError if the base can't be used, or there is nothing to merge."""
    directories = replace(config.directories, model_directory=None)
    fetch = partial(fetch_now, console)
    base_config = replace(config, directories=directories, models_to_merge=())
    open_models(base_config, fetch)
    fitting = []
    for text in dict.fromkeys(source.text for source in candidate_sources(config)[0]):
        try:
            open_models(replace(base_config, models_to_merge=(text,)), fetch)
            fitting.append(text)
        except ConfigError as error:
            console.warning(f"skipping {text}: {first_line(error)}")
    if not fitting and not config.learn.steps:
        raise ConfigError("nothing to merge: learn.steps is 0 and no candidate fits the base; name another candidate")
    return replace(base_config, models_to_merge=tuple(fitting))


def _disk(config: Config, models: Models, request: Request) -> tuple[int, int]:
    """The bytes that are still to be written, and the free bytes."""
    missing = [name for name in FACTORS if not holds_output(request.work / name)]
    needed = (len(missing) + 1) * (output_bytes(config, models.base) + MARGIN_FLAT)
    return needed, shutil.disk_usage(next(path for path in request.output.absolute().parents if path.exists())).free


def _begin(config: Config, models: Models, request: Request) -> None:
    """Make the folder that keeps the files of the commands, or resume in it. Raises ConfigError if it belongs to
    another run, or the disk is too small."""
    needed, free = _disk(config, models, request)
    if needed > free:
        shortage = f"{len(FACTORS)} merges and the output need {on_disk(needed)} of disk space, {on_disk(free)} free"
        raise ConfigError(f"{request.output}: {shortage}; free some space, or choose a larger disk with --output")
    file = request.work / SETTINGS
    settings = {"program": VERSION, **config.dumped()}
    if request.restart and file.is_file():
        shutil.rmtree(request.work)
    if not file.is_file():
        if request.work.exists() and any(request.work.glob("[!.]*")):
            raise ConfigError(f"{request.work} was not written by --unslop, but is in the way; move it away")
        request.work.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
    try:
        begun_settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{file}: can't be read; start over with --restart") from None
    changed = [key for key, value in settings.items() if begun_settings.get(key) != value]
    if changed:
        raise ConfigError(f"{', '.join(changed)} changed since {request.work} was started; start over with --restart")


# -- one command after another -----------------------------------------------------------------------------------------


def _find_phrases(config: Config, console: Console, request: Request) -> bool:
    """Find the phrases that the base over-uses, unless an earlier run did. Returns whether there is a list."""
    if (request.work / LIST).is_file():
        return True
    console.timed("Step 1/6: finding phrases that the base overuses")
    has_phrases = find_cliches(config, console, None, request.work / LIST)
    release_memory()
    return has_phrases


def _with_phrases(config: Config, request: Request, file: Path) -> Config:
    """The configuration with the phrases of a further file."""
    loaded = request.load([*config.phrase_files, str(file)])
    return replace(loaded, directories=config.directories, models_to_merge=config.models_to_merge)


def _weights(config: Config, console: Console, request: Request) -> dict[str, float]:
    """The drift_weight of each merge: less than the configured one, the same, and more."""
    weight = config.weight_of_drift
    file = request.work / BASE
    if weight == "auto":
        if not file.is_file():
            console.timed("Step 2/6: scoring the phrases in the base")
            base_config = replace(config, models_to_merge=(), held_out_pairs=(), neutral_texts=(), own_texts=())
            score_models(base_config, console, file, overwrite=True, is_part=True)
            release_memory()
        scores = json.loads(file.read_text(encoding="utf-8"))
        name = scores["models"][0]["name"]
        weight = math.fsum(phrase["weight"] * phrase["probabilities"][name] for phrase in scores["phrases"]) / NATS
    return {name: float(f"{factor * weight:.4g}") for name, factor in FACTORS.items()}


def _learn(config: Config, console: Console, request: Request) -> str:
    """Learn an adapter from the phrases, unless it exists. Returns its folder."""
    folder = request.work / ADAPTER
    if not holds_output(folder):
        console.timed(f"Step 3/6: learning an adapter against the phrases, drift_weight {config.drift_weight:g}")
        text_files = sorted((request.work / FOLDER).glob("*.jsonl"))
        if len(text_files) == 1:  # the base's texts, in which the phrases were found, teach too
            config = replace(config, learn=replace(config.learn, texts=str(text_files[0])))
        learn_adapter(to_learn(config, folder), console, request.part(folder))
        release_memory()
    return str(folder)


def _merge(config: Config, weights: Mapping[str, float], console: Console, request: Request) -> dict[str, Recipe]:
    """Make the merges; each starts from the weights of the previous one. Returns their recipes by name. weights: of
    drift."""
    recipes: dict[str, Recipe] = {}
    joint = config.joint
    for name, weight in weights.items():
        console.timed(f"Step 4/6: merging {name} (of {len(weights)}), drift_weight {weight:g}")
        folder = request.work / name
        directories = replace(config.directories, output_directory=str(folder))
        merge_config = replace(config, directories=directories, drift_weight=weight, joint=joint)
        merge_models(merge_config, console, request.part(folder))
        release_memory()
        recipes[name] = read_recipe(folder)
        joint = replace(joint, start=start_of(recipes[name].joint.weights, config.merge_headers))
    return recipes


def _count(config: Config, recipes: Mapping[str, Recipe], console: Console, request: Request) -> list[Point]:
    """Count cliches in what base, best candidate, adapter and merges write to fresh prompts; show and keep the points,
    the base's first."""
    console.timed("Step 5/6: generating fresh texts with base, candidates and merges")
    file = request.work / FRONT
    recipe = next(iter(recipes.values()))
    discover = replace(config.discover, samples=max(1, config.discover.samples // FEWER))
    base_config = replace(config, models_to_merge=(), random_seed=config.random_seed + 1, discover=discover)
    base = count_written(base_config, console, file)
    write = partial(count_written, console=console, beside=file, prompts=base.prompts)
    entries = [(recipe.sources[0].name, base, recipe.metrics["base"])]
    numbers = range(1, len(recipe.sources))
    adapter = numbers[:1] if config.learn.steps else ()
    best = best_candidate(recipe, numbers[len(adapter) :], recipe.settings.weight_of_drift)
    for number in (*best, *adapter):
        rated = write(base_config, candidate=config.models_to_merge[number - 1])
        entries.append((recipe.sources[number].name, rated, recipe.baselines.get(str(number), {})))
    for name, merge in recipes.items():
        directories = replace(config.directories, model_path1=str(request.work / name))
        entries.append((name, write(replace(base_config, directories=directories)), merge.metrics["merge"]))
    phrases = list(dict.fromkeys(pair.phrase for pair in config.bad_phrases))
    points = []
    for name, rated, metrics in entries:
        rate = rated.counts.rate(phrases)
        interval = rated.counts.interval(phrases)
        points.append(Point(name, rate, interval, rated.words, metrics, is_merge=name in recipes))
    console.lines(front_table(points))
    write_front(points, file)
    console.timed(f"Table and picture are in {file}.json and {file}.png")
    return points


def _choice(points: Sequence[Point], console: Console) -> str:
    """The name of the merge to save: the program's choice, unless the user names another."""
    best, reason = chosen(points)
    console.line(reason)
    names = [point.name for point in points if point.is_merge]
    while True:
        answer = console.ask(f"Which merge do you want to save: {', '.join(names)}? [{best.name}]")
        if answer in ("", *names):
            return answer or best.name
        console.line(f"'{answer}' is not one of {', '.join(names)}")


def _save(config: Config, recipe: Recipe, console: Console, request: Request, name: str) -> None:
    """Build a merge again as the output, and show its answers."""
    console.timed(f"Step 6/6: saving {name}")
    console.lines(sample_lines(recipe.samples))
    console.line(f"All steps are kept in {request.work}; delete it when you no longer need it.")
    texts = [config.directories.model_path1, *config.models_to_merge]
    elsewhere = {source.name: texts[source.number] for source in recipe.sources if names_folder(source.where)}
    choices = {"overwrite": request.overwrite, "trust_remote_code": config.trust_remote_code}
    replay_recipe(Replay(request.work / name, request.output, recipe.device, elsewhere, **choices), console)


# -- --dry-run ---------------------------------------------------------------------------------------------------------


def _print_plan(config: Config, models: Models, console: Console, request: Request) -> None:
    """Print what the whole run needs."""
    is_listed = bool(config.bad_phrases)
    config = config if is_listed else _with_phrases(config, request, STAND_IN)
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
    parts = [f"{duration(value)} {purpose}" for purpose, value in seconds.items() if value and math.isfinite(value)]
    needed, free = _disk(config, models, request)
    rows = {
        "Pairs": f"{len(config.pairs):,}"
        + ("" if is_listed else f" (estimate from {STAND_IN.name}; yours are not found yet)"),
        "Texts": f"{texts:,} of up to {config.discover.tokens} tokens",
        "Memory needed": f"{in_memory(max(plan.memory.reserved, learning.plan.needed))} on {plan.device}",
        "Disk needed": f"{on_disk(needed)} for {request.work} and {request.output}, {on_disk(free)} free",
        "Time (estimate)": f"about {', '.join(parts)}" if parts else "unknown for this model",
    }
    console.lines([f"{name:<16} : {value}" for name, value in rows.items()])
    console.final(f"Dry run: wrote only {', '.join([f'the log {console.log_path}', *models.written])}")
