"""Merge fine-tunes into a base model, layer by layer, keeping what makes unwanted phrases less probable.

    python merge_monster.py --config my.yaml
    torchrun --nproc-per-node 4 merge_monster.py --config my.yaml
    python merge_monster.py --compare one-output another-output
    python merge_monster.py --config my.yaml --score one-model another-model
    python merge_monster.py --config my.yaml --learn my-adapter
    python merge_monster.py --unslop my-base my-fine-tune --output my-merge

Exit codes: 0 done, 1 the run failed, 2 configuration, arguments or models can't be used, 130 interrupted, 141 nobody
reads the output any more.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from modules.config.choices import DEVICES
    from modules.config.inputs import check_apart, input_paths
    from modules.config.load import load_config, output_directory, to_learn
    from modules.config.schema import CONFIG, QUIET, SET, TABLES, VERSION, Config
    from modules.runtime.arguments import Arguments
    from modules.runtime.console import LOGS, Console, Unlogged, WorkerConsole, hint, open_streams, say, visible
    from modules.runtime.distributed import Rank, find_rank, joined, wait_for_main_process
    from modules.runtime.errors import ConfigError
    from modules.runtime.program import LOADING, exit_code, importing, leave
    from modules.runtime.text import pluralize
except KeyboardInterrupt:  # imports take a moment
    sys.exit(130)
except ModuleNotFoundError as error:
    sys.exit(f"ERROR: the package {error.name} is not installed: pip install -r requirements.txt")

LOG = "merge-monster"
# What --unslop sets without a file: of its three merges each begins where the last one ended, so few steps will do.
UNSLOP = ("joint.steps=4", "joint.step_size=0.15")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    open_streams()
    return exit_code(lambda: start(parse_arguments(arguments)), Unlogged(LOG))


def start(options: argparse.Namespace) -> int:
    """Read the configuration, open the log and run."""
    rank = find_rank()
    if options.compare:
        return compare(options.compare) if rank.is_main_process else 0
    if options.from_mergekit:
        return from_mergekit(options) if rank.is_main_process else 0
    try:
        from_recipe = options.replay or options.export_mergekit
        given = {"device": options.device, "output": options.output, "sets": options.set or ()}
        alone = "--score" if options.score else "--unslop" if options.unslop else "--learn"
        if (options.score or options.learn or options.unslop) and rank.world_size > 1:
            raise ConfigError(f"{alone} runs in one process; start it with python, not with torchrun")
        given |= {"scored": options.score, "learning": bool(options.learn)}
        config = None if from_recipe else load_config(options.config, **(unslopping(options) or given))
        if config is not None and options.learn:
            config = to_learn(config, output_directory("--learn", options.learn))
        if config is not None:
            files = [Path(options.config)] if options.config else []
            check_apart([LOGS, *([options.json] if options.json else [])], [*files, *input_paths(config)])
    except ConfigError:
        if rank.is_main_process:
            raise
        wait_for_main_process()
        return 2
    with Console(LOG, quiet=options.quiet) if rank.is_main_process else WorkerConsole(rank.number) as console:
        if options.score:
            return score(config, console, options)
        if options.unslop:
            return run_unslop(config, console, options)
        if config is not None:
            return run(config, console, options, rank)
        if not rank.is_main_process:
            return 0
        return replay(console, options) if options.replay else export(console, options)


def run(config: Config, console: Console, options: argparse.Namespace, rank: Rank) -> int:
    """Merge or learn, and turn every failure into one message and an exit code."""
    console.banner("Learning an adapter" if options.learn else "THE MERGE MONSTER HUNGERS")
    console.timed(LOADING)
    # Only now: torch and transformers take seconds to import, and a typo should not have to wait for them.
    with importing():
        from modules.output.folder import stamp, what_stands

    output = Path(config.directories.output_directory)

    def work() -> None:
        with importing():
            from modules.run.merge import Options, merge_as_worker, merge_models

        choices = options.overwrite, options.resume, options.restart, options.dry_run, options.table
        asked = Options(Path(options.config), *choices)
        if options.learn:
            with importing():
                from modules.run.learn import learn_adapter

            learn_adapter(config, console, asked)
            return
        with joined(rank) as group:
            merge = merge_models if rank.is_main_process else merge_as_worker
            merge(config, console, asked, group)

    earlier = stamp(output)
    return exit_code(work, console, lambda: what_stands(output, earlier))


def unslopping(options: argparse.Namespace) -> dict[str, Any]:
    """How --unslop reads its configuration, whose file may be none; nothing for other ways to run."""
    if not options.unslop:
        return {}
    base, *candidates = options.unslop
    models = {"model": base, "model_option": "--unslop", "scored": candidates}
    sets = [*(() if options.config else UNSLOP), *(options.set or ()), "search=joint"]
    return {"device": options.device, "sets": sets, "discovering": True, **models}


def run_unslop(config: Config, console: Console, options: argparse.Namespace) -> int:
    """Go from a base to a merge, and turn every failure into one message and an exit code."""
    console.banner("THE MERGE MONSTER HAS A TASTE FOR SLOP")
    console.timed(LOADING)
    output = output_directory("--output", options.output)

    def load(phrase_files: Sequence[str]) -> Config:
        given = unslopping(options)
        sets = [*given["sets"], f"phrase_files={json.dumps(phrase_files)}"]
        return load_config(options.config, **given | {"sets": sets})

    def work() -> int:
        with importing():
            from modules.run.unslop import Request, unslop

        file = Path(options.config) if options.config else None
        return unslop(config, console, Request(file, output, load, options.overwrite, options.restart, options.dry_run))

    def left() -> str:
        kept = f"{output}.unslop"
        return f"The progress is saved in {kept}; run the same command to continue." if os.path.isdir(kept) else ""

    return exit_code(work, console, left)


def replay(console: Console, options: argparse.Namespace) -> int:
    """Build a recipe's model again, and turn every failure into one message and an exit code."""
    console.banner(f"Rebuilding the model of {options.replay}")
    console.timed(LOADING)
    with importing():
        from modules.output.folder import stamp, what_stands

    output = output_directory("--output", options.output)
    earlier = stamp(output)

    def work() -> None:
        with importing():
            from modules.run.replay import Replay, replay_recipe

        asked = Replay(options.replay, output, options.device, *how_to_open(options))
        replay_recipe(asked, console)

    return exit_code(work, console, lambda: what_stands(output, earlier, searching=False))


