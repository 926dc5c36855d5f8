"""A model's texts to many prompts: those that are kept, and those that are still missing, drawn and kept.

Knows: the settings that texts depend on, where they are kept. Refuses to know: how a text is drawn, what is looked for.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.checkpoints import Models, load_tokenizer
from modules.config import Config, read_prompts
from modules.discovery import KeptTexts, word_count
from modules.model import ModelLoader, ResidentModel
from modules.runtime import ConfigError, Console, counted, first_line, is_out_of_memory, naming, without_panics
from modules.scoring import (
    Asked,
    Drawing,
    asked_of,
    chat_of,
    check_refusals,
    drawn,
    has_template,
    of_one_length,
    render,
    unanswered,
)

FOLDER = "samples"  # of kept texts, beside the file that is written, or where the program was started


@dataclass(frozen=True)
class Author:
    """A model that writes."""

    name: str  # without where it lies
    model: ResidentModel
    tokenizer: Any
    asked: Asked  # its prompts as it reads them

    @property
    def chats(self) -> bool:
        """Whether it is asked in a chat template."""
        return has_template(self.tokenizer)


@dataclass(frozen=True)
class Writer:
    """A model that will write, all that it is asked being known; its weights are not in memory."""

    loader: ModelLoader
    models: Models
    prompts: tuple[str, ...]
    asked: Asked

    def load(self) -> Author:
        """The model. Raises as ModelLoader does."""

        def load(loader: ModelLoader) -> Author:
            model, tokenizer = loader.load(self.models, loader.placement(self.models, with_header=False))
            return Author(self.models.base.name, model, tokenizer, self.asked)

        return self.loader.fitting(self.models).in_range(load)


def open_writer(config: Config, console: Console, prompts: Sequence[str] = ()) -> Writer:
    """A config's base. prompts: what it is asked; else for a model with a chat template questions, for another one
    openings of texts. Raises as ModelLoader does, and for prompts that its template refuses."""
    loader = ModelLoader(config, console)
    models = loader.open_base()
    tokenizer = load_tokenizer(models.base.path, models.base.companions)
    prompts = tuple(prompts) or read_prompts(config.discover.prompts, has_template(tokenizer))
    chats = [chat_of(prompt, config.system) for prompt in prompts] if has_template(tokenizer) else []
    name = config.directories.model_path1
    rendered = render(tokenizer, name, dict.fromkeys(chats, "discover.prompts"), config.template, config.system)
    check_refusals(rendered.refusals.values(), "prompts")
    return Writer(loader, models, prompts, asked_of(tokenizer, rendered, prompts, config.system))


def drawing_of(config: Config, asked: Asked) -> Drawing:
    """How the settings want texts to be drawn."""
    settings = config.discover
    return Drawing(settings.tokens, settings.temperature, settings.samples, asked)


def check_prompts(config: Config) -> None:
    """Raise ConfigError for a file of prompts that can't be used, before a model is loaded."""
    if config.discover.prompts:
        read_prompts(config.discover.prompts, for_chats=True)


def folder_beside(file: Path | None) -> Path:
    """Where texts are kept: beside what is written, or where the program was started."""
    return (file.parent if file else Path()) / FOLDER


def write_texts(
    author: Author, prompts: Sequence[str], config: Config, console: Console, folder: Path
) -> list[tuple[str, ...]]:
    """What the model writes to each prompt, as often as the settings say. folder: where texts are kept.

    Raises ConfigError where it can't write, OSError where its texts can't be kept.
    """
    drawing, model = drawing_of(config, author.asked), author.model
    thoughts, rules = author.asked.thoughts, model.token_rules()
    way = {
        "model": model.checkpoint.fingerprint(),
        "dtype": model.arithmetic.name,
        "chat_template": getattr(author.tokenizer, "chat_template", None),
        "seed": config.random_seed,
        **{"tokens": drawing.tokens, "temperature": drawing.temperature, "count": drawing.count},
        **{"template": config.template, "system": config.system},
        **({"thoughts": [[mark.opens, mark.closes] for mark in thoughts.marks]} if thoughts.marks else {}),
        **({"token_rules": rules} if rules else {}),
    }
    kept = KeptTexts(folder, author.name, way, drawing.count)
    missing = [prompt for prompt in prompts if kept.get(prompt) is None]
    if missing and kept.damaged:
        console.warning(
            f"{kept.path}: {counted(kept.damaged, 'damaged line')} left out; what is missing is drawn again"
        )
    others = len(prompts) - len(missing)
    there = f", {drawing.count * others:,} others are there" if others else ""
    todo = f"{author.name} writes {counted(drawing.count * len(missing), 'text')}{there}: {kept.path}"
    console.timed(todo if missing else f"All texts of {author.name} are there: {kept.path}")
    began, words = time.monotonic(), 0
    with console.progress(len(missing)) as bar:
        for together in of_one_length(model, author.tokenizer, missing, drawing):
            texts = _drawn(author, together, config.random_seed, drawing)
            with naming(kept.path):
                kept.add(dict(zip(together, texts, strict=True)))
            words += sum(word_count(text).words for of_prompt in texts for text in of_prompt)
            bar.update(len(together))
            bar.tell(f"{words / (time.monotonic() - began):.0f} words/s")
    if missing:
        console.line(f"{words:,} words in {time.monotonic() - began:.0f} s")
    written = [kept.get(prompt) or () for prompt in prompts]
    console.warnings(f"{author.name}: {line}; discover.tokens gives more" for line in unanswered(written, drawing))
    return written


def _drawn(author: Author, prompts: Sequence[str], seed: int, drawing: Drawing) -> list[list[str]]:
    try:
        with without_panics():
            return drawn(author.model, author.tokenizer, prompts, seed, drawing)
    except ConfigError:
        raise
    except Exception as error:  # of an architecture, of a chat template, of probabilities that are no numbers
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{author.name} can't write texts: {first_line(error)}") from None
