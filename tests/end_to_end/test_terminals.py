"""Pipes whose reader ends, terminals that are closed, nohup, streams that are closed: as of other programs."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import tiny
from broken_runs import end, journal, merge, same, start, undisturbed, wait_until
from project import ROOT
from runs import log_of

import merge_monster
import modules.run.conductor
import modules.run.merge
import monster_mapper


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"), models)


class Gate:
    """Where a run in a child process waits, once it has shown two decisions, until it may go on."""

    def __init__(self):
        (self._reached, self._reach), (self._opened, self._open) = os.pipe(), os.pipe()

    def close(self):
        """In the child process, before the run."""
        shown, show = [], modules.run.conductor.show_decision

        def show_and_wait(*arguments):
            show(*arguments)
            shown.append(arguments)
            if len(shown) == 2:
                os.write(self._reach, b"x")
                os.read(self._opened, 1)

        modules.run.conductor.show_decision = show_and_wait

    @contextlib.contextmanager
    def reached(self):
        """The run waits within the block, and goes on behind it."""
        assert select.select([self._reached], [], [], 60)[0]
        yield
        os.write(self._open, b"x")


FORMER = []  # streams of before, which would close what they led to


def connect(file, *numbers):
    """In a child process: the streams of these numbers lead to a file from now on."""
    for number in numbers:
        os.dup2(file, number)
    FORMER.extend([sys.stdout, sys.stderr])
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115


def goes_on(place, models, whole):
    """A run that has ended has left what --resume needs and nothing else, and is gone on with."""
    assert sorted(path.name for path in place.iterdir()) == ["child.txt", "logs", "my.yaml", "out.partial"]
    assert len(list((place / "out.partial").iterdir())) == 2
    assert any(record["kind"] == "decision" for record in journal(place / "out.partial"))
    assert merge(place, models, "--resume") == 0
    assert "recorded decisions" in log_of(place)
    return same(place / "out", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Pipes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_whose_reader_ends_can_be_gone_on_with(place, models, whole):
    gate, (ours, theirs) = Gate(), os.pipe()
    child = start(place, models, before=lambda: (gate.close(), connect(theirs, 1), os.close(theirs), os.close(ours)))
    os.close(theirs)
    with gate.reached():
        os.close(ours)
    assert end(child) == 141
    assert (place / "child.txt").read_text() == ""  # standard error
    assert "Stopped: standard output was closed. " in log_of(place)
    assert "run the same command with --resume" in log_of(place)
    assert goes_on(place, models, whole)


def without_reader(work):
    """Do work in a child process whose standard output nobody reads; its exit code, what is on standard error."""
    errors, theirs = os.pipe()
    child = os.fork()
    if not child:
        ours, nobodys = os.pipe()
        os.close(ours)
        connect(nobodys, 1)
        connect(theirs, 2)
        code = 99
        try:
            code = work()
        except SystemExit as left:
            code = left.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(theirs)
    with os.fdopen(errors) as said:
        return end(child), said.read()


@pytest.mark.parametrize("way", ["--compare", "--dry-run", "--score", "--export-mergekit", "mapper"])
def test_what_only_prints_ends_without_a_word(place, models, whole, way):
    base, one, two = models
    config = ["--config", str(tiny.write_config(place / "my.yaml", base, [one, two], place / "out"))]
    arguments = {
        "--compare": [way, str(whole)],
        "--dry-run": [*config, way],
        "--score": [*config, way, str(one)],
        "--export-mergekit": [way, str(place / "merge.yaml"), str(whole)],
        "mapper": config,
    }
    program = monster_mapper if way == "mapper" else merge_monster
    assert without_reader(lambda: program.main(arguments[way])) == (141, "")
    assert {path.name for path in place.iterdir()} <= {"logs", "my.yaml"}


@pytest.mark.parametrize("program", ["merge_monster.py", "monster_mapper.py"])
def test_a_shell_sees_what_it_sees_of_others(place, program):
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, str(ROOT / program), "--help"]
    result = subprocess.run(command, cwd=place, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (result.returncode, result.stderr) == (141, "")


# ---------------------------------------------------------------------------------------------------------------------
# Terminals
# ---------------------------------------------------------------------------------------------------------------------


def on_a_terminal(place, models, before=lambda: None):
    """A run in a terminal of its own; its process id, and the terminal, to be read and closed."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)

    def begin():
        os.setsid()
        os.close(ours)
        os.close(theirs)
        connect(os.open(name, os.O_RDWR), 0, 1, 2)  # a new session's first terminal: it is hung up with it
        before()

    child = start(place, models, before=begin)
    os.close(theirs)
    return child, ours


