"""Every failure as one message for the person at the terminal, and an exit code.

Knows: which exceptions a run may end in. Refuses to know: what the run was doing.
"""

import traceback
from collections.abc import Callable

import torch

from modules.config import ConfigError
from modules.console import Console
from modules.weights import CheckpointError


def exit_code(work: Callable[[], None], console: Console, untouched: str) -> int:
    """Run `work`: 0 done, 1 failed, 2 it can't be done as asked, 130 interrupted. untouched: what was not written."""
    try:
        work()
    except ConfigError as error:
        console.error(f"ERROR: {error}")
        return 2
    except (CheckpointError, OSError) as error:
        console.error(f"ERROR: {error}\n{untouched}")
        return 1
    except torch.OutOfMemoryError as error:
        console.error(f"ERROR: out of memory: {str(error).splitlines()[0]}")
        return 1
    except KeyboardInterrupt:
        console.error(f"Interrupted. {untouched}")
        return 130
    except Exception:
        console.error(f"{traceback.format_exc()}\nThis is a bug in Merge Monster. The log is {console.log_path}.")
        return 1
    return 0
