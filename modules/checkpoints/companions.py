"""The files beside a model's weights: which of them belong to it, and which may be published with it.

Knows: the names that transformers and the hub give such files, links. Refuses to know: what becomes of the files.

What is not known by its name is somebody's notes or keys: it is neither read nor copied. A link is read wherever it
leads, since whoever names a folder may read it; published is only what lies in the folder or in the hub's cache.
"""

import json
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from modules.checkpoints.weight_files import LARGEST_TEXT, index_file, is_there, local_files, read_file
from modules.runtime.text import listed

ADAPTER_SETTINGS = "adapter_config.json"  # what makes a folder an adapter

_SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json",
    "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json", "audio_tokenizer_config.json",
)  # fmt: skip
_TOKENIZERS = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "tokenizer.model.v[0-9]*",
    "tokenizer.[0-9]*.json",  # for other versions of transformers, as tokenizer_config.json lists them
    "vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json",
    "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "byte_maps.json", "normalizer.json",
    "word_pronunciation.json", "word_shape.json", "prophetnet.tokenizer", "tekken.json", "*.tiktoken", "tiktoken.model",
    "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model", "spm_char.model", "source.spm",
    "target.spm",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # a folder
_CHAT = ("chat_template.jinja", "chat_template.json", f"{_TEMPLATES}/*.jinja")
# A licence's text, under the names that people give it (LICENSE-MIT, COPYING.LESSER, Notice.txt); no licence key.
_LICENCE = re.compile(
    r"(?!.*key)(third[-_]party[-_])?(licen[sc]es?|copying|notices?|use_policy)([-_. ][\w. -]*)?",
    re.ASCII | re.IGNORECASE,
)
_TEXTS = ("", ".txt", ".md", ".rst", ".html", ".pdf", ".lesser")

# What is fetched of a model of the hub beside that: code may read files of any name.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_NOT_SMALL = ("model.", "pytorch_model", "merge_monster", "readme", "adapter_", "trainer_")

_MOST_NAMED = 20  # in a line of the log


@dataclass(frozen=True)
class Companions:
    """The files beside a model's weights, by their names in its folder, and their sizes in bytes."""

    sizes: Mapping[str, int] = field(default_factory=dict)  # of those that describe and open the model
    external_links: Sequence[str] = ()  # of these, links to somewhere else: they are read, and never copied
    others: Sequence[str] = ()  # what belongs to no model, as far as its name tells, or is too large
    trusted: bool = False  # whether code may be run that is among them

    @property
    def published(self) -> dict[str, int]:
        """Those that are copied beside weights that are written, and their sizes."""
        return {name: size for name, size in self.sizes.items() if name not in self.external_links}

    @property
    def lacking(self) -> list[str]:
        """Those without which what is written could not be opened, and which are not copied."""
        return [name for name in self.external_links if name == "config.json" or _fits(name, _TOKENIZERS)]

    @property
    def notes(self) -> list[str]:
        """A line about what is not copied though it belongs to the model."""
        words = "Not copied (links out of the base's folder)"
        return [f"{words}: {listed(self.external_links, _MOST_NAMED)}"] if self.external_links else []

    def describe(self) -> list[str]:
        """Lines about what is copied and what is not."""
        lines = [f"Copied from the base: {listed(list(self.published), _MOST_NAMED)}", *self.notes]
        if self.others:
            lines.append(f"Not copied (not part of a model): {listed(self.others, _MOST_NAMED)}")
        return lines


def small_files(sizes: Mapping[str, int]) -> list[str]:
    """Of all files of a model, those that are needed before its weights: what describes and opens it.

    sizes: in bytes, by name. What calls itself text or JSON but is large is somebody's data.
    """
    needed = {"config.json", ADAPTER_SETTINGS, index_file(sizes)}
    return [name for name, size in sizes.items() if (name in needed or is_small(name)) and size <= LARGEST_TEXT]


