"""The bar and its time to go; quiet runs; terminals that can't show every character."""

import contextlib
import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tqdm.std
from test_run import make_models

import merge_monster
import monster_mapper
from modules.config import Config, Directories
from modules.console import Console, Progress, coloured
from modules.search import Search

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


class Clock:
    """A clock that stands still between two steps."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


@contextlib.contextmanager
def on_terminal():
    """Within the block both streams are a terminal; what it is sent."""
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        yield terminal


# ---------------------------------------------------------------------------------------------------------------------
# How long it will take
# ---------------------------------------------------------------------------------------------------------------------


class Plan:
    """The steps of a search, as the program counts them, without a model."""

    steps, steps_per_candidate = Search.steps, Search.steps_per_candidate

    def __init__(self, layers, methods):
        self.model = SimpleNamespace(layers=[None] * layers)
        self.config = Config(Directories("base", "out"), merge_method=methods)

    def decisions(self):
        """The steps of every decision on one candidate, in order."""
        layers, methods = range(len(self.model.layers)), self.config.merge_method
        return [self.steps(layer, method) for layer in layers for method in methods] + [self.steps(None, "lerp")]


def shown_seconds(terminal):
    """The time to go that the bar showed last."""
    text = re.findall(r"elapsed, ([\d:?]+) to go", terminal.getvalue())[-1]
    return sum(int(part) * 60**place for place, part in enumerate(reversed(text.split(":")))) if text != "?" else None


def rehearse(console, terminal, clock, plan, candidates, seconds, repeated=0):
    """Run the bar through a search; at 10, 50 and 90 % of its time (share passed, seconds shown, true seconds to go).

    seconds: what a decision of so many steps takes. repeated: decisions that an earlier run has taken.
    """
    steps = plan.decisions() * candidates
    times = [seconds(count) for count in steps[repeated:]]
    found, passed = [], 0.0
    with console.progress(sum(steps)) as bar:
        for count in steps[:repeated]:
            clock.now += 0.01
            bar.skip(count)
        for count, took in zip(steps[repeated:], times, strict=True):
            clock.now += took
            passed += took
            bar.update(count)
            bar.tell("told")
            found.append((passed / sum(times), shown_seconds(terminal), sum(times) - passed))
    return [next(row for row in found if row[0] >= share) for share in (0.1, 0.5, 0.9)]


@pytest.mark.parametrize(
    "layers, methods, candidates", [(32, ("lerp",), 1), (32, ("lerp", "cyclic"), 3), (8, ("lerp",), 2)]
)
@pytest.mark.parametrize("repeated", [0, 5])
def test_the_time_to_go_is_right_from_the_first_tenth_on(place, clock, layers, methods, candidates, repeated):
    """Within a quarter, where decisions take what their steps take, give or take a fifth, and a bit of their own."""
    chance, plan = random.Random(1), Plan(layers, methods)
    typical = sum(plan.decisions()) / len(plan.decisions())

    def seconds(steps):
        return (steps + 0.1 * typical) * chance.uniform(0.8, 1.2)

    with on_terminal() as terminal, Console("test") as console:
        for share, shown, true in rehearse(console, terminal, clock, plan, candidates, seconds, repeated):
            assert shown == pytest.approx(true, rel=0.25), share


def test_the_work_of_a_candidate_is_that_of_its_decisions():
    for methods in (("lerp",), ("cyclic", "slerp")):
        plan = Plan(5, methods)
        assert sum(plan.decisions()) == plan.steps_per_candidate()


def test_decisions_that_are_repeated_say_nothing_about_the_speed(place, clock):
    with on_terminal() as terminal, Console("test") as console, console.progress(100) as bar:
        clock.now += 1.0
        bar.skip(50)
        assert shown_seconds(terminal) is None and " 50%|" in terminal.getvalue()
        clock.now += 20.0
        bar.update(10)
        assert shown_seconds(terminal) == 80


@pytest.mark.parametrize("decided", [3, 6])
def test_a_resumed_run_takes_its_speed_from_its_own_decisions(place, monkeypatch, decided):
    """Not even from the first of them, which waits until all before it are carried out again."""
    base, one, two = make_models(place)
    path = tiny.write_config(place / "my.yaml", base, [one, two], place / "out")
    counted = []

    def interrupted(bar, steps):
        counted.append("update")
        if len(counted) == decided:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupted)
    assert merge_monster.main(["--config", str(path)]) == 130
    counted.clear()
    monkeypatch.setattr(Progress, "update", lambda bar, steps: counted.append("update"))
    monkeypatch.setattr(Progress, "skip", lambda bar, steps: counted.append("skip"))
    assert merge_monster.main(["--config", str(path), "--resume"]) == 0
    assert counted == ["skip"] * (decided + 1) + ["update"] * (7 - decided)


def test_a_candidate_that_is_given_up_leaves_less_to_do(place, clock):
    with on_terminal() as terminal, Console("test") as console, console.progress(100) as bar:
        clock.now += 10.0
        bar.update(10)
        bar.left(40)
        assert shown_seconds(terminal) == 40 and " 20%|" in terminal.getvalue()


def test_the_bar_shows_candidates_layers_and_what_was_accepted(place):
    base, one, two = make_models(place)
    path = tiny.write_config(place / "my.yaml", base, [one, two], place / "out")
    with on_terminal() as terminal:
        assert merge_monster.main(["--config", str(path)]) == 0
    states = re.findall(r"to go, candidate (\d)/2, (layer \d/3|header), (\d+) accepted", terminal.getvalue())
    parts = ["layer 1/3", "layer 2/3", "layer 3/3", "header"]
    assert list(dict.fromkeys((turn, part) for turn, part, _ in states)) == [(t, p) for t in "12" for p in parts]
    counts = [int(count) for *_, count in states]
    assert counts == sorted(counts) and counts[-1] == terminal.getvalue().count(" - CHANGED - ") > 0
    assert re.search(r"100%\|[^|\r\n]*\| \S+ elapsed, 00:00 to go, candidate 2/2, header", terminal.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Who sees what
# ---------------------------------------------------------------------------------------------------------------------


def only_log(place):
    (path,) = (place / "logs").iterdir()
    return path.read_text(encoding="utf-8")


def test_a_quiet_merge_shows_warnings_and_the_last_line(place):
    base, one, two = make_models(place)

    def blank(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:0]

    tiny.edit_checkpoint(one, blank)
    path = tiny.write_config(place / "my.yaml", base, [one, two], place / "out")
    with on_terminal() as terminal:
        assert merge_monster.main(["--config", str(path), "--quiet"]) == 0
    warning, done = terminal.getvalue().splitlines()
    assert warning.startswith("WARNING: one's lm_head.weight has shape (0, 32)")
    assert re.fullmatch(r"\d\d:\d\d:\d\d - Done. The log is logs/\S+", done)
    log = only_log(place)
    assert warning in log and log.endswith(done + "\n")
    for line in ("THE MERGE MONSTER HUNGERS", "Candidate 2/2: two", "| Type | Phrase", "Merge composition:"):
        assert line in log


def test_a_quiet_merge_shows_its_error(place):
    base, one, _ = make_models(place)
    path = tiny.write_config(place / "my.yaml", base, [one], place / "out", random_seed=1)
    (place / "out").mkdir()
    (place / "out/thesis.tex").write_text("years of work")
    with on_terminal() as terminal:
        assert merge_monster.main(["--config", str(path), "--quiet"]) == 2
    assert re.fullmatch(r"ERROR: .*/out is not empty.*", terminal.getvalue().strip())


def test_a_quiet_mapper_shows_the_last_line(place):
    base, *_ = make_models(place)
    path = tiny.write_config(place / "my.yaml", base, [], place / "out", models_to_merge=["not/there"])
    with on_terminal() as terminal:
        assert monster_mapper.main(["--config", str(path), "--quiet"]) == 0
    assert re.fullmatch(r"\d\d:\d\d:\d\d - Done. The log is \S+\n", terminal.getvalue())
    assert "TOTAL BRANCHES" in only_log(place)


def test_colours_go_to_a_terminal_unless_no_color_is_set(place, monkeypatch):
    text = coloured("12%", 0.5)
    for value, seen in (("", text), ("1", "12%"), (None, text)):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if value is not None:
            monkeypatch.setenv("NO_COLOR", value)
        with on_terminal() as terminal, Console("test") as console:
            console.line(text)
            console.warning(text)
        assert terminal.getvalue().splitlines() == [seen, f"WARNING: {seen}"]
        assert console.log_path.read_text() == "12%\nWARNING: 12%\n"


def test_what_is_no_terminal_gets_neither_bar_nor_colour(place, capsys):
    with Console("test") as console, console.progress(10) as bar:
        bar.tell("told")
        bar.skip(5)
        bar.update(5)
        bar.left(0)
        console.line(coloured("12%", 0.5))
    assert capsys.readouterr() == ("12%\n", "")


def test_a_long_name_leaves_room_for_the_bar_of_its_download(place):
    with on_terminal() as terminal, Console("test") as console, console.download("x" * 200, 10**9) as bar:
        bar.update(10**8)
    assert all(len(line) < 120 for line in re.split(r"[\r\n]", terminal.getvalue()))


# ---------------------------------------------------------------------------------------------------------------------
# Terminals without Unicode
# ---------------------------------------------------------------------------------------------------------------------

ALL_LINES = """
import sys
from modules.console import BANNER, Console, coloured, show_any_character
show_any_character()
text = "caf\\xe9, \\u65e5\\u672c\\u8a9e, \\U0001f642, \\u0301, \\u2713 \\x1b"
with Console(text) as console, console.progress(2) as bar:
    console.lines([BANNER, text, coloured(text, 0.5)])
    console.warning(text)
    console.timed(text)
    bar.tell(text)
    bar.update(1)
    console.error(text)
    console.final(text)
