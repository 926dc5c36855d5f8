"""Merge fine-tunes into a base model, layer by layer, keeping what makes unwanted phrases less probable.

    python merge_monster.py --config my.yaml

Exit codes: 0 done, 1 the run failed, 2 configuration, arguments or models can't be used, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from modules.config import Config, ConfigError, load_config
from modules.console import Console, show_any_character

VERSION = "1.0.0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    options = parse_arguments(arguments)
    try:
        return start(options)
    except KeyboardInterrupt:
        print("Interrupted before any work.", file=sys.stderr)
        return 130


def start(options: argparse.Namespace) -> int:
    """Read the configuration, open the log and run."""
    show_any_character()
    try:
        config = load_config(options.config, options.device, options.output)
        console = Console("merge-monster")
    except ConfigError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    with console:
        return run(config, console, options.overwrite)


def run(config: Config, console: Console, overwrite: bool) -> int:
    """Merge, and turn every failure into one line and an exit code."""
    # Only now: torch and transformers take seconds to import, and a typo should not have to wait for them.
    from modules.failures import exit_code
    from modules.run import merge_models

    untouched = f"Nothing was written to {config.directories.output_directory}."
    return exit_code(lambda: merge_models(config, console, overwrite), console, untouched)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description="Merge fine-tunes into a base model, keeping what makes unwanted phrases less probable.",
        epilog="The YAML file is explained in default.yaml, key by key.",
    )
    parser.add_argument("--config", metavar="FILE", default="default.yaml", help="settings (default: default.yaml)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps; replaces the file's device")
    parser.add_argument("--output", metavar="DIR", help="replaces the file's output directory")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that exists, once the new one stands"
    )
    parser.add_argument("--version", action="version", version=f"Merge Monster {VERSION}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
