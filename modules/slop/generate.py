"""A model's texts for many prompts: read from a file if it has them, else generated and added to it.

Knows: the settings that texts depend on, the file. Refuses to know: how a text is sampled, what is searched in it.

The texts of a batch of prompts are a JSON line. Texts that a killed run kept are not generated again, several programs
may add lines to one file, and a damaged line is ignored.
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

    name: str  # without its folders
    config: Config
    model: ResidentModel
    tokenizer: Any
    prompts: tuple[str, ...]
    asked: Asked  # the prompts as the model reads them
    fingerprint: Mapping[str, Any]  # of its files

    @property
    def answers_begin(self) -> dict[str, str] | None:
        """By prompt, the text that ends the thoughts which the chat template opens; None without a chat template."""
        if not has_template(self.tokenizer):
            return None
        return {prompt: self.asked.thoughts.closing(text) for prompt, text in self.asked.texts.items()}

    def count_tokens(self, text: str) -> int:
        """The number of a text's tokens."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def load_generator(config: Config, console: Console, prompts: Sequence[str] = (), candidate: str = "") -> Generator:
    """Load a config's base, or a candidate for it, with all its weights as a merge would take them.

    prompts: if empty, those of the config or of the program: questions for a model with a chat template, openings of
    texts for another one. candidate: as models_to_merge names it. Raises as ModelLoader and Mix do, ConfigError for
    unusable prompts.
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
    model_prompts = asked_of(tokenizer, rendered, prompts, config.system)

    def load(loader: ModelLoader) -> Generator:
        model, _ = loader.load(models, loader.placement(models, with_header=bool(candidate)))
        source = models.base
        if candidate:
            mix = Mix(model, tokenizer, models.candidates)
            mix.compose([(1.0,)] * mix.rows, exact=True)
            source = models.candidates[0].checkpoint
        return Generator(source.name, config, model, tokenizer, prompts, model_prompts, source.fingerprint())

    return loader.fitting(models).in_range(load)


def generate(generator: Generator, seed: int, console: Console, beside: Path | None) -> list[list[str]]:
    """Texts for each prompt, as many as the config says. They are kept in FOLDER beside the file `beside`, or in the
    working directory. Raises ConfigError if the model can't generate or its texts can't be read, OSError if they can't
    be kept.
    """
    settings = generator.config.discover
    model_prompts = generator.asked
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
        "thoughts": [[mark.opens, mark.closes] for mark in model_prompts.thoughts.marks],
        "token_rules": generator.model.token_rules(),
    }
    file = sample_file((beside.parent if beside else Path()) / FOLDER, generator.name, depends_on)
    texts = read_texts(file, params.count)
    missing = [prompt for prompt in generator.prompts if prompt not in texts]
    count = pluralize(params.count * len(missing), "text")
    if missing:
        console.timed(f"Generating {count} with {generator.name} (kept in {file})")
    else:
        console.timed(f"Using the texts of {generator.name} in {file}")
    began = time.monotonic()
    words = 0
    with console.progress(len(missing)) as bar:
        inputs, problems = encoded(generator.model, generator.tokenizer, missing, model_prompts)
        if problems:
            raise ConfigError(*problems)
        for batch in batches(generator.model, inputs, params.count):
            new_texts = _sample(generator, {prompt: inputs[prompt] for prompt in batch}, seed, params)
            keep_texts(file, new_texts)
            texts |= new_texts
            words += sum(word_count(text) for prompt_texts in new_texts.values() for text in prompt_texts)
            bar.update(len(batch))
            bar.tell(f"{words / (time.monotonic() - began):.0f} words/s")
    if missing:
        console.line(f"{words:,} words in {time.monotonic() - began:.0f} s")
    answers = [texts[prompt] for prompt in generator.prompts]
    console.warnings(
        f"{generator.name}: {line}; raise discover.tokens"
        for line in empty_answers(answers, model_prompts, params.tokens)
    )
    return answers


def _sample(generator: Generator, prompts: Mapping[str, Sequence[int]], seed: int, params: SamplingParams) -> Texts:
    texts: Texts = {}
    try:
        with without_panics():
            answers = sample(generator.model, generator.tokenizer, prompts, seed, params)
            for prompt, prompt_answers in zip(prompts, answers, strict=True):
                texts[prompt] = [visible(generator.tokenizer, text, prompt, generator.asked) for text in prompt_answers]
            return texts
    except Exception as error:  # from an architecture, a chat template, probabilities that are no numbers
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{generator.name} can't generate texts: {first_line(error)}") from None


def sample_file(folder: Path, model: str, depends_on: Mapping[str, Any]) -> Path:
    """The file for the texts of a model under some settings. Other settings give another file."""
    letters = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in model)
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return folder / f"{letters.strip('-.')[-60:] or 'model'}-{digest[:12]}.jsonl"


def read_texts(file: Path, count: int) -> Texts:
    """All texts in a file. Its folder is made if it is missing. The first line with a prompt counts. Damaged lines are
    removed from the file.

    count: texts of each prompt. Raises ConfigError if they can't be read.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        entries = [_texts_in(line, count) for line in lines]
        complete_lines = lines[:-1]  # after the last line end another program may be writing
        sound_lines = [line for line, texts in zip(complete_lines, entries, strict=False) if texts]
        if len(sound_lines) < len(list(filter(None, complete_lines))):
            write_text(file, b"".join(line + b"\n" for line in sound_lines).decode())
    except OSError as error:
        raise ConfigError(f"{error.filename or file}: can't be used ({error.strerror})") from None
    merged_texts: Texts = {}
    for texts in entries:
        merged_texts = texts | merged_texts
    return merged_texts


def _texts_in(line: bytes, count: int) -> Texts:
    """The texts of a line; empty if it is damaged."""
    try:
        texts = _TEXTS.validate_python(json.loads(line.decode()))
    except (ValueError, RecursionError):
        return {}
    return texts if all(len(prompt_texts) == count for prompt_texts in texts.values()) else {}


def keep_texts(file: Path, texts: Texts) -> None:
    """Add the texts of a batch of prompts to a file. They are on the disk when this returns. Raises OSError."""
    line = json.dumps(texts, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    with naming(file), file.open("a+b", buffering=0) as opened:  # unbuffered: a line is written at once
        if opened.seek(0, os.SEEK_END):
            opened.seek(-1, os.SEEK_END)
            is_torn = opened.read(1) != b"\n"  # a run was killed while it wrote
            line = b"\n" + line if is_torn else line
        opened.write(line)
    sync(file)
    sync(file.parent)
