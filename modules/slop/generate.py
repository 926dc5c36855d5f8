"""A model's texts for many prompts: those that are kept in a file, and the missing ones, generated and kept.

Knows: the settings that texts depend on, the file. Refuses to know: how a text is sampled, what is looked for in it.

The texts of a batch of prompts are a JSON line. What a killed run has kept is not generated again, several programs may
add lines to one file, and a damaged line is as good as none.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from modules.checkpoints.checkpoint import load_tokenizer
from modules.checkpoints.downloads import fetch_now
from modules.config.inputs import read_prompts
from modules.config.schema import Config
from modules.model.base_model import ResidentModel
from modules.model.loading import ModelLoader
from modules.output.filesystem import sync
from modules.output.text_files import write_text
from modules.runtime.console import Console
from modules.runtime.errors import ConfigError, first_line, naming, without_panics
from modules.runtime.oom import is_out_of_memory
from modules.runtime.text import pluralize
from modules.scoring.chats import Asked, asked_of, chat_of, check_refusals, has_template, render
from modules.scoring.samples import SamplingParams, batches, empty_answers, encoded, sample, visible
from modules.search.mixing import Mix
from modules.slop.matching import word_count

FOLDER = "samples"  # beside the file that is written, or in the working directory

Texts = dict[str, list[str]]  # by prompt
_TEXTS = TypeAdapter(Texts)


@dataclass(frozen=True)
class Generator:
    """A model that generates texts."""

    name: str  # without the folders that it is in
    config: Config
    model: ResidentModel
    tokenizer: Any
    prompts: tuple[str, ...]
    asked: Asked  # the prompts as the model reads them
    fingerprint: Mapping[str, Any]  # of the files that it is made of

    @property
    def answers_begin(self) -> dict[str, str] | None:
        """By prompt, what ends the thoughts that the chat template begins; None without a chat template."""
        if not has_template(self.tokenizer):
            return None
        return {prompt: self.asked.thoughts.closing(text) for prompt, text in self.asked.texts.items()}

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def load_generator(config: Config, console: Console, prompts: Sequence[str] = (), candidate: str = "") -> Generator:
    """A config's base, or a candidate for it, with all its weights as a merge would take them.

    prompts: if none are given, those of the config or of the program: questions for a model with a chat template,
    openings of texts for another one. candidate: as models_to_merge names it. Raises as ModelLoader and Mix do,
    ConfigError for unusable prompts.
    """
    if config.discover.prompts and not prompts:
        prompts = read_prompts(
            [config.discover.prompts], for_chats=True, key="discover.prompts"
        )  # before anything is fetched
    loader = ModelLoader(replace(config, models_to_merge=(candidate,) if candidate else ()), console)
    models = loader.open() if candidate else loader.open_base()
    if candidate:
        for job in models.jobs:
            fetch_now(console, job)
    tokenizer = load_tokenizer(models.base.path, models.base.companions)
    prompts = tuple(prompts or read_prompts(None, has_template(tokenizer), "discover.prompts"))
    chats = [chat_of(prompt, config.system) for prompt in prompts] if has_template(tokenizer) else []
    name = config.directories.model_path1
    rendered = render(tokenizer, name, dict.fromkeys(chats, "discover.prompts"), config.template, config.system)
    check_refusals(rendered.refusals.values(), "prompts")
    asked = asked_of(tokenizer, rendered, prompts, config.system)

    def load(loader: ModelLoader) -> Generator:
        model, _ = loader.load(models, loader.placement(models, with_header=bool(candidate)))
        source = models.base
        if candidate:
            mix = Mix(model, tokenizer, models.candidates)
            mix.compose([(1.0,)] * mix.rows, exact=True)
            source = models.candidates[0].checkpoint
        return Generator(source.name, config, model, tokenizer, prompts, asked, source.fingerprint())

    return loader.fitting(models).in_range(load)


def generate(generator: Generator, seed: int, console: Console, beside: Path | None) -> list[list[str]]:
    """Texts for each prompt, as many as the config says. beside: the file in whose folder they are kept.

    Raises ConfigError if the model can't generate or its texts can't be read, OSError if they can't be kept.
    """
    settings = generator.config.discover
    asked = generator.asked
    params = SamplingParams(settings.tokens, settings.temperature, settings.samples)
    depends_on = {
        "model": generator.fingerprint,
        "dtype": generator.model.arithmetic.name,
        "chat_template": getattr(generator.tokenizer, "chat_template", None),
        "seed": seed,
        "tokens": params.tokens,
        "temperature": params.temperature,
        "count": params.count,
        "template": generator.config.template,
        "system": generator.config.system,
        "thoughts": [[mark.opens, mark.closes] for mark in asked.thoughts.marks],
        "token_rules": generator.model.token_rules(),
    }
    file = sample_file((beside.parent if beside else Path()) / FOLDER, generator.name, depends_on)
    texts = read_texts(file, params.count)
    missing = [prompt for prompt in generator.prompts if prompt not in texts]
    count = pluralize(params.count * len(missing), "text")
    console.timed(f"Generating {count} with {generator.name} (kept in {file})")
    began = time.monotonic()
    words = 0
    with console.progress(len(missing)) as bar:
        given, problems = encoded(generator.model, generator.tokenizer, missing, asked)
        if problems:
            raise ConfigError(*problems)
        for batch in batches(generator.model, given, params.count):
            new = _sample(generator, {prompt: given[prompt] for prompt in batch}, seed, params)
            keep_texts(file, new)
            texts |= new
            words += sum(word_count(text) for of_prompt in new.values() for text in of_prompt)
            bar.update(len(batch))
            bar.tell(f"{words / (time.monotonic() - began):.0f} words/s")
    if missing:
        console.line(f"{words:,} words in {time.monotonic() - began:.0f} s")
    answers = [texts[prompt] for prompt in generator.prompts]
    console.warnings(
        f"{generator.name}: {line}; raise discover.tokens" for line in empty_answers(answers, asked, params.tokens)
    )
    return answers


def _sample(generator: Generator, prompts: Mapping[str, Sequence[int]], seed: int, params: SamplingParams) -> Texts:
    texts: Texts = {}
    try:
        with without_panics():
            written = sample(generator.model, generator.tokenizer, prompts, seed, params)
            for prompt, of_prompt in zip(prompts, written, strict=True):
                texts[prompt] = [visible(generator.tokenizer, text, prompt, generator.asked) for text in of_prompt]
            return texts
    except Exception as error:  # of an architecture, of a chat template, of probabilities that are no numbers
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{generator.name} can't generate texts: {first_line(error)}") from None


def sample_file(folder: Path, model: str, depends_on: Mapping[str, Any]) -> Path:
    """The file for the texts of a model, another one for other settings."""
    letters = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in model)
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return folder / f"{letters.strip('-.')[-60:] or 'model'}-{digest[:12]}.jsonl"


def read_texts(file: Path, count: int) -> Texts:
    """All texts in a file, whose folder is made if it is missing; of several for one prompt the first ones count.
    Damaged lines are removed from the file.

    count: texts of each prompt. Raises ConfigError if they can't be read.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        entries = [_texts_in(line, count) for line in lines]
        ended = lines[:-1]  # behind the last line end another program may be writing
        whole = [line for line, texts in zip(ended, entries, strict=False) if texts]
        if len(whole) < len(list(filter(None, ended))):
            write_text(file, b"".join(line + b"\n" for line in whole).decode())
    except OSError as error:
        raise ConfigError(f"{error.filename or file}: can't be used ({error.strerror})") from None
    kept: Texts = {}
    for texts in entries:
        kept = texts | kept
    return kept


def _texts_in(line: bytes, count: int) -> Texts:
    """Those of a line; none if it is damaged."""
    try:
        texts = _TEXTS.validate_python(json.loads(line.decode()))
    except (ValueError, RecursionError):
        return {}
    return texts if all(len(of_prompt) == count for of_prompt in texts.values()) else {}


def keep_texts(file: Path, texts: Texts) -> None:
    """Add the texts of a batch of prompts: they are on the disk when this returns. Raises OSError."""
    line = json.dumps(texts, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    with naming(file), file.open("a+b", buffering=0) as opened:  # unbuffered: a line is written at once
        if opened.seek(0, os.SEEK_END):
            opened.seek(-1, os.SEEK_END)
            torn = opened.read(1) != b"\n"  # a run was killed while it wrote
            line = b"\n" + line if torn else line
        opened.write(line)
    sync(file)
    sync(file.parent)
