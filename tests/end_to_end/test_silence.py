"""Whatever takes its time has a line or a bar before it begins."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
import tiny
from project import ROOT, environment
from runs import merge

import merge_monster

SILENCE = 2.0  # seconds of which nobody would know what is done
ANNOUNCED = re.compile(
    r"Reading \d+ outputs?|.* - THE MERGE MONSTER HUNGERS|\d\d:\d\d:\d\d - "
    r"(Rebuilding|Mapping|Counting|Loading|Scoring|Measuring|Evaluating|Generating|Candidate|Model|Saving|Writing|"
    r"Comparing|Starting from) ?.*"
)


@pytest.mark.parametrize(
    "arguments, title",
    [
        (["merge_monster.py", "--config", "my.yaml"], "THE MERGE MONSTER HUNGERS"),
        (["merge_monster.py", "--replay", "out", "--output", "again"], "Rebuilding the model of out"),
        (["monster_mapper.py", "--config", "my.yaml", "--rate", "one"], "Counting phrases"),
    ],
)
def test_the_first_line_does_not_wait_for_pytorch(place, models, arguments, title):
    """Whose import takes seconds: here it fails."""
    base, one, two = models
    tiny.write_config(place / "my.yaml", base, [two], place / "out")
    (place / "one").symlink_to(one)
    (place / "absent").mkdir()
    for package in ("torch", "transformers"):
        (place / f"absent/{package}.py").write_text(f"raise ModuleNotFoundError('', name={package!r})")
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": "absent"}, capture_output=True, text=True)
    assert result.returncode == 1 and "is not installed" in result.stderr
    *_, first, second = result.stdout.splitlines()
    assert first.endswith(f" - {title}") and second.endswith(" - Loading PyTorch")


def test_outputs_that_are_compared_are_read_with_a_line_on_a_terminal_only(place, models, capsys):
    assert merge(place, models) == 0
    capsys.readouterr()
    assert merge_monster.main(["--compare", "out"]) == 0
    shown, told = capsys.readouterr()
    assert told == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with contextlib.redirect_stderr(terminal):
        assert merge_monster.main(["--compare", "out"]) == 0
    assert (capsys.readouterr().out, terminal.getvalue()) == (shown, "Reading 1 output\n")


def heard(place, *arguments):
    """What a program sends a terminal, in parts, each with the seconds that it was waited for."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # a new one has no columns
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=place, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    parts, before = [], time.monotonic()
    with contextlib.suppress(OSError):  # how Linux says that the other side has closed
        while part := os.read(ours, 65536):
            parts.append((time.monotonic() - before, part.decode("utf-8", "replace")))
            before = time.monotonic()
    os.close(ours)
    assert process.wait() == 0, parts
    return parts


def unannounced(parts):
    """The silences before which there was neither a bar nor a line that says what takes so long."""
    text, found = "", []
    for seconds, part in parts:
        last = re.split(r"[\r\n]+", text.rstrip())[-1]
        if seconds > SILENCE and "%|" not in last and not ANNOUNCED.fullmatch(last):
            found.append((round(seconds, 1), last, part))
        text += part
    return found


def test_a_silence_would_be_found():
    line, bar = "09:06:37 - Loading base\r\n", "\r 41%|####    | 12:20 elapsed, 17:45 to go"
    assert not unannounced([(SILENCE, line), (9, "Device: cpu\r\n"), (SILENCE, bar), (9, "\r\n")])
    assert unannounced([(9, line), (9, "Device: cpu\r\n"), (9, bar)]) == [(9, "", line), (9, "Device: cpu", bar)]


@pytest.mark.slow
def test_no_silence_in_any_command(place):
    tokenizer = tiny.TOKENIZERS["bpe"]()
    shape = tiny.llama_config(len(tokenizer), layers=8, hidden=512, positions=1024)
    base = tiny.make_model(place / "base", shape, tokenizer, scale=1.0)
    one = tiny.make_candidate(place / "one", base, 1)
    settings = {"baselines": True, "samples": None, "neutral_texts": None, "merge_ratios": [0.5]}
    settings["discover"] = {"samples": 1, "tokens": 40, "prompts": "prompts.txt"}
    settings["held_out_files"] = ["held.yaml"]
    (place / "prompts.txt").write_text("Her voice\nThe apple\n")
    (place / "held.yaml").write_text("bad_phrases: [{phrase: spine, contexts: ['It sent shivers down her ']}]")
    my = tiny.write_config(place / "my.yaml", base, [one], "out", **settings)
    merges, maps = ROOT / "merge_monster.py", ROOT / "monster_mapper.py"
    waited = 0.0
    for command in (
        (merges, "--config", my),
        (merges, "--config", my, "--set", "search=joint", "--set", "joint.steps=2", "--output", "joint"),
        (merges, "--config", my, "--output", "other", "--dry-run"),
        (merges, "--config", my, "--score", one),
        (merges, "--compare", "out", "joint"),
        (merges, "--replay", "joint", "--output", "again"),
        (merges, "--export-mergekit", "merge.yaml", "out"),
        (maps, "--config", my),
        (maps, "--config", my, "--rate", one),
    ):
        parts = heard(place, *command)
        assert not unannounced(parts), command
        waited = max(waited, *(seconds for seconds, _ in parts))
    assert waited > SILENCE, "nothing took its time"