def test_a_closed_terminal_ends_a_run_which_can_be_gone_on_with(place, models, whole):
    gate = Gate()
    child, terminal = on_a_terminal(place, models, gate.close)
    with gate.reached():
        os.close(terminal)
    assert end(child) == 130
    assert "Interrupted. Nothing was written to" in log_of(place) and "Traceback" not in log_of(place)
    assert goes_on(place, models, whole)


def test_a_terminal_that_is_closed_during_the_load_leaves_nothing(place, models):
    def load(*_):
        (place / "loading").touch()
        time.sleep(60)

    before = lambda: setattr(modules.run.merge, "load_base", load)  # noqa: E731
    child, terminal = on_a_terminal(place, models, before)
    wait_until((place / "loading").exists)
    os.close(terminal)
    assert end(child) == 130
    assert sorted(path.name for path in place.iterdir()) == ["child.txt", "loading", "logs", "my.yaml"]


def test_under_nohup_a_closed_terminal_is_not_heard(place, models, whole):
    gate = Gate()
    before = lambda: (gate.close(), signal.signal(signal.SIGHUP, signal.SIG_IGN))  # noqa: E731
    child, terminal = on_a_terminal(place, models, before)
    with gate.reached():
        os.close(terminal)
    assert end(child) == 0
    assert same(place / "out", whole)
    assert "can't print any more (Input/output error)" in log_of(place)


def test_nohup_has_lines_when_they_come_and_no_bar(place, models, whole):
    gate = Gate()
    before = lambda: (gate.close(), signal.signal(signal.SIGHUP, signal.SIG_IGN))  # noqa: E731
    child = start(place, models, before=before)
    with gate.reached():
        os.kill(child, signal.SIGHUP)
        assert "- Layer 1/3 - " in (place / "child.txt").read_text()
    assert end(child) == 0
    shown = (place / "child.txt").read_text()
    assert "\r" not in shown and "%|" not in shown and "Stopping after" not in shown
    assert "Done. The log is" in shown.splitlines()[-1]
    assert same(place / "out", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Streams that are closed from the beginning
# ---------------------------------------------------------------------------------------------------------------------

CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


def in_a_shell(place, program, streams):
    command = f'"{sys.executable}" "{ROOT / program.split()[0]}" {program.partition(" ")[2]} {streams}'
    return subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, text=True)


@pytest.mark.parametrize(
    "streams, program, code",
    [
        ("2>&-", "merge_monster.py --help", 0),
        (">&-", "merge_monster.py --help", 0),
        ("2>&-", "monster_mapper.py --no-such", 2),
        ("<&- >&- 2>&-", "monster_mapper.py --no-such", 2),
    ],
)
def test_closed_streams_are_no_failure(place, streams, program, code):
    result = in_a_shell(place, program, streams)
    assert result.returncode == code
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("streams", CLOSED)
def test_a_whole_run_with_closed_streams(place, models, streams):
    base, one, _ = models
    config = tiny.write_config(place / "my.yaml", base, [one], place / "out")
    for program in (f"merge_monster.py --config {config}", f"monster_mapper.py --config {config}"):
        result = in_a_shell(place, program, streams)
        assert result.returncode == 0 and result.stderr == ""
    assert (place / "out/model.safetensors").exists()
