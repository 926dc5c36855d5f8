"""The base's answers to prompts, written once, at the start of a run: text for drift as in the model's use, and the
reference for the merge's answers.

Knows: which prompts count in a search and which are only shown, where answers are cached. Refuses to know: how a text
is sampled, how drift is measured on it.
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
from modules.scoring.samples import DEFAULT, Written, batches, encoded, sample

MOST_SAMPLES = 3  # answers that are shown beside the merge's, unless the key samples is set


@dataclass(frozen=True)
class Answer:
    """A prompt as the model reads it, and the model's answer."""

    prompt: str
    given: tuple[int, ...]  # token ids
    written: Written


@dataclass(frozen=True)
class Answers:
    """The answers of one model."""

    shown: tuple[Answer, ...] = ()  # for drift that takes no part in a search
    weighed: tuple[Answer, ...] = ()  # for drift that trials are judged by
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
        """All distinct prompts."""
        return tuple(dict.fromkeys((*self.shown, *self.weighed, *self.samples)))


def prompts_of(config: Config, for_chats: bool) -> Prompts:
    """The prompts: one half for shown drift; of the other half, as many as a search needs that weighs drift.

    for_chats: whether the base has a chat template. Raises ConfigError for files without prompts.
    """
    wanted = config.own_texts != ()
    prompts = read_prompts(config.own_texts, for_chats, "own_texts") if wanted else ()
    # Twice as many as needed if every answer had the longest length.
    count = -(-config.neutral_tokens // DEFAULT.tokens) if config.is_guarded else 0
    return Prompts(prompts[::2], prompts[1::2][:count], config.samples or ())


def base_answers(
    model: ResidentModel, tokenizer: Any, config: Config, asked: Asked, console: Console, noted: Answers = NO_ANSWERS
) -> Answers:
    """The base's answers, from the cache if it has answered before. asked: the prompts as it reads them. noted: its
    earlier answers in this run.

    If it can't answer, there is a warning; that is no reason to lose a merge.
    """
    prompts = prompts_of(config, has_template(tokenizer))
    answered = {answer.prompt: answer for answer in noted.all}
    unanswered = [prompt for prompt in prompts.all if prompt not in answered]
    readable = [prompt for prompt in unanswered if prompt in asked.texts or not has_template(tokenizer)]
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
    if answers.shown and not any(answer.written.without_end for answer in (*answers.shown, *answers.weighed)):
        console.warning("own_texts: the base's answers are all empty, so drift is measured on neutral text only")
        return Answers(samples=answers.samples)
    return answers


def _answered(
    model: ResidentModel, tokenizer: Any, given: Mapping[str, Sequence[int]], seed: int, console: Console
) -> dict[str, Written]:
    """The base's answers, read from the cache, or generated and written to it."""
    file = _cache_file(model, tokenizer, given, seed)
    written = _read_cache(file, given, model.vocabulary)
    if written is None:
        console.timed(f"Generating the base's answers to {pluralize(len(given), 'prompt')}")
        written = generate_answers(model, tokenizer, given, seed, console)
        _write_cache(file, written)
    return written


def generate_answers(
    model: ResidentModel, tokenizer: Any, given: Mapping[str, Sequence[int]], seed: int, console: Console
) -> dict[str, Written]:
    """The present model's answer to each prompt. given: token ids by prompt. Raises as `sample` does."""
    written: dict[str, Written] = {}

    def generate() -> None:
        with console.progress(len(given)) as bar:
            for batch in batches(model, given):
                texts = sample(model, tokenizer, {prompt: given[prompt] for prompt in batch}, seed)
                written.update({prompt: text for prompt, (text,) in zip(batch, texts, strict=True)})
                bar.update(len(batch))

    retry_on_oom(generate)
    return written


@contextmanager
def only_warned(console: Console) -> Iterator[None]:
    """Turn any error in the block into a warning: a model that can't answer is no reason to lose a merge."""
    try:
        with without_panics():
            yield
    except Exception as error:  # of an architecture, of its settings, of a device
        console.warning(f"can't generate answers: {first_line(error)}")


# -- the cache ---------------------------------------------------------------------------------------------------------

_CACHED = TypeAdapter(dict[str, Written])


def _cache_file(model: ResidentModel, tokenizer: Any, given: Mapping[str, Sequence[int]], seed: int) -> Path:
    """The cache's file for these answers, named by a digest of everything that they depend on."""
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


def _read_cache(file: Path, given: Mapping[str, Sequence[int]], vocabulary: int) -> dict[str, Written] | None:
    """The answers in a file; None if the file can't be read, has other prompts or has invalid tokens."""
    try:
        written = _CACHED.validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    are_valid = all(0 <= token < vocabulary for text in written.values() for token in text.tokens)
    return written if are_valid and written.keys() == given.keys() else None


def _write_cache(file: Path, written: Mapping[str, Written]) -> None:
    """Write answers for the next run. If they can't be written, the next run generates them anew."""
    partial = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({prompt: asdict(text) for prompt, text in written.items()}), encoding="utf-8")
        partial.replace(file)
