"""A new output takes the place of an old one: whatever fails or is killed there, a whole output stands afterwards."""

import contextlib
import ctypes
import errno
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import broken_runs
import pytest
import tiny
from broken_runs import RECIPE, end
from runs import digest, make_models

import merge_monster
from modules.output.filesystem import is_mount_point
from modules.output.folder import SETTINGS_FILE, UNFINISHED, OutputFolder, Unfinished, stamp, what_stands
from modules.output.journal import JOURNAL_FILE, open_journal
from modules.runtime.errors import CheckpointError, ConfigError

COMMANDS = ([], ["--overwrite"], ["--dry-run"], ["--replay"])
CALLS = ("rename", "unlink", "remove", "rmdir", "mkdir", "open", "fsync", "scandir", "listdir", "chmod")
OLD = {"merge_ratios": [0.3]}
QUICK = {"merge_method": ["lerp"], "auto_weights": False, "merge_ratios": [0.5]}
QUICK |= {"samples": [], "neutral_texts": [], "baselines": False}


def merge(place, models, *arguments, **settings):
    """A small whole merge."""
    return broken_runs.merge(place, models, *arguments, **{**QUICK, **settings})


class Killed(BaseException):
    """What stands for kill -9: from then on nothing of the process reaches the disk."""


class Trouble:
    """The n-th file call is the last of the process, before or after it is carried out, or fails."""

    def __init__(self, monkeypatch, number, how):
        self.count, self.number, self.how, self.dead = 0, number, how, False
        monkeypatch.setattr(os, "fsync", lambda _: None)  # what it is for can't be seen here, and it takes long
        for name in CALLS:
            monkeypatch.setattr(os, name, self.troubled(getattr(os, name)))
        monkeypatch.setattr(io, "open", self.troubled(io.open))

    def troubled(self, real):
        def call(*args, **kwargs):
            if self.dead:
                raise Killed
            self.count += 1
            if self.count != self.number:
                return real(*args, **kwargs)
            if self.how == "fails":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))
            self.dead = True
            if self.how == "killed after":
                real(*args, **kwargs)
            raise Killed

        return call


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder at the moment at which a new output is about to take the place of an old one: a copy of it beside it."""
    here = tmp_path_factory.mktemp("swap")
    models = make_models(here / "models", shard="60KB")
    commit = OutputFolder.commit

    def copying(self):
        shutil.copytree(here / "place", here / "copy", ignore=shutil.ignore_patterns("*lock*", "logs"))
        commit(self)

    with pytest.MonkeyPatch.context() as patch:
        (here / "place").mkdir()
        patch.chdir(here / "place")
        assert merge(here / "place", models, **OLD) == 0
        old = digest(here / "place/out")
        patch.setattr(OutputFolder, "commit", copying)
        assert merge(here / "place", models, "--overwrite") == 0
    new = digest(here / "place/out")
    shutil.copy(here / "place/out" / RECIPE, here / RECIPE)
    return Bench(here, models, old, new)


class Bench:
    """The folder, and what must be in its outputs."""

    def __init__(self, here, models, old, new):
        self.here, self.models, self.old, self.new = here, models, old, new
        self.place, self.out = here / "place", here / "place/out"
        self.inputs = {folder: digest(folder) for folder in models}

    def restore(self, state=None, first=False):
        """The folder as it was before the swap, or in a state that was found later."""
        shutil.rmtree(self.place)
        if state is None:
            shutil.copytree(self.here / "copy", self.place)
            if first:
                shutil.rmtree(self.out)
            return
        for name, content in state:
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if content is None else path.write_bytes(content)

    def state(self):
        """All that is in the folder, but for logs, locks and what is being removed."""
        found = sorted(
            path for path in self.place.rglob("*") if not re.search(r"logs|lock-merge|old-\w+-merge", str(path))
        )
        names = [(path.relative_to(self.place).as_posix(), path) for path in found]
        return tuple((name, None if path.is_dir() else path.read_bytes()) for name, path in names)

    def at(self, folder):
        """The old or the new output's name, if a folder is one of them, whole and with nothing else in it."""
        found = digest(folder) if folder.is_dir() else {}
        found.pop(UNFINISHED, None)
        return {frozenset(self.old.items()): "old", frozenset(self.new.items()): "new"}.get(frozenset(found.items()))

    def swap(self, place):
        """What a run does at its end."""
        with place.locked(), contextlib.closing(open_journal(place.partial / JOURNAL_FILE)) as journal:
            return Unfinished(place, journal).commit(overwrite=True)

    def command(self, arguments):
        """A whole command for this output."""
        if arguments == ["--replay"]:
            replay = ["--replay", str(self.here / RECIPE), "--source", str(self.here / "models")]
            return merge_monster.main([*replay, "--output", str(self.out)])
        return merge(self.place, self.models, *arguments)

    def troubles(self, work, restore, monkeypatch, hows=("killed before", "killed after", "fails")):
        """The states in which work leaves the folder, whatever happens at any of its file calls, and what it said."""
        for how in hows:
            for number in range(1, 1000):
                restore()
                earlier, said = stamp(self.out), ""
                with monkeypatch.context() as patch:
                    trouble = Trouble(patch, number, how)
                    try:
                        said = f"done {work()}"
                    except Killed:
                        pass
                    except (CheckpointError, ConfigError, OSError) as error:
                        said = str(error)
                if trouble.count < number:
                    break
                yield f"{how}, call {number}", self.state(), said, what_stands(self.out, earlier)


