"""Runs that break off: one in a child process, to be killed; what a killed one leaves; a file that breaks meanwhile; a
run that nobody disturbs, and whether others have left the same."""

import json
import os
import sys
import time

import pytest
import tiny
from runs import digest

import merge_monster
from modules.checkpoints.candidate import Candidate
from modules.output.folder import UNFINISHED, OutputFolder

JOURNAL, RECIPE = "merge_monster_journal.jsonl", "merge_monster_recipe.json"
OWN = {JOURNAL, RECIPE, "merge_monster.yaml", "README.md"}  # they say how long it took, and where the output is
SETTINGS = {"merge_method": ["slerp", "lerp"], "auto_weights": True}


def merge(place, models, *arguments, **settings):
    base, *candidates = models
    path = tiny.write_config(place / "my.yaml", base, candidates, place / "out", **{**SETTINGS, **settings})
    return merge_monster.main(["--config", str(path), *arguments])


def undisturbed(folder, models):
    """What a run leaves that was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert merge(folder, models) == 0
    return folder / "out"


def same(folder, whole, marked=False):
    """The same files, to the bit, but for what tells of this very run. marked: a mark of before may still be there."""
    ours, theirs = digest(folder), digest(whole)
    if marked:
        ours.pop(UNFINISHED, None)
    return ours.keys() == theirs.keys() and differing(ours, theirs) <= OWN


def differing(ours, theirs):
    """The names of files whose digests are not the same, or that only one side has."""
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def journal(folder):
    return [json.loads(line) for line in (folder / JOURNAL).read_text(encoding="utf-8").splitlines()]


def break_off(place, whole, records, torn=b""):
    """Leave what a run leaves that was killed after so many records."""
    lines = (whole / JOURNAL).read_bytes().splitlines(keepends=True)
    partial = place / "out.partial"
    partial.mkdir()
    (partial / JOURNAL).write_bytes(b"".join(lines[:records]) + torn)
    OutputFolder(place / "out").mark()


def start(place, models, *arguments, before=lambda: None, **settings):
    """The run in a child process that has everything loaded already; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(place / "child.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        before()
        code = merge(place, models, *arguments, **settings)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(child):
    """A child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until(condition, seconds=60):
    """Wait for something that a child does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def broken_after(monkeypatch, folder, count):
    """The candidate's file is cut off after so many reads, as on a mount that fails."""
    stream, calls = Candidate.stream, [0]

    def failing(self, names, *room):
        if self.checkpoint.path == folder:
            calls[0] += 1
            if calls[0] == count:
                os.truncate(folder / "model.safetensors", 5000)
        return stream(self, names, *room)

    monkeypatch.setattr(Candidate, "stream", failing)
