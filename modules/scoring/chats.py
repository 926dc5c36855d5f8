"""Chats to the texts that a model reads: by the tokenizer's own chat template, once, in a separate process.

Knows: chat templates, the process in which one is rendered. Refuses to know: token ids, torch, models; what a pair is
scored for.

A template is untrusted code: it may loop for ever, or make a text too large for memory. So all chats of a run are
rendered together before its work begins, in one child process with limits (`template_child.py`), and never here.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modules.config.phrase_lists import PHRASES, Chat, Message
from modules.config.schema import Config
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.text import shortened
from modules.scoring.thoughts import Thoughts, thoughts_of

MOST_REFUSALS = 10  # with a line of their own
# Processor time: for all chats together, and for each in addition. Most take a thousandth of a second.
SECONDS = 2.0
SECONDS_OF_A_CHAT = 0.02
STARTS_IN = 300.0  # seconds of wall time that the child has for its imports
PATIENCE = 5  # limit of wall time, as a multiple of processor time
CONTEXTS = "contexts"  # the configuration's key of chats that are contexts

_PAIRS = (*PHRASES, "held_out_pairs")
_CHILD = Path(__file__).with_name("template_child.py")
_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"

Outcome = Mapping[str, Any]  # see `template_child.outcomes`


@dataclass(frozen=True)
class Rendered:
    """The texts that a template has made of chats, and those that it refused."""

    texts: Mapping[Chat, str] = field(default_factory=dict)  # with the beginning of the answer
    refusals: Mapping[Chat, str] = field(default_factory=dict)  # a message for each chat that it refuses
    thoughts: Thoughts = field(default_factory=Thoughts)  # how answers mark them


@dataclass(frozen=True)
class Asked:
    """Prompts as a model reads them. A prompt without a text here is read as it is."""

    texts: Mapping[str, str] = field(default_factory=dict)
    thoughts: Thoughts = field(default_factory=Thoughts)


def chats_of(config: Config) -> list[Chat]:
    """The distinct chats among the contexts."""
    pairs = [pair for key in _PAIRS for pair in getattr(config, key)]
    return list(dict.fromkeys(pair.chat for pair in pairs if pair.chat is not None))


def chat_of(prompt: str, system: str | None = None) -> Chat:
    """A prompt as a chat."""
    turns = [Message("system", system)] if system is not None else []
    return Chat((*turns, Message("user", prompt)))


def has_template(tokenizer: Any) -> bool:
    """Whether prompts are asked in a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_refusals(refusals: Iterable[str], what: str) -> None:
    """Raise ConfigError if there are refusals: with the first ones, and how many more `what` there are."""
    lines = list(refusals)
    omitted = len(lines) - MOST_REFUSALS
    if lines:
        raise ConfigError(*lines[:MOST_REFUSALS], *([f"and {omitted} more {what}"] if omitted > 0 else []))


def render(
    tokenizer: Any, name: str, chats: Mapping[Chat, str], template: Mapping[str, Any] | None, system: str | None = None
) -> Rendered:
    """Each chat as the model reads it before the phrase: as the template writes it, then the beginning of the answer.
    And a message for each chat that the template refuses.

    name: the model's, for messages. chats: each with its configuration key. template: settings. system: the system turn
    of prompts, which has a key of its own. Raises ConfigError if there is no template, or if it takes too much.
    """
    if not chats:
        return Rendered()
    if not has_template(tokenizer):
        raise ConfigError(f"{name}: its tokenizer has no chat template, which the context '{next(iter(chats))}' needs")
    settings = dict(template or {})
    source = ""
    added_tokens = list[str]()
    if not _is_own_code(tokenizer):
        source = _source(tokenizer, name, settings)
        added_tokens = list(tokenizer.get_added_vocab())
        settings = {**tokenizer.special_tokens_map, **settings}
    distinct = list(dict.fromkeys(chat.messages for chat in chats))
    conversations = []
    for messages in distinct:
        conversations.append([{"role": turn.role, "content": turn.content} for turn in messages])
    outcomes = _outcomes(tokenizer, {"template": source, "settings": settings, "conversations": conversations})
    by_messages = dict(zip(distinct, outcomes, strict=True))
    texts = dict[Chat, str]()
    refusals = dict[Chat, str]()
    for chat, key in chats.items():
        outcome = by_messages[chat.messages]
        shown = f"context '{chat}'" if key == CONTEXTS else f"prompt '{shortened(chat.messages[-1].content)}'"
        if "text" in outcome:
            texts[chat] = outcome["text"] + chat.answer
        elif "beyond" in outcome:
            raise ConfigError(
                f"{name}: its chat template {outcome['beyond']} for the {shown} ({key}); "
                "set another one with template: {chat_template: ...}"
            )
        else:
            key += ", system" if system is not None and chat.messages[0] == Message("system", system) else ""
            refusals[chat] = f"{name}: its chat template refuses the {shown}: {outcome['refusal']} ({key})"
    return Rendered(texts, refusals, thoughts_of(source, added_tokens, settings))


