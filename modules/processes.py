"""One process among several that search together, as torchrun starts them.

Knows: torchrun's environment. Refuses to know: torch, what the processes do together.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """Which process this is."""

    number: int = 0
    count: int = 1
    number_here: int = 0  # the same among those on this machine
    count_here: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, writes and saves."""
        return self.number == 0


def find_seat(environment: Mapping[str, str] = os.environ) -> Seat:
    """This process's, from what torchrun tells it; the only one, if it was not started by torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in environment for name in names):
        return Seat()
    return Seat(*(int(environment[name]) for name in names))
