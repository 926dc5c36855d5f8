"""What may not change where a run goes on, or is carried out again: its version, its settings, the files of its models.

Knows: which settings can change a result, how they are said without a path. Refuses to know: how a run goes on.
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

_HINT = "go back to that, or start over with --restart"


def run_of(config: Config, computed: str) -> Run:
    """What a journal says of a run that begins here and now. computed: what it computes in."""
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
    """The settings as records have them: of files and folders no more than their names, each candidate by its own."""
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
    return "+".join(place.name for place in source.places) if source else _last_part(text)


def _last_part(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def rendered_in(settings: Config) -> dict[Chat, str]:
    """The chats among the contexts of a run, and what they were rendered as."""
    pairs = (*settings.pairs, *settings.held_out_pairs)
    return {pair.chat: pair.context for pair in pairs if pair.chat}


def refuse_changes(begun: Run, now: Run, path: Path) -> None:
    """Raise ConfigError, naming what can change the result and is another one than when a run began: the version, or
    settings."""
    if begun.program != now.program:
        raise ConfigError(f"{path} was started by Merge Monster {begun.program}, but this is {now.program}; {_HINT}")
    changes = []
    for key, (before, after) in changes_between(begun, now).items():
        before = json.dumps(before, ensure_ascii=False)
        after = json.dumps(after, ensure_ascii=False)
        is_short = len(before) <= 60 and len(after) <= 60
        changes.append(f"{key} was {before}, is {after}" if is_short else f"{key} changed")
    if changes:
        raise ConfigError(f"the configuration has changed since {path} was started: {'; '.join(changes)}; {_HINT}")


def changes_between(begun: Run, now: Run) -> dict[str, tuple[Any, Any]]:
    """The keys in which two runs' settings differ that have a part in what a search finds, with both values."""
    before = begun.settings.dumped()
    after = now.settings.dumped()
    ignored = {*NO_PART}
    if begun.device == now.device:
        ignored.add("device")
    if begun.computed == now.computed:
        ignored.add("compute_dtype")
    changes = {key: (before[key], after[key]) for key in sorted(before) if key not in ignored}
    if begun.neutral and now.neutral:
        changes["neutral_texts, own_texts"] = begun.neutral, now.neutral
    return {key: values for key, values in changes.items() if values[0] != values[1]}


def compare_fingerprints(noted: Source, checkpoint: Checkpoint, trouble: str) -> None:
    """Raise ConfigError, naming the first file that differs, if a source is not what was noted.

    trouble: what that means, to be said of the file.
    """
    now = checkpoint.fingerprint()
    for file in sorted(now.keys() | noted.fingerprint.keys()):
        if now.get(file) != noted.fingerprint.get(file):
            raise ConfigError(f"{checkpoint.path}: {file} {trouble}")


def named(text: str, folders: Iterable[tuple[str, str]]) -> str:
    """A text in which folders go by their names. folders: each as it may be spelt, and its name."""
    here = [(os.path.expanduser("~"), "~"), (os.getcwd(), ".")]
    for folder, name in sorted([*folders, *here], key=lambda pair: -len(pair[0])):
        if os.sep in folder and folder != os.sep:  # no name alone
            text = text.replace(folder, name)
    return text