def export(console: Console, options: argparse.Namespace) -> int:
    """Write a recipe as a file for mergekit, and turn every failure into one message and an exit code."""
    file, recipe = options.export_mergekit
    console.timed(f"Exporting {recipe} for mergekit")
    console.timed(LOADING)

    def work() -> None:
        with importing():
            from modules.run.export import export_mergekit
            from modules.run.replay import Replay

        export_mergekit(Replay(recipe, file, "cpu", *how_to_open(options)), console)

    return exit_code(work, console)


def score(config: Config, console: Console, options: argparse.Namespace) -> int:
    """Score models by the configuration's phrases, and turn every failure into one message and an exit code."""
    console.timed(f"Scoring {pluralize(len(options.score), 'model')}")
    console.timed(LOADING)

    def work() -> None:
        with importing():
            from modules.run.score import score_models

        score_models(config, console, options.json, options.overwrite)

    return exit_code(work, console)


def how_to_open(options: argparse.Namespace) -> tuple[dict[str, str], list[Path], bool, bool]:
    """Of a recipe's sources: where each lies now, and folders that hold them; whether to overwrite, and to trust."""
    sources = options.source or []
    elsewhere, folders = dict(pair for pair in sources if pair[0]), [Path(path) for name, path in sources if not name]
    return elsewhere, folders, options.overwrite, options.trust_remote_code


def compare(outputs: Sequence[Path]) -> int:
    """Print what finished outputs have become, side by side. Raises ConfigError if some are not finished outputs."""
    hint(f"Reading {pluralize(len(outputs), 'output')}")
    with importing():
        from modules.output.recipe import read_outputs
        from modules.output.tables import comparison

    for line in comparison(read_outputs(outputs)):
        say(visible(line))
    return 0