def check_what_is_said(bench, said, stands):
    """What a run says whose output could not take its place, of what is then on the disk."""
    at = bench.at(bench.out)
    if said.startswith("done"):
        assert at == "new"
    elif at == "new":
        assert "The new output in" in stands
    elif at == "old":
        assert "was not changed" in stands
    else:
        assert bench.at(OutputFolder(bench.out).before) == "old" and str(OutputFolder(bench.out).before) in stands


@pytest.fixture
def small(tmp_path):
    """The same folder with outputs of a few small files."""
    for folder, files in {"out": "a", "out.partial": "c"}.items():
        for file in ("sub/x.jinja", SETTINGS_FILE, *files):
            path = tmp_path / "copy" / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{file} of {folder}")
    (tmp_path / "place").mkdir()
    old, new = digest(tmp_path / "copy/out"), digest(tmp_path / "copy/out.partial")
    OutputFolder(tmp_path / "copy/out").mark()
    (tmp_path / "copy/out.partial" / JOURNAL_FILE).write_text('{"kind": "decision"}\n')
    new[JOURNAL_FILE] = hashlib.sha256(b'{"kind": "decision"}\n').hexdigest()
    return Bench(tmp_path, [], old, new)


@pytest.mark.parametrize("first", [False, True], ids=["over an old one", "the first one"])
def test_every_file_call_of_the_swap(small, monkeypatch, first):
    """Killed before it, killed after it, or failing; then the same again for whatever puts that right."""
    bench, place = small, OutputFolder(small.out)
    monkeypatch.chdir(bench.here)
    states, unseen = {}, [None]

    def recover():
        with place.locked():
            place.recover()
            place.cleanup()

    while unseen:
        state = unseen.pop()

        def restore(state=state):
            bench.restore(state, first)

        work = recover if state else (lambda: bench.swap(place))
        hows = ("killed after",) if state else ("killed before", "killed after", "fails")
        for where, found, said, stands in bench.troubles(work, restore, monkeypatch, hows):
            if said and state is None and not first:
                check_what_is_said(bench, said, stands)
            if found not in states:
                states[found] = where
                unseen.append(found)
    assert len(states) >= 3
    for state, where in states.items():
        bench.restore(state)
        recover()
        stands = bench.at(bench.out)
        assert stands or (first and not bench.out.exists()), where
        assert stands == "new" or place.partial.is_dir(), where
        assert not (bench.out / UNFINISHED).exists()


