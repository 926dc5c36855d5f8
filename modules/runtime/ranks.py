"""Which of several processes this one is.

Knows: what torchrun sets. Refuses to know: torch, what the processes exchange.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from modules.runtime.errors import ConfigError

_LEADER_TELLS = 10  # seconds that it may take to do so


@dataclass(frozen=True)
class Rank:
    """Which process this is."""

    number: int = 0
    world_size: int = 1
    local_rank: int = 0  # the same among those on this machine
    local_world_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, writes and saves."""
        return self.number == 0


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process's, from what torchrun tells it; the only one, if it was not started by torchrun.

    Raises ConfigError if what stands there is no rank.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in environment for name in names):
        return Rank()
    told = [environment[name] for name in names]
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in told):
        raise _no_rank(names, told)
    rank = Rank(*map(int, told))
    if not (rank.number < rank.world_size and rank.local_rank < rank.local_world_size <= rank.world_size):
        raise _no_rank(names, told)
    return rank


def wait_for_the_leader() -> None:
    """Leave the leader time to say why nothing can be done: torchrun ends all processes with the first that ends."""
    with suppress(KeyboardInterrupt):
        time.sleep(_LEADER_TELLS)


def _no_rank(names: Sequence[str], told: Sequence[str]) -> ConfigError:
    listed = ", ".join(f"{name}={text}" for name, text in zip(names, told, strict=True))
    return ConfigError(f"the environment has {listed}, which torchrun did not set: unset them, or start with torchrun")
