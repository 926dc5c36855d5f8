"""A command line: its help on one screen, its errors with escaped input.

Knows: argparse, the size of a screen. Refuses to know: which options exist.
"""

import argparse
import re
import sys
from typing import IO, NoReturn

from modules.runtime.console import say, visible

_COLUMN = 33  # where the help of an option begins: after the longest option


class Arguments(argparse.ArgumentParser):
    """A command line with groups of options. Its help has one line of 80 columns for each option."""

    def __init__(self, description: str) -> None:
        super().__init__(
            usage="%(prog)s [--config FILE] [options]",
            description=description,
            formatter_class=_OneScreen,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # whoever reads the help knows it

    def error(self, message: str) -> NoReturn:
        """Print usage and error, and exit with code 2."""
        super().error(visible(message))

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        """Print with `say`: argparse itself would not notice that the reader is gone."""
        if file is sys.stdout:
            say(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


class _OneScreen(argparse.HelpFormatter):
    """A help without empty lines: a screen has 24 lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_COLUMN)

    def format_help(self) -> str:
        return re.sub(r"\n{2,}", "\n", super().format_help())