@pytest.fixture(scope="module")
def states(bench):
    """The states in which a real run may leave its output, each with where that was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bench.here)
        runs = bench.troubles(lambda: bench.swap(OutputFolder(bench.out)), bench.restore, patch, ("killed after",))
        return {state: where for where, state, _, _ in runs}


@pytest.mark.parametrize("arguments", ([], ["--dry-run"], ["--replay"]), ids=str)
def test_every_command_after_every_state_of_the_swap(bench, states, monkeypatch, capsys, arguments):
    for state, where in states.items():
        bench.restore(state)
        monkeypatch.chdir(bench.place)
        code = bench.command(arguments)
        told = capsys.readouterr()
        assert code in (0, 2) and "Traceback" not in told.err, (where, told.err)
        assert bench.at(bench.out), (where, told)
        if arguments == ["--dry-run"]:  # what is there may be renamed, and a mark removed; nothing else is
            before, after = (
                Counter(text for name, text in one if UNFINISHED not in name) for one in (state, bench.state())
            )
            assert before - Counter([None] * 2) <= after, where
        assert bench.inputs == {folder: digest(folder) for folder in bench.models}, where


def test_a_run_goes_on_from_every_state_of_the_swap(bench, states, monkeypatch):
    for state, where in states.items():
        bench.restore(state)
        monkeypatch.chdir(bench.place)
        assert merge(bench.place, bench.models, "--overwrite", "--resume") == 0
        ours = digest(bench.out)
        assert all(ours[name] == bench.new[name] for name in ours if name.endswith(".safetensors")), where
        assert {path.name for path in bench.place.iterdir()} == {"logs", "my.yaml", "out"}, where


@pytest.mark.sampled(4)
@pytest.mark.parametrize("arguments", COMMANDS, ids=str)
def test_a_real_kill_between_the_renames(bench, monkeypatch, arguments):
    """And somebody makes the folder that is missing since."""
    bench.restore()
    monkeypatch.chdir(bench.place)
    dying = {"before": lambda: dies_between(bench.out), **QUICK}
    child = broken_runs.start(bench.place, bench.models, "--overwrite", "--resume", **dying)
    assert end(child) == -signal.SIGKILL
    assert not bench.out.exists() and bench.at(OutputFolder(bench.out).before) == "old"
    bench.out.mkdir()
    assert bench.command(arguments) in (0, 2)
    assert bench.at(bench.out) == "old"


def dies_between(out):
    rename = os.rename

    def renamed(source, target, *args, **kwargs):
        rename(source, target, *args, **kwargs)
        if Path(source) == out:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = renamed


def test_a_signal_while_the_output_takes_its_place_waits(bench, monkeypatch):
    bench.restore()
    monkeypatch.chdir(bench.place)
    rename = os.rename

    def signalling(source, target, *args, **kwargs):
        rename(source, target, *args, **kwargs)
        if Path(source) == bench.out:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "rename", signalling)
    assert merge(bench.place, bench.models, "--overwrite", "--resume") == 0
    assert OutputFolder(bench.out).before.exists() is False and digest(bench.out).keys() == bench.new.keys()


def test_something_else_in_the_place_of_an_output_that_is_aside(bench, monkeypatch, capsys):
    bench.restore()
    monkeypatch.chdir(bench.place)
    bench.out.rename(OutputFolder(bench.out).before)
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("years of work")
    for arguments in COMMANDS:
        assert bench.command(arguments) == 2
        assert f"{OutputFolder(bench.out).before} holds the earlier output, but {bench.out}" in capsys.readouterr().err
    assert (bench.out / "thesis.tex").exists() and bench.at(OutputFolder(bench.out).before) == "old"


def test_what_cannot_be_removed_is_named(bench, monkeypatch, capsys):
    bench.restore()
    monkeypatch.chdir(bench.place)
    stuck, unlink = os.stat(bench.out / "config.json").st_ino, os.unlink

    def refusing(path, *args, **kwargs):
        if os.stat(path, follow_symlinks=False, **kwargs).st_ino == stuck:
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing)
        assert merge(bench.place, bench.models, "--overwrite", "--resume") == 0
        (left,) = bench.place.glob(".out.old-*-merge-monster")
        assert f"can't remove an earlier output (Operation not permitted): {left}" in read(capsys)
        assert merge(bench.place, bench.models, "--overwrite", **OLD) == 0  # and it is in nobody's way
        assert str(left) in read(capsys)
    assert merge(bench.place, bench.models, "--overwrite", **OLD) == 0
    assert not left.exists()


def read(capsys):
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_a_replay_that_was_killed_can_be_repeated(bench, monkeypatch):
    bench.restore()
    shutil.rmtree(bench.out)
    shutil.rmtree(bench.place / "out.partial")
    monkeypatch.chdir(bench.place)
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "mark", lambda self: (_mark(self), os._exit(9))[0])
        child = os.fork()
        if not child:
            bench.command(["--replay"])
        assert end(child) == 9
    assert (bench.place / "out.partial").is_dir()
    assert bench.command(["--replay"]) == 0
    assert bench.at(bench.out) is None and digest(bench.out).keys() == bench.new.keys() - {JOURNAL_FILE}


_mark = OutputFolder.mark


@pytest.mark.parametrize("finished", ["base", "candidate", "in model_directory"])
def test_a_finished_output_that_is_called_partial_is_nobodys_unfinished_run(bench, monkeypatch, capsys, finished):
    bench.restore()
    monkeypatch.chdir(bench.place)
    shutil.rmtree(bench.place / "out.partial")
    theirs = bench.out.rename(bench.place / "x.partial")
    base, one, _ = bench.models
    before = digest(theirs)
    settings, models = {}, {"base": (theirs, one), "candidate": (base, theirs), "in model_directory": (base,)}[finished]
    if finished == "in model_directory":
        directories = {"model_path1": str(base), "output_directory": "x", "model_directory": str(bench.place)}
        settings = {"directories": directories, "models_to_merge": []}
    path = tiny.write_config(bench.place / "my.yaml", models[0], models[1:], bench.place / "x", **settings)
    for arguments in ([], ["--overwrite"], ["--restart"]):
        shutil.rmtree(bench.place / "logs", ignore_errors=True)  # else it would be a model of model_directory
        assert merge_monster.main(["--config", str(path), *arguments]) == 2
        assert "x.partial" in capsys.readouterr().err
    assert digest(theirs) == before


@pytest.mark.parametrize("what", ["copy", "link to a file", "link to the folder", "a folder within", "the settings"])
def test_an_output_that_would_take_an_input_along(bench, monkeypatch, capsys, what):
    """A base that is an earlier output, or is made of links into one; an output within a model; settings within it."""
    bench.restore()
    monkeypatch.chdir(bench.place)
    base, one, _ = bench.models
    output, before = bench.out, digest(bench.out)
    ours = Path(shutil.copytree(base, bench.place / "base"))
    if what == "copy":
        output = ours
    elif what == "link to a file":
        (ours / "config.json").unlink()
        (ours / "config.json").symlink_to(bench.out / "config.json")
    elif what == "link to the folder":
        shutil.rmtree(ours)
        ours.symlink_to(bench.out)
    elif what == "a folder within":
        output = ours / "deep" / "out"
    path = tiny.write_config((output if what == "the settings" else bench.place) / "my.yaml", ours, [one], output)
    assert merge_monster.main(["--config", str(path), "--overwrite"]) == 2
    assert "this run would write " in capsys.readouterr().err
    (bench.out / "my.yaml").unlink(missing_ok=True)
    assert digest(bench.out) == before


def test_a_log_does_not_go_into_a_model(bench, monkeypatch, capsys):
    bench.restore()
    ours = Path(shutil.copytree(bench.models[0], bench.place / "base"))
    before = digest(ours)
    monkeypatch.chdir(ours)
    assert merge(bench.place, (ours, *bench.models[1:])) == 2
    assert "logs, which lies in the input" in capsys.readouterr().err
    assert digest(ours) == before


def test_a_mount_point_is_refused_before_the_search(bench, monkeypatch, capsys):
    bench.restore()
    monkeypatch.chdir(bench.place)
    before = bench.state()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == bench.out)
    for arguments in COMMANDS:
        assert bench.command(arguments) == 2
        assert "use a folder in it" in capsys.readouterr().err
    assert bench.state() == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="mounting needs root")
def test_volumes_and_bound_folders_and_files_are_mount_points(place):
    for name in ("volume", "folder", "other"):
        (place / name).mkdir()
    (place / "file").write_text("")
    child = os.fork()
    if not child:
        try:
            os._exit(mounted(place))
        finally:
            os._exit(1)
    code = end(child)
    if code == 77:
        pytest.skip("nothing can be mounted here")
    assert code == 0


def mounted(place):
    """Mount a volume, a folder and a file for this process alone: 0 if these, and no others, are found."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        return 77
    commands = (
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "none", place / "volume"],
        ["mount", "--bind", place / "other", place / "folder"],
        ["mount", "--bind", place / "file", place / "file"],
    )
    if any(subprocess.run(command, capture_output=True).returncode for command in commands):
        return 77
    found = {path.name for path in place.iterdir() if is_mount_point(path)}
    return 0 if found == {"volume", "folder", "file"} else 2


