"""Errors with messages for the user.

Knows: kinds of errors and their causes. Refuses to know: exit codes, the console, where they are raised.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(Exception):
    """The configuration, the arguments or the models they name can't be used.

    The message is for the user. Each argument is a line of it, because names in it may contain line ends.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class CheckpointError(Exception):
    """A checkpoint can't be read or written; the message is for the user."""


class TooNarrow(CheckpointError):
    """A number does not fit the dtype of the computation. Arguments: which number and which dtype; and perhaps what to
    do if no other dtype may be used."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class BrokenWeights(Exception):
    """Weights contain NaN or infinite values; the message names the tensor."""


class ProcessLost(Exception):
    """Another process has ended, or can't be reached; the message is for the user."""


class ReaderGone(BaseException):
    """The reader of standard output has ended, as in `| head`. This ends the program at any point, as Ctrl-C does;
    SIGPIPE ends other command-line programs then."""


@contextmanager
def without_panics() -> Iterator[None]:
    """Convert the panic of a Rust library, which is no Exception in Python, to a RuntimeError with its message."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # every such library has its own class with this name
            raise
        raise RuntimeError(f"its library failed: {first_line(error)}") from None


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Convert every error in this block to a CheckpointError that names the file of weights."""
    try:
        with without_panics():
            yield
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: damaged, or a pickle that would run code when opened; convert it to safetensors if you trust it"
        ) from None
    except Exception as error:  # a damaged file may cause any error
        raise CheckpointError(f"{file}: can't be read ({first_line(error)})") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError in this block: errors of an open file lack it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def first_line(error: BaseException) -> str:
    """A library's error on one line, with its type if the message has fewer than two words."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and len(lines[0].split()) > 1 else ": ".join([type(error).__name__, *lines])
