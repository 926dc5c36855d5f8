"""Every failure as one message for the person at the terminal, and an exit code.

Knows: which exceptions a run may end in. Refuses to know: what the run was doing.
"""

import traceback
from collections.abc import Callable

import torch

from modules.config import ConfigError
from modules.console import Console
from modules.group import ProcessLost
from modules.stopping import termination_interrupts
from modules.weights import CheckpointError, first_line


def exit_code(work: Callable[[], None], console: Console, left: Callable[[], str]) -> int:
    """Run `work`: 0 done, 1 failed, 2 it can't be done as asked, 130 interrupted by Ctrl-C or SIGTERM.

    left: is asked, after a failure, what there is and how to go on.
    """
    try:
        with termination_interrupts():
            work()
    except ConfigError as error:
        console.error(f"ERROR: {error}")
        return 2
    except (CheckpointError, OSError) as error:
        console.error(f"ERROR: {error}\n{left()}")
        return 1
    except torch.OutOfMemoryError as error:
        console.error(f"ERROR: out of memory: {first_line(error)}\n{left()}")
        return 1
    except ProcessLost as error:
        console.ending(f"ERROR: {error}\n{left()}")
        return 1
    except KeyboardInterrupt:
        console.ending(f"Interrupted. {left()}")
        return 130
    except Exception:
        bug = f"This is a bug in Merge Monster. The log is {console.log_path}."
        console.error(f"{traceback.format_exc()}\n{bug}\n{left()}")
        return 1
    return 0
