"""The bar and its time to go; quiet runs; terminals that can't show every character."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import tqdm.std
from project import ROOT
from runs import make_models

import merge_monster
import monster_mapper
from modules.runtime.console import Console, Progress, Unlogged, coloured, visible
from modules.runtime.distributed import find_rank
from modules.runtime.errors import CheckpointError, ConfigError, ProcessLost, ReaderGone, naming
from modules.runtime.program import exit_code


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


def shown_seconds(terminal):
    """The time to go that the bar showed last."""
    text = re.findall(r"elapsed, ([\d:?]+) to go", terminal.getvalue())[-1]
    return sum(int(part) * 60**place for place, part in enumerate(reversed(text.split(":")))) if text != "?" else None


def test_the_time_to_go_is_at_the_speed_of_all_steps(place, clock):
    """Not of the last ones alone: it would jump with every candidate."""
    with on_terminal() as terminal, Console("test") as console, console.progress(100) as bar:
        for seconds, to_go in ((10.0, 90), (30.0, 160), (5.0, 105)):
            clock.now += seconds
            bar.update(10)
            assert shown_seconds(terminal) == to_go
        bar.tell("told")
        assert ", told" in terminal.getvalue()


def test_decisions_that_are_repeated_say_nothing_about_the_speed(place, clock):
    with on_terminal() as terminal, Console("test") as console, console.progress(100) as bar:
        clock.now += 1.0
        bar.skip(50)
        assert shown_seconds(terminal) is None and " 50%|" in terminal.getvalue()
        clock.now += 20.0
        bar.update(10)
        assert shown_seconds(terminal) == 80


def test_a_resumed_run_takes_its_speed_from_its_own_decisions(place, monkeypatch):
    """Not even from the first of them, which waits until all before it are carried out again."""
    base, one, two = make_models(place)
    path = tiny.write_config(place / "my.yaml", base, [one, two], place / "out")
    counted, decided = [], 6

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
    states = re.findall(r"to go, candidate (\d)/2, (layer \d|embedding \+ head), (\d+) accepted", terminal.getvalue())
    parts = ["layer 0", "layer 1", "layer 2", "embedding + head"]
    assert list(dict.fromkeys((turn, part) for turn, part, _ in states)) == [(t, p) for t in "12" for p in parts]
    counts = [int(count) for *_, count in states]
    assert counts == sorted(counts) and counts[-1] == terminal.getvalue().count(" - CHANGED - ") > 0
    assert re.search(r"100%\|[^|\r\n]*\| \S+ elapsed, 00:00 to go, candidate 2/2, embedding", terminal.getvalue())


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
            console.coloured_lines([text])
        assert terminal.getvalue().splitlines() == [seen]
        assert console.log_path.read_text() == "12%\n"


def test_a_question_is_for_a_terminal_that_is_open(place, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stdin", Terminal(" merge-2 \n"))
    with Console("program") as console:
        assert console.ask("Which one?") == "merge-2"
        assert console.ask("Which one?") == ""  # it was closed
        assert console.log_path.read_text().splitlines() == ["Which one?", "merge-2", "Which one?", ""]
    for quiet, stdin in ((True, Terminal("one\n")), (False, io.StringIO("one\n"))):
        monkeypatch.setattr(sys, "stdin", stdin)
        with Console("program", quiet=quiet) as console:
            assert console.ask("Which one?") == "" and stdin.tell() == 0


def test_what_is_no_terminal_gets_neither_bar_nor_colour(place, capsys):
    with Console("test") as console, console.progress(10) as bar:
        bar.tell("told")
        bar.skip(5)
        bar.update(5)
        bar.left(0)
        console.coloured_lines([coloured("12%", 0.5)])
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
from modules.runtime.console import Console, coloured, open_streams
open_streams()
text = "caf\\xe9, \\u65e5\\u672c\\u8a9e, \\U0001f642, \\u0301, \\u2713 \\x1b"
with Console(text) as console, console.progress(2) as bar:
    console.banner(text)
    console.coloured_lines([coloured(text, 0.5)])
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


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_a_question_mark(place, encoding):
    result = narrow(encoding, [sys.executable, "-c", ALL_LINES], place)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    shown = result.stdout.decode(encoding)
    assert shown.count("\u65e5\u672c\u8a9e" if encoding == "utf-8" else "???, ?, ?, ?") == 5
    assert only_log(place).count("\u65e5\u672c\u8a9e, \U0001f642") == 6


# ---------------------------------------------------------------------------------------------------------------------
# What strangers have written
# ---------------------------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;FORGED\x07\x1b[2J\x1b[0m\r\n00:00:00 - Done.\x7f\x85\x9b\u2028\u2029\u202e\u2066\u200b\ufeff\ud800\u200d"


def test_no_character_can_do_more_than_be_seen():
    characters = [chr(number) for number in (*range(0x20000), *range(0xE0000, 0xE0200))]
    seen = [one for one in characters if one.isprintable()]
    assert [visible(one) for one in seen] == seen
    for character in set(characters) - set(seen):
        shown = visible(character)
        assert shown.isascii() and shown.isprintable() and shown[0] == "\\"
    risky = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\u200b\u2028\u2029\u202e\u2066\ufeff\ud800"]
    assert not set(risky) & set(seen)


def test_what_holds_a_letter_together_stays():
    for text in ("\U0001f469\u200d\U0001f680", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "e\u0301"):
        assert visible(text) == text
    assert visible("base\u200d") == "base\\u200d" and visible("a\u200cb") == "a\\u200cb"


@pytest.mark.parametrize("way", ["line", "warning", "error", "ending", "timed", "final", "lines", "coloured", "bug"])
def test_a_strangers_text_is_one_line_without_effect(place, capsys, way):
    ways = {
        "lines": lambda console: console.lines([EVIL]),
        "coloured": lambda console: console.coloured_lines([EVIL.replace("\x1b[0m", "")]),
        "bug": lambda console: console.bug(EVIL, ["Traceback", EVIL]),
    }
    with Console("test") as console:
        ways.get(way, lambda console: getattr(console, way)(EVIL))(console)
    shown = "".join(capsys.readouterr())
    for text in (shown, console.log_path.read_text(encoding="utf-8")):
        lines = text.removesuffix("\n").split("\n")
        assert len(lines) == (3 if way == "bug" and text != shown else 1) and all(line.isprintable() for line in lines)
        assert "\\x1b]0;FORGED\\x07" in text and "\\r\\n00:00:00 - Done." in text


def test_errors_before_there_is_a_log_show_names_as_they_are(place, capsys):
    (place / "bad\n\x1b[2J.yaml").write_text("a\x1b: 1")
    refused = (
        (merge_monster, ["--config", "bad\n\x1b[2J.yaml"]),
        (merge_monster, ["--config", "no\nsuch\x1b.yaml"]),
        (monster_mapper, ["--config", "no\nsuch\x1b.yaml"]),
        (merge_monster, ["--replay", "no\x1b\n.json", "--output", "out"]),
        (merge_monster, ["--compare", "no\x1b\nfolder", "other"]),
        (merge_monster, ["\x1b\nFORGED"]),
        (monster_mapper, ["--top\x1b\nFORGED"]),
    )
    for program, arguments in refused:
        try:
            code = program.main(arguments)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().err
        assert code == 2 and said.replace("\n", "").isprintable(), said
        assert not re.search(r"(?m)^(such|FORGED|folder|\.json)", said), said
    assert not any("\x1b" in file.read_text() for file in (place / "logs").glob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# Streams and logs that fail
# ---------------------------------------------------------------------------------------------------------------------

MANY_LINES = """
import sys
from modules.runtime.console import Console, open_streams
from modules.runtime.program import leave
open_streams()
with Console("test") as console, console.progress(1000) as bar:
    for number in range(1000):
        console.line(f"line {number} {'x' * 100}")
        console.warning("careful")
        bar.update(1)
    console.on_interrupt()
    console.final("over")
