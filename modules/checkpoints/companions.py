"""The files beside a model's weights: which of them belong to it, and which may be published with it.

Knows: the names that transformers and the hub give such files, links. Refuses to know: what becomes of the files.

A file without a known name may be private notes or keys: it is neither read nor copied. A link is read wherever it
leads, since whoever names a folder may read it. Only files in the folder or in the hub's cache are published.
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

ADAPTER_SETTINGS = "adapter_config.json"  # a folder with this file is an adapter

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

# Further files that are downloaded of a model of the hub: its code may read files of any name.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_NOT_SMALL = ("model.", "pytorch_model", "merge_monster", "readme", "adapter_", "trainer_")

_MOST_NAMED = 20  # in a line of the log


@dataclass(frozen=True)
class Companions:
    """The files beside a model's weights, by their names in its folder, and their sizes in bytes."""

    sizes: Mapping[str, int] = field(default_factory=dict)  # of the files that describe the model or load it
    external_links: Sequence[str] = ()  # those of `sizes` that are links out of the folder: read, never copied
    others: Sequence[str] = ()  # files that are no part of a model by their name, or too large
    trusted: bool = False  # whether the model's own code may run

    @property
    def published(self) -> dict[str, int]:
        """The files that are copied beside written weights, and their sizes."""
        return {name: size for name, size in self.sizes.items() if name not in self.external_links}

    @property
    def lacking(self) -> list[str]:
        """Files that are not copied although the written model can't be loaded without them."""
        return [name for name in self.external_links if name == "config.json" or _fits(name, _TOKENIZERS)]

    @property
    def notes(self) -> list[str]:
        """A line about the model's files that are not copied, if any."""
        words = "Not copied (links out of the base's folder)"
        return [f"{words}: {listed(self.external_links, _MOST_NAMED)}"] if self.external_links else []

    def describe(self) -> list[str]:
        """Lines about what is copied and what is not."""
        lines = [f"Copied from the base: {listed(list(self.published), _MOST_NAMED)}", *self.notes]
        if self.others:
            lines.append(f"Not copied (not part of a model): {listed(self.others, _MOST_NAMED)}")
        return lines


def small_files(sizes: Mapping[str, int]) -> list[str]:
    """The names of a model's files that are needed before its weights: they describe it and are needed to load it.

    sizes: of all its files in bytes, by name. A large text or JSON file is data, and left out.
    """
    required = {"config.json", ADAPTER_SETTINGS, index_file(sizes)}
    return [name for name, size in sizes.items() if (name in required or is_small(name)) and size <= LARGEST_TEXT]


def licence_files(sizes: Mapping[str, int]) -> list[str]:
    """The names of a model's licences and notices, which must go with every copy. sizes: in bytes, by name."""
    return [name for name, size in sizes.items() if is_licence(name) and size <= LARGEST_TEXT]


def is_licence(name: str) -> bool:
    """Whether a file of this name is the text of a licence, or a notice that goes with one."""
    return bool(_LICENCE.fullmatch(name)) and Path(name).suffix.lower() in _TEXTS


def belongs(name: str) -> bool:
    """Whether a file of this name describes a model or is needed to load it. Not code: see `find_companions`."""
    return _fits(name, (*_SETTINGS, *_TOKENIZERS, *_CHAT)) or is_licence(name)


def is_small(name: str) -> bool:
    """Whether a file of this name on the hub may be needed to load a model."""
    fits = _fits(name, _SMALL) and "/" not in name and not name.lower().startswith(_NOT_SMALL)
    return (fits or belongs(name)) and not is_licence(name)


def find_companions(folder: Path, trusted: bool) -> Companions:
    """The files beside the weights in a model's folder. Raises CheckpointError if a file can't be read.

    trusted: whether to include the Python files that the model's settings name, and the files that these need.
    """
    names = local_files(folder)
    templates = folder / _TEMPLATES
    if is_there(templates, stat.S_ISDIR):
        names += [f"{_TEMPLATES}/{name}" for name in local_files(templates)]
    sizes = {name: (folder / name).stat().st_size for name in names if not Path(name).name.startswith(".")}
    companions = [name for name in sizes if belongs(name)]
    if trusted:
        companions += _code_files(folder, companions, sizes)
    companions = [name for name in dict.fromkeys(companions) if sizes[name] <= LARGEST_TEXT]
    external_links = [name for name in companions if _leads_out(folder, name)]
    unrelated = [name for name in sizes if name not in companions and (is_small(name) or belongs(name))]
    return Companions({name: sizes[name] for name in companions}, external_links, unrelated, trusted)


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a file, with links resolved, lies neither in the folder nor among the blobs of the hub's cache, or of
    another cache that contains the folder.

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


def _code_files(folder: Path, settings_files: Collection[str], present: Collection[str]) -> list[str]:
    """The Python files that a model's settings name, those that they import, and other files named in their code."""
    waiting = [module for name in settings_files if name in _SETTINGS for module in _auto_map(folder / name)]
    code_by_file: dict[str, str] = {}
    while waiting:
        file = f"{waiting.pop()}.py"
        if file in present and file not in code_by_file:
            code_by_file[file] = read_file(folder / file).decode("utf-8", "replace")
            waiting += re.findall(r"^\s*(?:from|import)\s+\.(\w+)", code_by_file[file], re.MULTILINE)
    quoted = {text for code in code_by_file.values() for text in re.findall(r"""["']([\w.-]+)["']""", code)}
    return [*code_by_file, *(name for name in present if name in quoted)]


def _auto_map(file: Path) -> Iterator[str]:
    """The modules of a model's own classes, from auto_map in its settings; not those of other repositories."""
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
    """Whether a name fits one of the patterns; a star does not match a slash."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
