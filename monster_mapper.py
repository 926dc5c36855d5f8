"""Show what a model would say in each context of a phrase list, and how the list's phrases compare.

    python monster_mapper.py --config my.yaml
    python monster_mapper.py --config my.yaml --discover --yaml found.yaml   # a list of the model's own cliches
    python monster_mapper.py --config my.yaml --rate MERGE                   # how often base and merge write the list's

Exit codes: 0 done, 1 the run failed or nothing was found, 2 configuration, arguments or model can't be used, 130
interrupted, 141 nobody reads the output any more.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from modules.config.choices import DEVICES
    from modules.config.inputs import check_apart, input_paths
    from modules.config.load import load_config
    from modules.config.schema import CONFIG, QUIET, SET, VERSION, Config
    from modules.runtime.arguments import Arguments
    from modules.runtime.console import LOGS, Console, Unlogged, open_streams
    from modules.runtime.distributed import find_rank, wait_for_main_process
    from modules.runtime.errors import ConfigError
    from modules.runtime.program import LOADING, exit_code, importing, leave
except KeyboardInterrupt:  # imports take a moment
    sys.exit(130)
except ModuleNotFoundError as error:
    sys.exit(f"ERROR: the package {error.name} is not installed: pip install -r requirements.txt")

LOG = "monster-mapper"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    open_streams()
    return exit_code(lambda: start(parse_arguments(arguments)), Unlogged(LOG))


def start(options: argparse.Namespace) -> int:
    """Read the configuration, open the log and run."""
    rank = find_rank()
    if rank.world_size > 1 and not rank.is_main_process:
        wait_for_main_process()
        return 2
    if rank.world_size > 1:
        raise ConfigError("the mapper runs in one process; start it with python, not with torchrun")
    given = {"device": options.device, "sets": options.set or (), "mapping": True}
    config = load_config(options.config, model=options.model, discovering=options.discover, **given)
    rated = [load_config(options.config, model=name, model_option="--rate", **given) for name in options.rate or ()]
    exports = [path for path in (options.json, options.yaml) if path]
    read = [path for one in (config, *rated) for path in input_paths(one)]
    check_apart([LOGS, *exports], [Path(options.config), *read])
    with Console(LOG, quiet=options.quiet) as console:
        return run(config, rated, console, options)


def run(config: Config, rated: Sequence[Config], console: Console, options: argparse.Namespace) -> int:
    """Map, discover or count, and turn every failure into one line and an exit code."""
    does = "Counting phrases" if rated else "Looking for overused phrases" if options.discover else "Mapping contexts"
    console.timed(does)
    console.timed(LOADING)
    # Only now: torch and transformers take seconds to import, and a typo should not have to wait for them.

    def work() -> int | None:
        with importing():
            from modules.run.map import Exports, check_exports, map_model
            from modules.run.steps import prepare_libraries
            from modules.slop.discover import discover
            from modules.slop.rate import rate

        exports = Exports(options.json, options.yaml)
        check_exports(exports, options.overwrite)
        if not (rated or options.discover):
            return map_model(config, console, exports)
        prepare_libraries(config.random_seed)
        if rated:
            return rate(config, rated, console, options.json)
        return discover(config, console, options.json, options.yaml)

    return exit_code(work, console, lambda: f"The results so far are in {console.log_path}.")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 on a wrong one."""
    description = "Show what a model would say in each context of a phrase list."
    parser = Arguments(description)
    settings = parser.add_argument_group("settings (see default-mapper.yaml)")
    default = "default-mapper.yaml"
    settings.add_argument("--config", metavar="FILE", default=default, help=CONFIG.format(default))
    settings.add_argument("--model", metavar="DIR", help="base model to use instead of the config's")
    settings.add_argument("--device", metavar="NAME", help=DEVICES)
    settings.add_argument("--set", metavar="KEY=VALUE", action="append", help=SET)
    ways = parser.add_argument_group("other modes").add_mutually_exclusive_group()
    ways.add_argument("--discover", action="store_true", help="find phrases that the model overuses")
    ways.add_argument("--rate", nargs="+", metavar="MODEL", help="count the phrases in texts that models generate")
    written = parser.add_argument_group("output files")
    written.add_argument("--json", metavar="FILE", type=Path, help="all results")
    written.add_argument("--yaml", metavar="FILE", type=Path, help="a phrase list from the results")
    written.add_argument("--overwrite", action="store_true", help="replace existing files")
    shown = parser.add_argument_group("console")
    shown.add_argument("--quiet", action="store_true", help=QUIET)
    shown.add_argument("--version", action="version", version=f"Monster Mapper {VERSION}", help="print the version")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    leave(main())
