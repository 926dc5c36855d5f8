"""Which of several processes this one is.

Knows: what torchrun sets. Refuses to know: torch, what the processes exchange.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modules.runtime.errors import ConfigError


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
    """This process's, from what torchrun tells it; the only one, if it was not started by torchrun.

    Raises ConfigError if what stands there is no seat.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in environment for name in names):
        return Seat()
    told = [environment[name] for name in names]
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in told):
        raise _no_seat(names, told)
    seat = Seat(*map(int, told))
    if not (seat.number < seat.count and seat.number_here < seat.count_here <= seat.count):
        raise _no_seat(names, told)
    return seat


def _no_seat(names: Sequence[str], told: Sequence[str]) -> ConfigError:
    listed = ", ".join(f"{name}={text}" for name, text in zip(names, told, strict=True))
    return ConfigError(f"the environment has {listed}, which torchrun did not set: unset them, or start with torchrun")