def licence_files(sizes: Mapping[str, int]) -> list[str]:
    """Of all files of a model, those that go with it wherever it goes, and that no program needs."""
    return [name for name, size in sizes.items() if is_licence(name) and size <= LARGEST_TEXT]


def is_licence(name: str) -> bool:
    """Whether a file of this name is the text of a licence, or a notice that goes with one."""
    return bool(_LICENCE.fullmatch(name)) and Path(name).suffix.lower() in _TEXTS


def belongs(name: str) -> bool:
    """Whether a file of this name describes a model, or opens it. Code is not among them: see `find_companions`."""
    return _fits(name, (*_SETTINGS, *_TOKENIZERS, *_CHAT)) or is_licence(name)


def is_small(name: str) -> bool:
    """Whether a file of this name, at the hub, may be needed to open a model."""
    fits = _fits(name, _SMALL) and "/" not in name and not name.lower().startswith(_NOT_SMALL)
    return (fits or belongs(name)) and not is_licence(name)


def find_companions(folder: Path, trusted: bool) -> Companions:
    """Look through a model's folder. Raises CheckpointError if a file can't be looked at.

    trusted: whether Python files are among them, those that the model's settings name, with what these need.
    """
    present = local_files(folder)
    templates = folder / _TEMPLATES
    if is_there(templates, stat.S_ISDIR):
        present += [f"{_TEMPLATES}/{name}" for name in local_files(templates)]
    sizes = {name: (folder / name).stat().st_size for name in present if not Path(name).name.startswith(".")}
    found = [name for name in sizes if belongs(name)]
    if trusted:
        found += _code(folder, found, sizes)
    found = [name for name in dict.fromkeys(found) if sizes[name] <= LARGEST_TEXT]
    external_links = [name for name in found if _leads_out(folder, name)]
    others = [name for name in sizes if name not in found and (is_small(name) or belongs(name))]
    return Companions({name: sizes[name] for name in found}, external_links, others, trusted)


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a file lies, once its links are followed, neither in the folder nor among the blobs of the hub's cache,
    or of another one that the folder lies in.

    The cache has models--org--name/blobs/HASH and models--org--name/snapshots/COMMIT, a model's folder.
    """
    file = (folder / name).resolve()
    inside = folder.resolve()
    if inside in file.parents:
        return False
    blobs = file.parent
    model = blobs.parent
    is_cache = (
        model.parent == Path(constants.HF_HUB_CACHE).expanduser().resolve() or inside.parent == model / "snapshots"
    )
    return not (blobs.name == "blobs" and model.name.startswith("models--") and is_cache)


def _code(folder: Path, described: Collection[str], present: Collection[str]) -> list[str]:
    """The Python files that a model's settings name, those that they import, and other files that they name."""
    waiting = [module for name in described if name in _SETTINGS for module in _auto_map(folder / name)]
    found: dict[str, str] = {}
    while waiting:
        file = f"{waiting.pop()}.py"
        if file in present and file not in found:
            found[file] = read_file(folder / file).decode("utf-8", "replace")
            waiting += re.findall(r"^\s*(?:from|import)\s+\.(\w+)", found[file], re.MULTILINE)
    quoted = {text for code in found.values() for text in re.findall(r"""["']([\w.-]+)["']""", code)}
    return [*found, *(name for name in present if name in quoted)]


def _auto_map(file: Path) -> Iterator[str]:
    """The modules in which a model's own classes are, as its settings name them; not those of other models."""
    try:
        settings = json.loads(read_file(file).decode("utf-8"))
    except (ValueError, RecursionError):  # whoever uses it says so
        return
    auto_map = settings.get("auto_map") if isinstance(settings, dict) else None
    values: list[Any] = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and "--" not in name:
                yield name.partition(".")[0]


def _fits(name: str, patterns: Collection[str]) -> bool:
    """A star stands for no slash."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
