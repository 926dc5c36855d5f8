"""What the base answers to prompts, once, at the start of a run: the text on which drift is measured where a model is
used, and what the merge's answers are compared with.

Knows: which prompts count in a search and which are only shown, where answers are kept. Refuses to know: how a text is
sampled, how drift is measured on it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from pydantic import TypeAdapter

from modules.config.inputs import read_prompts
from modules.config.schema import Config
from modules.model.base_model import ResidentModel
from modules.runtime.console import Console
from modules.runtime.errors import first_line, without_panics
from modules.runtime.oom import retry_on_oom
from modules.runtime.text import pluralize
from modules.scoring.chats import Asked, has_template
from modules.scoring.samples import DEFAULT, Written, encoded, same_length_batches, sample

MOST_SAMPLES = 3  # answers that are shown beside the merge's, unless the key samples asks for others


@dataclass(frozen=True)
class Answer:
    """A prompt as the model reads it, and what it has written."""

    prompt: str
    given: tuple[int, ...]  # token ids
    written: Written


@dataclass(frozen=True)
class Answers:
    """What one model answers."""

    shown: tuple[Answer, ...] = ()  # their drift takes no part in a search
    weighed: tuple[Answer, ...] = ()  # trials are judged by their drift
    samples: tuple[Answer, ...] = ()  # to the prompts of the key samples

    @property
    def all(self) -> tuple[Answer, ...]:
        """All answers."""
        return self.shown + self.weighed + self.samples


NO_ANSWERS = Answers()
ANSWERS = TypeAdapter(Answers)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run."""

    shown: tuple[str, ...]
    weighed: tuple[str, ...]
    samples: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys((*self.shown, *self.weighed, *self.samples)))


def prompts_of(config: Config, for_chats: bool) -> Prompts:
    """Half of the prompts for what is shown; of the other half as many as a search needs that weighs drift.

    for_chats: whether the base has a chat template. Raises ConfigError for files without prompts.
    """
    wanted = config.own_texts != ()
    prompts = read_prompts(config.own_texts, for_chats, "own_texts") if wanted else ()
    # Twice as many as are needed if every answer is as long as it may be.
    count = -(-config.neutral_tokens // DEFAULT.tokens) if config.is_guarded else 0
    return Prompts(prompts[::2], prompts[1::2][:count], config.samples or ())


def base_answers(
    model: ResidentModel, tokenizer: Any, config: Config, asked: Asked, console: Console, noted: Answers = NO_ANSWERS
) -> Answers:
    """What the base answers, from the cache if it has answered before. asked: the prompts as it reads them. noted: what
    it has answered to some of them in this run.

    Where it can't answer, a warning says so; that is no reason to lose a merge.
    """
    prompts = prompts_of(config, has_template(tokenizer))
    answered = {answer.prompt: answer for answer in noted.all}
    new = [prompt for prompt in prompts.all if prompt not in answered]
    readable = [prompt for prompt in new if prompt in asked.texts or not has_template(tokenizer)]
    given, problems = encoded(model, tokenizer, readable, asked)
    console.warnings(problems)
    written: dict[str, Written] = {}
    if given:
        with only_warned(console):
            written = _answered(model, tokenizer, given, config.random_seed, console)
    answered |= {prompt: Answer(prompt, tuple(given[prompt]), text) for prompt, text in written.items()}

    def part(names: Sequence[str]) -> tuple[Answer, ...]:
        return tuple(answered[name] for name in names if name in answered)

    answers = Answers(part(prompts.shown), part(prompts.weighed), part(prompts.samples))
    if answers.shown and not any(answer.written.said for answer in (*answers.shown, *answers.weighed)):
        console.warning("own_texts: the base answers nothing, so drift is measured on neutral text alone")
        return Answers(samples=answers.samples)
    return answers


def _answered(
    model: ResidentModel, tokenizer: Any, given: Mapping[str, Sequence[int]], seed: int, console: Console
) -> dict[str, Written]:
    """What the base answers, from the cache or generated and kept there."""
    file = _cache_file(model, tokenizer, given, seed)
    written = _kept(file, given, model.vocabulary)
    if written is None:
        console.timed(f"Generating the base's answers to {pluralize(len(given), 'prompt')}")
        written = generate_answers(model, tokenizer, given, seed, console)
        _keep(file, written)
    return written


def generate_answers(
    model: ResidentModel, tokenizer: Any, given: Mapping[str, Sequence[int]], seed: int, console: Console
) -> dict[str, Written]:
    """What the model as it is answers to each prompt. given: token ids by prompt. Raises as `sample` does."""
    written: dict[str, Written] = {}

    def generate() -> None:
        with console.progress(len(given)) as bar:
            for batch in same_length_batches(given):
                texts = sample(model, tokenizer, {prompt: given[prompt] for prompt in batch}, seed)
                written.update({prompt: text for prompt, (text,) in zip(batch, texts, strict=True)})
                bar.update(len(batch))

    retry_on_oom(generate)
    return written


@contextmanager
def only_warned(console: Console) -> Iterator[None]:
    """A model that can't answer is no reason to lose a merge: a warning says why."""
    try:
        with without_panics():
            yield
    except Exception as error:  # of an architecture, of its settings, of a device
        console.warning(f"no prompt can be answered: {first_line(error)}")


# -- the cache ---------------------------------------------------------------------------------------------------------

_KEPT = TypeAdapter(dict[str, Written])


def _cache_file(model: ResidentModel, tokenizer: Any, given: Mapping[str, Sequence[int]], seed: int) -> Path:
    """Another file for everything that answers depend on."""
    depends_on = {
        "model": model.checkpoint.fingerprint(),
        "arithmetic": model.arithmetic.name,
        "device": model.device.type,
        "given": given,
        "seed": seed,
        "params": [DEFAULT.tokens, DEFAULT.temperature],
        "ends": sorted(model.end_tokens()),
        "eos": tokenizer.eos_token_id,
        "token_rules": model.token_rules(),
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Path(constants.HF_ASSETS_CACHE).expanduser() / "merge-monster" / "answers" / f"{digest[:24]}.json"


def _kept(file: Path, given: Mapping[str, Sequence[int]], vocabulary: int) -> dict[str, Written] | None:
    """The answers in a file; None if they are not all there, or are not what such a file holds."""
    try:
        written = _KEPT.validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    known = all(0 <= token < vocabulary for text in written.values() for token in text.tokens)
    return written if known and written.keys() == given.keys() else None


def _keep(file: Path, written: Mapping[str, Written]) -> None:
    """Keep answers for the next run; where that can't be, they are generated anew."""
    partial = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({prompt: asdict(text) for prompt, text in written.items()}), encoding="utf-8")
        partial.replace(file)