leave(0)
"""


@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "2>&1 >&- | true"])
def test_a_run_goes_on_when_it_can_not_show_anything(place, streams):
    script = place / "script.py"
    script.write_text(MANY_LINES)
    command = f'set -o pipefail; "{sys.executable}" "{script}" {streams}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert result.stderr.count("can't print any more") == (streams == ">/dev/full")
    logged = only_log(place).splitlines()
    assert len([line for line in logged if line.startswith("line")]) == 1000 and logged[-1].endswith("over")


def test_every_run_has_a_log_of_its_own(place):
    with ThreadPoolExecutor(32) as pool:
        consoles = list(pool.map(Console, ["test"] * 150))
    for number, console in enumerate(consoles):
        with console:
            console.line(str(number))
    assert [console.log_path.read_text() for console in consoles] == [f"{number}\n" for number in range(150)]


def test_a_full_disk_ends_the_log_and_not_the_run(place, capsys):
    with Console("test", quiet=True) as console:
        console.line("before")
        console._log.close()
        console._log = open("/dev/full", "w")  # noqa: SIM115
        for _ in range(3):
            console.line("during")
        console.final("over")
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and "the log ends here" in shown[0] and str(console.log_path) in shown[0]
    assert shown[1].endswith("over") and console.log_path.read_text() == "before\n"


def test_a_place_without_room_for_a_log_is_named(place, capsys):
    (place / "base").mkdir()
    path = tiny.write_config(place / "my.yaml", place / "base", [place / "base"], place / "out")
    (place / "logs").write_text("a file")
    assert merge_monster.main(["--config", str(path)]) == 2
    assert "can't write the log to logs/ (File exists)" in capsys.readouterr().err
    gone = place / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert merge_monster.main(["--config", str(path)]) == 2
    assert "the current folder no longer exists" in capsys.readouterr().err
    assert merge_monster.main(["--config", str(path), "--output", "out"]) == 2
    assert "--output: 'out': invalid path" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# How a program ends
# ---------------------------------------------------------------------------------------------------------------------


def full(path):
    with naming(path), open("/dev/full", "w") as file:
        file.write("x")


class Panic(BaseException):
    """As a library in Rust raises one: it is no Exception."""


FAILURES = [
    (ConfigError("one", "two"), 2, "ERROR: one\ntwo\n"),
    (CheckpointError("gone"), 1, "ERROR: gone\nkept\n"),
    (ProcessLost("gone"), 1, "ERROR: gone\nkept\n"),
    (FileNotFoundError(2, "No such file", "a\nb"), 1, "ERROR: a\\nb: No such file\nkept\n"),
    (OSError(28, "No room", "a", None, "b"), 1, "ERROR: a -> b: No room\nkept\n"),
    (OSError("odd"), 1, "ERROR: OSError: odd\nkept\n"),
    (lambda: full("here/it.is"), 1, "ERROR: here/it.is: No space left on device\nkept\n"),
    (MemoryError(), 1, "ERROR: out of memory: MemoryError\nkept\n"),
    (torch.OutOfMemoryError("CUDA"), 1, "ERROR: out of memory: OutOfMemoryError: CUDA\nkept\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "out of memory"),
    (ModuleNotFoundError("No module", name="tiktoken"), 1, "the package tiktoken is not installed: pip install"),
    (KeyboardInterrupt(), 130, "Interrupted. kept\n"),
    (ReaderGone(), 141, ""),
    (
        Panic("index out of range\nand more"),
        1,
        "ERROR: internal error: Panic: index out of range; the traceback is in logs/",
    ),
    (RecursionError("too deep"), 1, "ERROR: internal error: RecursionError: too deep; the traceback is in logs/"),
    (KeyError("a\n\x1b"), 1, "ERROR: internal error: KeyError: 'a\\n\\x1b'; the traceback is in logs/"),
    (AssertionError(), 1, "ERROR: internal error: AssertionError: no details"),
]


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("error, code, said", FAILURES, ids=lambda value: getattr(value, "__name__", repr(value))[:30])
def test_every_failure_has_its_message_and_its_code(place, capsys, error, code, said, logged):
    def work():
        if callable(error):
            error()
        raise error

    with Console("test") if logged else Unlogged("test") as console:
        assert exit_code(work, console, lambda: "kept") == code
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown
    logs = "".join(file.read_text() for file in (place / "logs").glob("*")) if (place / "logs").exists() else ""
    assert ("Traceback" in logs) == ("internal error" in said)


@pytest.mark.parametrize("second", [KeyboardInterrupt, OSError, RecursionError])
def test_what_fails_while_a_failure_is_told_is_no_traceback(place, capsys, second):
    def left():
        raise second

    def work():
        with Console("test") as console:
            return exit_code(lambda: int("x"), console, left)

    assert exit_code(work, Unlogged("test")) == (130 if second is KeyboardInterrupt else 1)
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and "internal error: ValueError" in shown


@pytest.mark.parametrize("value", ["x", "-1", "\u0661", "9" * 30, "0"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_an_environment_that_torchrun_did_not_set(name, value):
    if value == "0" and name.endswith("RANK"):
        return
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", name: value}
    with pytest.raises(ConfigError, match=f"{name}={value}.*start with torchrun"):
        find_rank(environment)


SLEEPER = """
import os, select, sys
from modules.runtime.console import Unlogged
from modules.runtime.program import exit_code
from modules.runtime.program import postponed
def work():
    with postponed(lambda: print("heard", flush=True)) as end_if_asked:
        os.write(1, b"ready\\n")  # a print may still be at work when the signal comes, and another print can't begin
        while not select.select([sys.stdin], [], [], 0.05)[0]:
            pass  # a signal that comes just before a read that waits would be told only after it
        end_if_asked()
sys.exit(exit_code(work, Unlogged("test")))
"""


@pytest.mark.parametrize(
    "name, ignored", [("SIGINT", False), ("SIGTERM", False), ("SIGHUP", False), ("SIGINT", True), ("SIGHUP", True)]
)
def test_signals_end_a_run_unless_they_were_ignored_from_the_beginning(place, name, ignored):
    number = getattr(signal, name)
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        heard = "" if ignored else process.stdout.readline()
        out, err = process.communicate("go on\n", timeout=20)
    assert (heard, out, process.returncode) == (("", "", 0) if ignored else ("heard\n", "", 130))
    assert err == ("" if ignored else "Interrupted.\n")
