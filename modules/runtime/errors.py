"""What can go wrong in words that a person at the terminal understands.

Knows: kinds of errors and their causes. Refuses to know: exit codes, the console, who raises them.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(Exception):
    """The configuration, the arguments or the models they name can't be used.

    The message is for the user. Each argument is a line of it: names in it may have line ends of their own.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class CheckpointError(Exception):
    """A checkpoint can't be read or written; the message is for the user."""


class TooNarrow(CheckpointError):
    """A number does not fit the type that is computed in. Its arguments: which number and which type; and perhaps what
    to do if no other type may be taken."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class BrokenWeights(Exception):
    """Weights hold NaN or infinite values; the message names the tensor."""


class ProcessLost(Exception):
    """Another process has ended, or can't be reached; the message is for the user."""


class ReaderGone(BaseException):
    """Whoever read standard output has ended, as in `| head`. It ends a program as Ctrl-C does, whatever is being done:
    other command-line programs are ended by SIGPIPE then."""


@contextmanager
def without_panics() -> Iterator[None]:
    """Make the panic of a library in Rust, which is none of Python's Exceptions, a RuntimeError with its words."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # every such library has a class of its own, under this name
            raise
        raise RuntimeError(f"its library failed: {first_line(error)}") from None


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong with a file of weights in this block is a CheckpointError that names it."""
    try:
        with without_panics():
            yield
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: damaged, or a pickle that would run code when opened; convert it to safetensors if you trust it"
        ) from None
    except Exception as error:  # whatever a damaged file makes of its reader
        raise CheckpointError(f"{file}: can't be read ({first_line(error)})") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that comes from this file or folder its name, which those of an open file lack."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def first_line(error: BaseException) -> str:
    """An error of a library on one line, with its kind where the words alone would say little."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and len(lines[0].split()) > 1 else ": ".join([type(error).__name__, *lines])
