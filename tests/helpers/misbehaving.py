"""The program as one of several processes, one of which misbehaves: run under torchrun by test_processes.py.

misbehaving.py HOW NUMBER -- arguments of merge_monster.py
"""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch

import merge_monster
from modules.checkpoints.candidate import Candidate
from modules.runtime.errors import CheckpointError
from modules.scoring.scorer import Scorer
from modules.search.search import Search


def dies(after=3):
    """In the middle of a decision, without a word."""
    decide, count = Search._decide, [0]

    def dying(self, *arguments):
        count[0] += 1
        if count[0] > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return decide(self, *arguments)

    Search._decide = dying


def runs_out_of_memory():
    """Once, on its second decision."""
    score_trials, count = Scorer.score_trials, [0]

    def short_of_memory(self, trials):
        count[0] += 1
        if count[0] == 2:
            raise torch.OutOfMemoryError("no memory here")
        return score_trials(self, trials)

    Scorer.score_trials = short_of_memory


def cannot_read():
    """Of the first candidate, its second layer."""
    stream = Candidate.stream

    def broken(self, names, *room):
        if self.name == "one" and any(".layers.1." in name for name in names):
            raise CheckpointError("a mount has gone")
        return stream(self, names, *room)

    Candidate.stream = broken


HOW = {"dies": dies, "runs out of memory": runs_out_of_memory, "cannot read": cannot_read}


if __name__ == "__main__":
    how, number, _, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if os.environ["RANK"] == number:
        HOW[how]()
    sys.exit(merge_monster.main(arguments))
