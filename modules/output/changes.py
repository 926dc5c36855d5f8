"""Checks what must not change when a run is resumed or repeated: the version, the settings, the models' files.

Knows: which settings can change a result, how they are recorded without paths. Refuses to know: how a run is resumed.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.open_models import candidate_sources
from modules.config.inputs import read_neutral_texts, read_prompts
from modules.config.locations import parse_source
from modules.config.phrase_lists import Chat
from modules.config.schema import NO_PART, VERSION, Config, Directories
from modules.model.devices import resolve_device
from modules.output.records import FORMAT, Run, Source
from modules.runtime.errors import ConfigError

_HINT = "undo the change, or start over with --restart"


def run_of(config: Config, computed: str) -> Run:
    """The journal's first line of a run that begins now. computed: the name of its arithmetic."""
    digest = None
    if config.is_guarded:
        prompts = [] if config.own_texts == () else read_prompts(config.own_texts, True, "own_texts")
        texts = json.dumps([read_neutral_texts(config.neutral_texts), prompts])
        digest = hashlib.sha256(texts.encode()).hexdigest()
    return Run(
        format=FORMAT,
        program=VERSION,
        libraries={"torch": torch.__version__, "transformers": transformers.__version__},
        settings=without_paths(config),
        device=resolve_device(config.device).type,
        computed=computed,
        neutral=digest,
    )


def without_paths(config: Config) -> Config:
    """The settings for a record: files and folders without their paths, candidates by their names."""
    sources, _ = candidate_sources(config)
    return replace(
        config,
        directories=Directories(_model_name(config.directories.model_path1), output_directory=""),
        models_to_merge=tuple(_model_name(source.text) for source in sources),
        tokenizer=config.tokenizer and _last_part(config.tokenizer),
        phrase_files=tuple(map(_last_part, config.phrase_files)),
        held_out_files=tuple(map(_last_part, config.held_out_files)),
        eval_path=config.eval_path and _last_part(config.eval_path),
        neutral_texts=config.neutral_texts and tuple(map(_last_part, config.neutral_texts)),
        own_texts=config.own_texts and tuple(map(_last_part, config.own_texts)),
        learn=replace(config.learn, texts=config.learn.texts and _last_part(config.learn.texts)),
        discover=replace(config.discover, prompts=config.discover.prompts and _last_part(config.discover.prompts)),
    )


def _model_name(text: str) -> str:
    source = parse_source(text)
    return "+".join(location.name for location in source.places) if source else _last_part(text)


def _last_part(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def rendered_in(settings: Config) -> dict[Chat, str]:
    """The chats among the contexts of a run, and their rendered texts."""
    pairs = (*settings.pairs, *settings.held_out_pairs)
    return {pair.chat: pair.context for pair in pairs if pair.chat}


def refuse_changes(earlier_run: Run, current_run: Run, path: Path) -> None:
    """Raise ConfigError, naming what differs, if the version, or a setting that can change the result, is not the same
    as when the run began."""
    if earlier_run.program != current_run.program:
        raise ConfigError(
            f"{path} was started by Merge Monster {earlier_run.program}, but this is {current_run.program}; {_HINT}"
        )
    changes = []
    for key, (earlier_value, current_value) in changes_between(earlier_run, current_run).items():
        earlier_value = json.dumps(earlier_value, ensure_ascii=False)
        current_value = json.dumps(current_value, ensure_ascii=False)
        is_short = len(earlier_value) <= 60 and len(current_value) <= 60
        changes.append(f"{key} was {earlier_value}, is {current_value}" if is_short else f"{key} changed")
    if changes:
        raise ConfigError(f"the configuration has changed since {path} was started: {'; '.join(changes)}; {_HINT}")


def changes_between(earlier_run: Run, current_run: Run) -> dict[str, tuple[Any, Any]]:
    """The settings that can change a search's result and differ between two runs: both values, by key."""
    earlier_settings = earlier_run.settings.dumped()
    current_settings = current_run.settings.dumped()
    ignored = {*NO_PART}
    if earlier_run.device == current_run.device:
        ignored.add("device")
    if earlier_run.computed == current_run.computed:
        ignored.add("compute_dtype")
    changes = {
        key: (earlier_settings[key], current_settings[key]) for key in sorted(earlier_settings) if key not in ignored
    }
    if earlier_run.neutral and current_run.neutral:
        changes["neutral_texts, own_texts"] = earlier_run.neutral, current_run.neutral
    return {key: values for key, values in changes.items() if values[0] != values[1]}


def compare_fingerprints(noted: Source, checkpoint: Checkpoint, complaint: str) -> None:
    """Raise ConfigError, naming the first file that differs, if a source is not the noted one.

    complaint: the rest of the message, after the file's name.
    """
    fingerprint = checkpoint.fingerprint()
    for file in sorted(fingerprint.keys() | noted.fingerprint.keys()):
        if fingerprint.get(file) != noted.fingerprint.get(file):
            raise ConfigError(f"{checkpoint.path}: {file} {complaint}")


def named(text: str, folders: Iterable[tuple[str, str]]) -> str:
    """Replace the paths of folders in a text by their names. folders: each path as it may be spelt, and its name."""
    machine_folders = [(os.path.expanduser("~"), "~"), (os.getcwd(), ".")]
    for folder, name in sorted([*folders, *machine_folders], key=lambda pair: -len(pair[0])):
        if os.sep in folder and folder != os.sep:  # no name alone
            text = text.replace(folder, name)
    return text
