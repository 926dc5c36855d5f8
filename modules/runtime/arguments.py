"""A command line: its help on one screen, its errors with what was typed as it is.

Knows: argparse, how wide and how high a screen is. Refuses to know: which options there are.
"""

import argparse
import re
import sys
from typing import IO, NoReturn

from modules.runtime.console import say, visible

_COLUMN = 33  # in which what is said of an option begins: behind the longest one


class Arguments(argparse.ArgumentParser):
    """A command line in groups of options, each of which its help tells of on one line of 80 columns."""

    def __init__(self, description: str) -> None:
        super().__init__(
            usage="%(prog)s [--config FILE] [options]",
            description=description,
            formatter_class=_OneScreen,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # who reads it knows

    def error(self, message: str) -> NoReturn:
        """Print usage and error, and exit with code 2."""
        super().error(visible(message))

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        """argparse would not notice that the reader is gone."""
        if file is sys.stdout:
            say(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


class _OneScreen(argparse.HelpFormatter):
    """No empty lines: a screen has 24."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_COLUMN)

    def format_help(self) -> str:
        return re.sub(r"\n{2,}", "\n", super().format_help())