def test_a_file_system_without_locks_rights_or_sync_of_folders(bench, monkeypatch, capsys):
    """They are missed, and the merge is finished."""
    bench.restore()
    shutil.rmtree(bench.out)
    shutil.rmtree(bench.place / "out.partial")
    monkeypatch.chdir(bench.place)
    fcntl = pytest.importorskip("fcntl")

    def lacking(number):
        def refuse(*_, **__):
            raise OSError(number, os.strerror(number))

        return refuse

    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOLCK))
    monkeypatch.setattr(os, "chmod", lacking(errno.EPERM))
    sync = os.fsync
    is_folder = lambda file: os.path.isdir(f"/proc/self/fd/{file}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda file: lacking(errno.EINVAL)() if is_folder(file) else sync(file))
    assert merge(bench.place, bench.models) == 0
    told = read(capsys)
    assert f"WARNING: the file system of {bench.place} has no locks" in told
    assert all(digest(bench.out)[n] == h for n, h in bench.new.items() if n.endswith(".safetensors"))


def test_a_file_system_on_which_nothing_can_be_renamed_is_refused_before_the_search(bench, monkeypatch, capsys):
    bench.restore()
    shutil.rmtree(bench.out)
    shutil.rmtree(bench.place / "out.partial")
    monkeypatch.chdir(bench.place)

    def refuse(source, *_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "rename", refuse)
    for arguments in ([], ["--dry-run"]):
        assert merge(bench.place, bench.models, *arguments) == 2
        assert "can't write" in read(capsys)
    with contextlib.suppress(FileNotFoundError):
        assert sorted(path.name for path in bench.place.iterdir()) == ["logs", "my.yaml"]
