"""What differs between the settings of an unfinished run and those that would go on with it.

Knows: which settings can change a result. Refuses to know: how a run goes on.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from modules.checkpoints import Checkpoint, candidate_sources
from modules.config import NO_PART, Config, Directories, Source, parse_source
from modules.model import resolve_device, resolve_dtype
from modules.output.journal import Record
from modules.runtime import ConfigError

_HINT = "use what it was begun with, or begin again with --restart"


def refuse_other_version(begun: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError if another version of the program has begun the run."""
    for key, what in (("format", "another version of journals"), ("program", "Merge Monster")):
        if begun.get(key) != now[key]:
            raise ConfigError(f"{path} was begun by {what} {begun.get(key)}, this is {now[key]}; {_HINT}")


def refuse_changes(begun: Mapping[str, Any], now: Mapping[str, Any], base: Checkpoint, path: Path) -> None:
    """Raise ConfigError if a setting that can change the result is another one than when the run began."""
    try:
        changed = changes_between(begun, now, base)
    except NOT_SETTINGS:
        raise ConfigError(f"{path}: line 1 is damaged; begin again with --restart") from None
    if changed:
        details = "; ".join(_change(key, begun["settings"].get(key), now["settings"].get(key)) for key in changed)
        raise ConfigError(f"the configuration has changed since {path} was begun: {details}; {_HINT}")


NOT_SETTINGS = (KeyError, TypeError, AttributeError, ValueError)  # what damaged ones make of those who read them


def changes_between(begun: Record, now: Record, base: Checkpoint | None = None) -> list[str]:
    """The keys in which two runs' settings differ in what they mean for the search, in alphabetical order.

    begun, now: settings and, if known, the device that was meant and the folder where relative paths begin.
    """
    same = {key for key in ("device", "dtype") if begun["settings"][key] == now["settings"][key]}
    one, other = (_meaning(run, same, base) for run in (begun, now))
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _meaning(run: Record, same: Collection[str], base: Checkpoint | None) -> Record:
    """What decides the result of a search, by key, in one spelling.

    same: keys that are spelt the same in both runs; if they mean something else on this machine, a warning says so.
    """
    settings, folder = run["settings"], run.get("folder", "")
    told = {key: value for key, value in settings.items() if key not in NO_PART}
    directories = dict(settings["directories"])
    if directories["model_directory"] is not None:
        directories["model_directory"] = os.path.join(folder, directories["model_directory"])
    texts = [_found_from(folder, text) for text in (directories["model_path1"], *settings["models_to_merge"])]
    candidates, _ = candidate_sources(Config(Directories(**directories), models_to_merge=tuple(texts[1:])))
    base_source = parse_source(texts[0])
    told["directories"] = base_source and _identity(base_source)
    told["models_to_merge"] = [_identity(source) for source in candidates]
    if settings["strategy"] != "quantitive":
        del told["strategy_threshold"]
    device = run.get("device") or _device_meant(settings["device"])
    if "device" not in same:
        told["device"] = device
    if "dtype" not in same and base is not None:
        told["dtype"] = _dtype_meant(settings["dtype"], base, device)
    return told


def _found_from(folder: str, text: str) -> str:
    """A model's name as it can be read from anywhere, if it is that of a folder."""
    path = os.path.join(folder, os.path.expanduser(text))
    return path if os.path.isdir(path) else text


def _identity(source: Source) -> list[str]:
    places = (place for place in (source.model, source.adapter) if place)
    return [
        str(place.folder.resolve()) if place.folder else f"{place.repo}@{place.revision or 'main'}" for place in places
    ]


def _device_meant(name: str) -> str:
    return resolve_device(name).type if name == "auto" else name.partition(":")[0]


def _dtype_meant(name: str, base: Checkpoint, device: str) -> list[str]:
    """What is computed in and, if it is not what the base stores, what is saved."""
    compute = str(resolve_dtype(name, base.main_dtype(), torch.device(device)))
    stored = {str(info.dtype) for info in base.tensors.values() if info.dtype.is_floating_point}
    return [compute, "stored" if name == "auto" or stored == {compute} else compute]


def _change(key: str, before: Any, after: Any) -> str:
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, after)]
    told = texts[0] != texts[1] and max(map(len, texts)) <= 60
    return f"{key} was {texts[0]}, is {texts[1]}" if told else f"{key} is not the same"
