"""Regular expressions that a stranger wrote, matched under a limit of time and memory.

Knows: that a pattern of a few characters may take for ever, or all memory. Refuses to know: what the names are.

Python's own `re` can't be stopped, and other engines read some patterns otherwise: it runs in a process of its own,
which is ended.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 5.0  # of which a process takes a tenth to begin
_MEMORY = 1 << 30  # bytes, where the system has such a limit

# Matches as PEFT does (get_pattern_key): the first pattern that a whole name, or what stands behind a dot, fits.
_PROGRAM = rf"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
except (ImportError, ValueError, OSError):
    pass
patterns, names = json.load(sys.stdin)
try:
    for pattern in patterns:
        re.compile(rf"(.*\.)?({{pattern}})$")
    fits = lambda pattern, name: re.match(rf"(.*\.)?({{pattern}})$", name)
    found = [next((pattern for pattern in patterns if fits(pattern, name)), None) for name in names]
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
json.dump(found, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[str | None]:
    """For each name the first of the patterns that PEFT would take for it, None if there is none.

    Raises ValueError if one is no pattern, TimeoutError if matching takes too long or too much memory.
    """
    if not patterns:
        return [None] * len(names)
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    content = json.dumps([list(patterns), list(names)])
    try:
        done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"not matched within {SECONDS:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        if not lines or "MemoryError" in lines[-1]:
            raise TimeoutError("not matched with 1 GiB of memory")
        raise ValueError(lines[-1])
    found: list[str | None] = json.loads(done.stdout)
    return found
