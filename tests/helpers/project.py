"""Where the project is, and the environment of a process that imports from it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent


def environment(**more):
    """This process's environment; modules/ and the helpers of the tests can be imported in it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]), **more}
