"""Runs of the whole program in this process, and what they leave: its log, its tables, its files."""

import hashlib
import math
import shutil

import tiny
import torch
from safetensors import safe_open

import merge_monster


def make_models(folder, dtype=torch.float32, family="bpe", shard=None, tied=False):
    tokenizer = tiny.TOKENIZERS[family]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = tiny.llama_config(len(tokenizer), tied=tied)
    base = tiny.make_model(folder / "base", config, tokenizer, dtype=dtype, shard=shard)
    return base, tiny.make_candidate(folder / "one", base, 1), tiny.make_candidate(folder / "two", base, 2)


def merge(place, models, *arguments, **settings):
    """Run the program in this process; its exit code."""
    base, *candidates = models
    path = tiny.write_config(place / "my.yaml", base, candidates, place / "out", **settings)
    return merge_monster.main(["--config", str(path), *arguments])


def log_of(place):
    logs = sorted((place / "logs").glob("merge-monster-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return logs[-1].read_text(encoding="utf-8")


def tables(log):
    """The rows of every phrase table in a log: lists of (type, phrase, context, raw, used, change)."""
    found, rows = [], []
    for line in log.splitlines():
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif line.startswith("* "):
            found.append(rows[1:])
            rows = []
    return found


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


def stored(folder):
    """Every tensor's dtype and shape, by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                view = shard.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    return found


def sizes(folder, layers=3):
    """How many weights a model has in each layer, in the header and in what is neither."""
    found = [0] * (layers + 2)
    for name, (_, shape) in stored(folder).items():
        place = int(name.split(".")[2]) if ".layers." in name else layers + ("embed" not in name and "head" not in name)
        found[place] += math.prod(shape)
    return found


def refused(place, models, capsys, words, *arguments, code=2, **settings):
    """The run is refused with one readable line and leaves nothing behind."""
    before = {folder: digest(folder) for folder in models}
    assert merge(place, models, *arguments, **settings) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in [words] if isinstance(words, str) else words:
        assert word in message
    assert not (place / "out").exists()
    if (place / "out.partial").exists():  # a run that has decided something keeps it, and nothing else
        assert code == 1 and "--resume" in message
        kept = {path.name for path in (place / "out.partial").iterdir()}
        assert kept == {"merge_monster_journal.jsonl", "merge_monster_unfinished.txt"}
        shutil.rmtree(place / "out.partial")
    assert before == {folder: digest(folder) for folder in models}