"""


def narrow(encoding, command, place):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_a_question_mark(place, encoding):
    result = narrow(encoding, [sys.executable, "-c", ALL_LINES], place)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    shown = result.stdout.decode(encoding)
    assert shown.count("\u65e5\u672c\u8a9e" if encoding == "utf-8" else "???, ?, ?, ?") == 5
    assert only_log(place).count("\u65e5\u672c\u8a9e, \U0001f642") == 6


def test_a_whole_run_on_a_terminal_without_unicode(place):
    base, one, two = make_models(place / "\u65e5\u672c \U0001f642")
    pairs = (tiny.Pair("BAD", "\u65e5\u672c\u8a9e", "naïve café: "), tiny.Pair("GOOD", "\U0001f642", "e\u0301 and "))
    path = tiny.write_config(place / "my.yaml", base, [one, two], place / "\u2713", pairs=pairs)
    result = narrow("cp1252", [sys.executable, str(ROOT / "merge_monster.py"), "--config", str(path)], place)
    assert result.returncode == 0, result.stderr.decode("cp1252")
    assert "| BAD  | ???" in result.stdout.decode("cp1252")
    path.write_text(path.read_text(encoding="utf-8") + "\u65e5: 1\n", encoding="utf-8")
    result = narrow("cp1252", [sys.executable, str(ROOT / "merge_monster.py"), "--config", str(path)], place)
    assert result.returncode == 2 and b"unknown key" in result.stderr and b"Traceback" not in result.stderr