def asked_of(tokenizer: Any, rendered: Rendered, prompts: Iterable[str], system: str | None = None) -> Asked:
    """The prompts with their rendered texts; without a template, all are read as they are."""
    if not has_template(tokenizer):
        return Asked(thoughts=thoughts_of("", list(tokenizer.get_added_vocab()), {}))
    chats = {prompt: chat_of(prompt, system) for prompt in prompts}
    texts = {prompt: rendered.texts[chat] for prompt, chat in chats.items() if chat in rendered.texts}
    return Asked(texts, rendered.thoughts)


def within_thoughts(rendered: Rendered) -> list[Chat]:
    """The chats whose phrases are scored inside a thought, since the template opens one."""
    return [
        chat
        for chat, text in rendered.texts.items()
        if rendered.thoughts.opened_by(text.removesuffix(chat.answer)) and not rendered.thoughts.closed_in(chat.answer)
    ]


def with_texts(config: Config, texts: Mapping[Chat, str]) -> Config:
    """The configuration with chats' texts as the contexts that are scored; a chat without one stays as it is."""
    rendered = {}
    for key in _PAIRS:
        pairs = getattr(config, key)
        rendered[key] = tuple(replace(pair, context=texts.get(pair.chat, pair.context)) for pair in pairs)
    return replace(config, **rendered)


def _source(tokenizer: Any, name: str, settings: dict[str, Any]) -> str:
    """The template's text; its name is removed from the settings. Raises ConfigError if the choice is not clear."""
    chosen = settings.pop("chat_template", None)
    named = tokenizer.chat_template
    names = list(named) if isinstance(named, Mapping) else []
    lacking = chosen not in names and "{" not in chosen if chosen else "default" not in names
    if names and lacking:
        problem = f"has no chat template '{chosen}'" if chosen else "has several chat templates and no default"
        choices = ", ".join(sorted(names))
        raise ConfigError(f"{name}: {problem}; choose one with template: {{chat_template: NAME}}: {choices}")
    return tokenizer.get_chat_template(chosen, settings.get("tools"))


def _is_own_code(tokenizer: Any) -> bool:
    """Whether a tokenizer writes chats by its own code, which came with it or with another library."""
    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _outcomes(tokenizer: Any, request: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes of a request's conversations. If one exceeds the limits, all behind it have the same outcome."""
    if _is_own_code(tokenizer):
        return [_by_own_code(tokenizer, request["settings"], messages) for messages in request["conversations"]]
    count = len(request["conversations"])
    outcomes = in_child({**request, "seconds": SECONDS + SECONDS_OF_A_CHAT * count})
    return [*outcomes, *[outcomes[-1]] * (count - len(outcomes))]


def _by_own_code(tokenizer: Any, settings: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> Outcome:
    """The outcome of a conversation by the tokenizer's own code, which the user has marked as trusted."""
    settings = {**settings, "add_generation_prompt": True, "tokenize": False}
    try:
        return {"text": tokenizer.apply_chat_template(list(messages), **settings)}
    except Exception as error:  # whatever it raises
        return {"refusal": first_line(error)}


def in_child(request: Mapping[str, Any]) -> Sequence[Outcome]:
    """The outcomes of a request by `template_child.outcomes`, in a separate process. There is at least one; the last
    says which limit was exceeded, if any was."""
    command = [sys.executable, "-c", _START, str(_CHILD)]
    root = _CHILD.parents[2]  # from where the child imports this program's modules, and nothing else
    too_long = f"takes longer than {request['seconds']:.0f} s"
    patience = STARTS_IN + PATIENCE * request["seconds"]
    try:
        process = subprocess.run(
            command, input=json.dumps(request).encode(), cwd=root, capture_output=True, timeout=patience, check=False
        )
        answer = process.stdout
        errors = process.stderr.decode(errors="replace").strip()
        code = process.returncode
    except subprocess.TimeoutExpired as error:
        answer = error.stdout or b""
        errors = too_long
        code = 1
    outcomes = [json.loads(line) for line in answer.splitlines(keepends=True) if line.endswith(b"\n")]
    if code and not (outcomes and "beyond" in outcomes[-1]):
        reason = errors.splitlines()[-1] if errors else f"crashed (exit code {code})"
        out_of_time = code == -getattr(signal, "SIGXCPU", 0)
        outcomes.append({"beyond": too_long if out_of_time else shortened(reason)})
    return outcomes
