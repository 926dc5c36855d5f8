"""A read that fails is never taken for content: of every file of a candidate, at every call, passing or for good."""

import contextlib
import errno
import io
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from adapters import make_adapter
from runs import log_of
from safetensors.torch import load_file

import merge_monster
from modules.checkpoints.checkpoint import load_tokenizer
from modules.checkpoints.open_models import open_models
from modules.config.load import load_config
from modules.model.embeddings import aligned_header
from modules.model.loading import load_model
from modules.output.run_record import RunRecord
from modules.runtime.errors import CheckpointError, ConfigError
from modules.search.search import Search


class Unreadable(io.FileIO):
    """Can be opened, and not read."""

    def readinto(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)

    readall = read = readinto


class Disk:
    """Every call that opens, reads or looks at a file of one folder; some of them fail."""

    def __init__(self, folder, fails=lambda number, how: False):
        self.folder, self.fails, self.calls = str(folder), fails, []
        self.open, self.stat = io.open, os.stat

    def refuses(self, path, how):
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.folder + os.sep):
            return False
        self.calls.append((how, Path(path).name))
        return self.fails(len(self.calls) - 1, how)

    def opening(self, path, mode="r", *more, **named):
        if self.refuses(path, "open"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if "r" in mode and self.refuses(path, "read"):
            raw = io.BufferedReader(Unreadable(str(path)))
            return raw if "b" in mode else io.TextIOWrapper(raw)
        return self.open(path, mode, *more, **named)

    def looking(self, path, **named):
        if self.refuses(path, "stat"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return self.stat(path, **named)

    @contextlib.contextmanager
    def __call__(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(io, "open", self.opening)
            patch.setattr("builtins.open", self.opening)
            patch.setattr(os, "stat", self.looking)
            yield self


def one_with_everything(folder, models):
    """A candidate in shards, with a chat template, special tokens of its own and a licence."""
    tiny.make_model(
        folder, tiny.llama_config(len(tiny.bpe_tokenizer())), tiny.bpe_tokenizer(eos="<s>"), 3, shard="60KB"
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("You may.")
    return folder


def an_adapter(folder, models):
    """One that brings the vocabulary's rows and its own tokenizer."""
    adapter, _ = make_adapter(folder, models[0], modules_to_save=["embed_tokens", "lm_head"])
    tiny.bpe_tokenizer().save_pretrained(adapter)
    return adapter


def outcome(config, base):
    """What becomes of a candidate's header, with all that precedes it: its tensors and what is said of it."""
    (candidate,) = open_models(config, lambda job: None).candidates
    candidate.checkpoint.fingerprint()
    layer = candidate.read(base.layer(0).tensors)
    header, note = aligned_header(base, load_tokenizer(base.checkpoint.path), candidate)
    return {**layer, **header}, note


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["the last", "every one"])
@pytest.mark.parametrize("make", [one_with_everything, an_adapter], ids=["model", "adapter"])
def test_a_call_fails_once(place, models, make, every):
    """Of each kind and each file the last call, which is the one that nothing comes after, or every one."""
    folder = make(place / "one", models)
    path = tiny.write_config(place / "my.yaml", models[0], [folder], place / "out")
    config = load_config(path)
    base = load_model(open_models(config, lambda job: None).base, "cpu", "auto")
    with Disk(folder)() as disk:
        tensors, note = outcome(config, base)
    assert {name for _, name in disk.calls} >= {"tokenizer.json", "tokenizer_config.json"}
    harmless, last = [], {call: number for number, call in enumerate(disk.calls)}
    for number, (how, name) in enumerate(disk.calls):
        if not every and last[how, name] != number:
            continue
        try:
            with Disk(folder, lambda n, _, bad=number: n == bad)():
                again, other_note = outcome(config, base)
        except (CheckpointError, ConfigError, OSError) as error:
            assert name in str(error) and "Input/output error" in str(error), (how, name, str(error))
        else:
            assert other_note == note and all(torch.equal(again[key], tensors[key]) for key in tensors)
            harmless.append((how, name))
    assert len(set(harmless)) < len(last) / 3, harmless


def test_a_candidate_is_not_skipped_while_its_merges_are_made_again(place, models, capsys, monkeypatch):
    """The recipe would tell of merges that the output does not have."""
    path = tiny.write_config(place / "my.yaml", models[0], models[1:2], place / "out", on_error="skip")
    record_end, count = RunRecord.decided, []

    def killed(self, *arguments, **fields):
        record_end(self, *arguments, **fields)
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunRecord, "decided", killed)
    assert merge_monster.main(["--config", str(path)]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(place)
    disk = Disk(models[1], lambda number, how: disk.calls[number] == ("read", "model.safetensors"))
    fails, disk.fails = disk.fails, lambda number, how: False
    repeat = Search.repeat

    def broken(self, *arguments):
        disk.fails = fails
        return repeat(self, *arguments)

    monkeypatch.setattr(Search, "repeat", broken)
    with disk():
        assert merge_monster.main(["--config", str(path), "--resume"]) == 1
    assert "can't be skipped" in capsys.readouterr().err


@pytest.mark.parametrize(("on_error", "file"), [("stop", "tokenizer.json"), ("skip", "tokenizer_config.json")])
def test_a_tokenizer_that_can_not_be_read_when_its_turn_comes(place, models, capsys, monkeypatch, on_error, file):
    one = Path(shutil.copytree(models[1], place / "one"))
    settings = {"on_error": on_error, "merge_ratios": [0.5]}
    path = str(tiny.write_config(place / "my.yaml", models[0], [one], place / "out", **settings))
    disk, search = Disk(one), Search.candidate

    def broken(self, *arguments):
        """All goes well until the search begins."""
        disk.fails = lambda number, how: disk.calls[number] == ("open", file)
        return search(self, *arguments)

    monkeypatch.setattr(Search, "candidate", broken)
    with disk():
        code = merge_monster.main(["--config", path])
    words = f"{one / file}: can't be read (Input/output error)"
    if on_error == "skip":
        assert code == 0 and f"Skipping the rest of one; its merges so far are kept: {words}" in log_of(place)
        return
    assert code == 1 and words in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert merge_monster.main(["--config", path, "--resume"]) == 0
    good = str(tiny.write_config(place / "my.yaml", models[0], [models[1]], place / "good", **settings))
    assert merge_monster.main(["--config", good]) == 0
    ours, theirs = (load_file(place / name / "model.safetensors") for name in ("out", "good"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
