"""What differs where a run goes on, or is carried out again: its version, its settings, the files of its models.

Knows: which settings can change a result. Refuses to know: how a run goes on.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from modules.checkpoints import Checkpoint, candidate_sources, dtype_name
from modules.config import (
    NO_PART,
    PHRASES,
    VERSION,
    Config,
    Directories,
    Location,
    Settings,
    parse_source,
    read_neutral_texts,
)
from modules.model import resolve_device
from modules.output.journal import Journal
from modules.output.public import relative
from modules.output.records import FORMAT, Run, Source
from modules.runtime import ConfigError

_DTYPES = "dtype", "compute_dtype"
_HINT = "use what it was begun with, or begin again with --restart"


def run_of(config: Config, computed: str | None = None) -> Run:
    """What the journal says of a run that begins here and now. computed: what it computes in."""
    pairs = {key: [pair.written() for pair in getattr(config, key)] for key in (*PHRASES, "held_out_pairs")}
    settings = json.loads(json.dumps({**asdict(config), **pairs}))  # as they will be when they are read again
    text = settings.pop("text")
    here = {
        "device": resolve_device(config.device).type,
        "folder": relative("", config.directories.output_directory),
        "computed": computed,
    }
    if config.is_guarded:
        texts = json.dumps(read_neutral_texts(config.neutral_texts))
        here["neutral"] = hashlib.sha256(texts.encode()).hexdigest()
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Run(format=FORMAT, program=VERSION, settings=settings, config=text, **here, libraries=libraries)


def refuse_other_version(begun: Mapping[str, Any], now: Run, path: Path) -> None:
    """Raise ConfigError if another version of the program has begun the run.

    begun: its first line as it was found: of another version's no more is known than that there are these keys.
    """
    for key, what in (("format", "another version of journals"), ("program", "Merge Monster")):
        if begun.get(key) != getattr(now, key):
            raise ConfigError(f"{path} was begun by {what} {begun.get(key)}, this is {getattr(now, key)}; {_HINT}")


def refuse_changes(begun: Run, now: Run, base: Checkpoint, journal: Journal) -> None:
    """Raise ConfigError if a setting that can change the result is another one than when the run began."""
    try:
        changed = changes_between(begun, now, base)
        before, after = begun.settings.written(), now.settings.written()
    except ValueError:  # a path that can be none
        raise journal.damaged(1) from None
    if changed:
        details = "; ".join(_change(key, before.get(key), after.get(key)) for key in changed)
        raise ConfigError(f"the configuration has changed since {journal.path} was begun: {details}; {_HINT}")


def compare_fingerprints(noted: Source, checkpoint: Checkpoint, trouble: str) -> None:
    """Raise ConfigError, naming the first file that differs, if a source is not what was noted.

    trouble: what that means, to be said of the file.
    """
    now = checkpoint.fingerprint()
    for file in sorted(now.keys() | noted.fingerprint.keys()):
        if now.get(file) != noted.fingerprint.get(file):
            raise ConfigError(f"{checkpoint.path}: {file} {trouble}")


def changes_between(begun: Run, now: Run, base: Checkpoint | None = None) -> list[str]:
    """The keys in which two runs' settings differ in what they mean for the search, in alphabetical order.

    Raises ValueError for settings that can be none.
    """
    same = {key for key in ("device", *_DTYPES) if getattr(begun.settings, key) == getattr(now.settings, key)}
    output = os.path.realpath(os.path.expanduser(now.settings.directories.output_directory))
    one, other = (_meaning(run, output, same, base) for run in (begun, now))
    # A key that only one of them has is ruled by another one, in which they differ.
    return sorted(key for key in one.keys() & other.keys() if one[key] != other[key])


def _meaning(run: Run, output: str, same: Collection[str], base: Checkpoint | None) -> dict[str, Any]:
    """What decides the result of a search, by key, in one spelling.

    output: from which on it is said where the run was started. same: keys that are spelt the same in both runs; if they
    mean something else on this machine, a warning says so.
    """
    settings, given = run.settings, run.settings.directories
    # What an older run lacks is off.
    known = {**{key.name: key.default for key in fields(Settings)}, **settings.written()}
    told = {key: value for key, value in known.items() if key not in NO_PART}
    # Journals of before name no folder, or a whole path.
    folder = os.path.normpath(os.path.join(output, os.path.expanduser(run.folder))) if run.folder else ""
    all_in = given.model_directory and os.path.join(folder, os.path.expanduser(given.model_directory))
    texts = [_found_from(folder, text) for text in (given.model_path1, *settings.models_to_merge)]
    directories = Directories(given.model_path1, given.output_directory, all_in)
    candidates, _ = candidate_sources(Config(directories, models_to_merge=tuple(texts[1:])))
    base_source = parse_source(texts[0])
    told["directories"] = base_source and _identity(base_source.places)
    told["models_to_merge"] = [_identity(source.places) for source in candidates]
    if settings.tokenizer:
        told["tokenizer"] = os.path.realpath(os.path.join(folder, os.path.expanduser(settings.tokenizer)))
    if settings.strategy != "quantitive":
        del told["strategy_threshold"]
    if told["search"] != "joint":
        del told["joint"]
    if run.neutral:
        told["neutral_texts"] = run.neutral
    else:
        del told["neutral_tokens"]
    if "device" not in same:
        told["device"] = _device_type(run)
    if base is not None and not same.issuperset(_DTYPES):
        saved, computed = _dtype_saved(run, base), computed_in(run, base)
        told |= {key: [saved, computed] for key in _DTYPES if key not in same}
    return told


def _found_from(folder: str, text: str) -> str:
    """A model's name as it can be read from anywhere, as far as it is that of folders and files."""
    path = os.path.join(folder, os.path.expanduser(text))
    if os.path.exists(path) or "+" not in text:
        return path if os.path.exists(path) else text
    return "+".join(_found_from(folder, part.strip()) for part in text.split("+"))


def _identity(places: Sequence[Location]) -> list[str]:
    return [str(one.folder.resolve()) if one.folder else f"{one.repo}@{one.revision or 'main'}" for one in places]


def _dtype_saved(run: Run, base: Checkpoint) -> str:
    """What all tensors are saved in, or "auto": what the base stores."""
    stored = {dtype_name(info.dtype) for info in base.tensors.values() if info.dtype.is_floating_point}
    return "auto" if stored == {run.settings.dtype} else run.settings.dtype


def computed_in(run: Run, base: Checkpoint) -> str:
    """The dtype that a run computes in, by its name. One that has not noted it goes by the rule of its time: half types
    as they are stored, but on a CPU float16 in float32."""
    named = run.settings.dtype
    if run.computed or named != "auto":
        return run.computed or named
    if base.main_dtype() == torch.bfloat16:
        return "bfloat16"
    return "float32" if _device_type(run) == "cpu" else "float16"


def _device_type(run: Run) -> str:
    """The kind of device that a run computes on."""
    named = run.settings.device
    return run.device or (resolve_device(named).type if named == "auto" else named.partition(":")[0])


def _change(key: str, before: Any, after: Any) -> str:
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, after)]
    told = texts[0] != texts[1] and max(map(len, texts)) <= 60
    return f"{key} was {texts[0]}, is {texts[1]}" if told else f"{key} is not the same"
