"""The state of learning on the disk: an interrupted run resumes from it.

Knows: the file's name and form. Refuses to know: what a state is used for.
"""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from modules.learn.steps import LearnState
from modules.output.filesystem import sync
from modules.output.folder import STATE_FILE
from modules.runtime.errors import ConfigError, first_line

_NUMBERS = ("step", "halvings", "tokens", "logits")


def save_state(folder: Path, state: LearnState) -> None:
    """Replace an earlier state by this one; one of the two exists at any time. Raises OSError."""
    partial = folder / f"{STATE_FILE}.partial"
    save_file(dict(state.tensors), partial, metadata={name: str(getattr(state, name)) for name in _NUMBERS})
    sync(partial)
    partial.replace(folder / STATE_FILE)
    sync(folder)


def read_state(folder: Path) -> LearnState | None:
    """The state that was written last; None if there is none. Raises ConfigError for a file that can't be used."""
    file = folder / STATE_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            numbers = {name: int(stored.metadata()[name]) for name in _NUMBERS}
            return LearnState(**numbers, tensors={name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except Exception as error:  # whatever safetensors raises for a damaged file
        raise ConfigError(f"{file}: can't be resumed ({first_line(error)}); start over with --restart") from None