def from_mergekit(options: argparse.Namespace) -> int:
    """Write a mergekit configuration as one of ours. Raises as `convert`."""
    hint(LOADING)
    with importing():
        from modules.run.from_mergekit import convert

    convert(options.from_mergekit, Path(options.output) if options.output else None, options.overwrite)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 on a wrong one."""
    description = "Merge fine-tunes into a base model to make unwanted phrases less likely."
    parser = Arguments(description)
    settings = parser.add_argument_group("settings (see default.yaml)")
    settings.add_argument("--config", metavar="FILE", help=CONFIG.format("default.yaml"))
    settings.add_argument("--device", metavar="NAME", help=DEVICES)
    settings.add_argument("--output", metavar="DIR", help="result folder, or file for --from-mergekit")
    settings.add_argument("--set", metavar="KEY=VALUE", action="append", help=SET)
    run = parser.add_argument_group("merging")
    unslop = {"metavar": ("BASE", "CANDIDATE"), "nargs": "+"}
    run.add_argument("--unslop", **unslop, help="find a base's cliches, merge against them")
    run.add_argument("--dry-run", action="store_true", help="check and estimate only, merge nothing")
    run.add_argument("--overwrite", action="store_true", help="replace an existing output")
    unfinished = run.add_mutually_exclusive_group()
    unfinished.add_argument("--resume", action="store_true", help="continue an unfinished run")
    unfinished.add_argument("--restart", action="store_true", help="discard an unfinished run and start over")
    others = parser.add_argument_group("other modes")
    others.add_argument("--score", metavar="MODEL", nargs="+", help="score models on the config's phrases")
    others.add_argument("--learn", metavar="OUT", help="learn an adapter from the phrases alone")
    others.add_argument("--json", metavar="FILE", type=Path, help="file for the results of --score")
    finished = "compare finished outputs"
    others.add_argument("--compare", metavar="OUTPUT", type=Path, nargs="+", help=finished)
    others.add_argument("--replay", metavar="RECIPE", type=Path, help="rebuild a recipe's model into --output")
    export = {"metavar": ("FILE", "OUTPUT"), "type": Path, "nargs": 2}
    others.add_argument("--export-mergekit", **export, help="convert an output's recipe for mergekit")
    start = "convert a mergekit YAML to a config"
    others.add_argument("--from-mergekit", metavar="FILE", type=Path, help=start)
    source = {"metavar": "DIR|NAME=PATH", "type": _place_of_source, "action": "append"}
    others.add_argument("--source", **source, help="where a recipe's models are now")
    others.add_argument("--trust-remote-code", action="store_true", help="run Python code of a recipe's models")
    shown = parser.add_argument_group("console")
    shown.add_argument(
        "--table", metavar="KIND", choices=TABLES, default="full", help=f"phrase tables: {', '.join(TABLES)}"
    )
    shown.add_argument("--quiet", action="store_true", help=QUIET)
    shown.add_argument("--version", action="version", version=f"Merge Monster {VERSION}", help="print the version")
    options = parser.parse_args(arguments)
    check_together(parser, options)
    options.config = options.config or (None if options.unslop else "default.yaml")
    return options


def check_together(parser: Arguments, options: argparse.Namespace) -> None:
    """Exit with code 2 for options that don't go together."""
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    if options.compare and given != ["compare"]:
        parser.error("--compare can't be combined with other options")
    from_recipe = options.replay or options.export_mergekit
    beside_an_export = {"export_mergekit", "source", "trust_remote_code", "overwrite", "quiet"}
    if options.export_mergekit and not beside_an_export.issuperset(given):
        parser.error(
            "--export-mergekit can only be combined with --source, --trust-remote-code, --overwrite and --quiet"
        )
    if options.from_mergekit and not {"from_mergekit", "output", "overwrite"}.issuperset(given):
        parser.error("--from-mergekit can only be combined with --output and --overwrite")
    beside_scores = {"score", "config", "device", "set", "json", "overwrite", "quiet"}
    if options.score and not beside_scores.issuperset(given):
        parser.error("--score can only be combined with --config, --device, --set, --json, --overwrite and --quiet")
    beside_learning = {"learn", "config", "device", "set", "table", "quiet"}
    beside_learning |= {"dry_run", "overwrite", "resume", "restart"}
    if options.learn and not beside_learning.issuperset(given):
        parser.error(
            "--learn can only be combined with --config, --device, --set, --table, --quiet, --dry-run, --overwrite, "
            "--resume and --restart"
        )
    beside_unslop = {"unslop", "output", "config", "device", "set", "dry_run", "overwrite", "restart", "quiet"}
    if options.unslop and not beside_unslop.issuperset(given):
        parser.error(
            "--unslop can only be combined with --output, --config, --device, --set, --dry-run, --overwrite, --restart "
            "and --quiet"
        )
    if options.unslop and not options.output:
        parser.error("--unslop needs --output")
    if options.json and not options.score:
        parser.error("--json needs --score")
    if options.score and options.overwrite and not options.json:
        parser.error("--score --overwrite needs --json")
    if options.replay and not options.output:
        parser.error("--replay needs --output")
    if options.replay and options.set:
        parser.error("--replay can't be combined with --set: a recipe has its own settings")
    if options.source and not from_recipe:
        parser.error("--source needs --replay or --export-mergekit")
    if options.trust_remote_code and not from_recipe:
        parser.error(
            "--trust-remote-code needs --replay or --export-mergekit; for a merge, set trust_remote_code in the config"
        )
    if options.replay and (options.resume or options.restart or options.dry_run):
        parser.error("--replay can't be combined with --resume, --restart or --dry-run")


def _place_of_source(text: str) -> tuple[str, str]:
    """A source's name, empty for all of them, and the path."""
    name, equals, path = text.partition("=")
    if not equals and os.path.isdir(text):
        return "", text
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"'{text}': expected NAME=PATH, or a folder that contains the models")
    return name, path


if __name__ == "__main__":
    leave(main())
