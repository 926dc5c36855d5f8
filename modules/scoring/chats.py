"""Chats to the texts that a model reads: by the tokenizer's own chat template, once, in a process apart.

Knows: chat templates, the process in which one is rendered. Refuses to know: token ids, torch, models; what a pair is
scored for.

A template is a stranger's program: it may loop for ever, or make a text that no memory holds. So all chats of a run are
rendered together before its work begins, in one child with limits (`template_child.py`), and never here.
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

MOST_REFUSALS = 10  # that are told one by one
# of the processor, for all chats together; most take a thousandth of a second
SECONDS = 2.0
SECONDS_OF_A_CHAT = 0.02
STARTS_IN = 300.0  # seconds by the clock that the child has for its imports
PATIENCE = 5  # how many times longer the clock may take than the processor
CONTEXTS = "contexts"  # the key that a chat is of

_PAIRS = (*PHRASES, "held_out_pairs")
_CHILD = Path(__file__).with_name("template_child.py")
_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"

Outcome = Mapping[str, Any]  # see `template_child.outcomes`


@dataclass(frozen=True)
class Rendered:
    """What a template has made of some chats."""

    texts: Mapping[Chat, str] = field(default_factory=dict)  # with the beginning of the answer
    refusals: Mapping[Chat, str] = field(default_factory=dict)  # a message for each chat that it refuses
    thoughts: Thoughts = field(default_factory=Thoughts)  # what marks them in the answers


@dataclass(frozen=True)
class Asked:
    """Prompts as a model reads them. One without a text here is the beginning of a text itself."""

    texts: Mapping[str, str] = field(default_factory=dict)
    thoughts: Thoughts = field(default_factory=Thoughts)


def chats_of(config: Config) -> list[Chat]:
    """The chats among the contexts, each once."""
    pairs = [pair for key in _PAIRS for pair in getattr(config, key)]
    return list(dict.fromkeys(pair.chat for pair in pairs if pair.chat is not None))


def chat_of(prompt: str, system: str | None = None) -> Chat:
    """What a prompt is as a chat."""
    turns = [Message("system", system)] if system is not None else []
    return Chat((*turns, Message("user", prompt)))


def has_template(tokenizer: Any) -> bool:
    """Whether prompts are asked in a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_refusals(refusals: Iterable[str], what: str) -> None:
    """Raise ConfigError if there are some; of many, with the first ones and how many more `what` there are."""
    lines = list(refusals)
    more = len(lines) - MOST_REFUSALS
    if lines:
        raise ConfigError(*lines[:MOST_REFUSALS], *([f"and {more} more {what}"] if more > 0 else []))


def render(
    tokenizer: Any, name: str, chats: Mapping[Chat, str], template: Mapping[str, Any] | None, system: str | None = None
) -> Rendered:
    """What the model reads before the phrase: each chat as the template writes it, then the beginning of the answer;
    and what the template refuses.

    name: the model's, for messages. chats: each with the key that it is of. template: settings. system: the turn that
    has a key of its own. Raises ConfigError if there is no template for a context, or if it takes too much.
    """
    if not chats:
        return Rendered()
    if not has_template(tokenizer):
        raise ConfigError(f"{name}: its tokenizer has no chat template, which the context '{next(iter(chats))}' needs")
    settings = dict(template or {})
    source = ""
    added = list[str]()
    if not _is_own_code(tokenizer):
        source = _source(tokenizer, name, settings)
        added = list(tokenizer.get_added_vocab())
        settings = {**tokenizer.special_tokens_map, **settings}
    distinct = list(dict.fromkeys(chat.messages for chat in chats))
    conversations = []
    for messages in distinct:
        conversations.append([{"role": turn.role, "content": turn.content} for turn in messages])
    found = _outcomes(tokenizer, {"template": source, "settings": settings, "conversations": conversations})
    by_messages = dict(zip(distinct, found, strict=True))
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
    return Rendered(texts, refusals, thoughts_of(source, added, settings))


def asked_of(tokenizer: Any, rendered: Rendered, prompts: Iterable[str], system: str | None = None) -> Asked:
    """Those of the prompts that were rendered; without a template, all as they are."""
    if not has_template(tokenizer):
        return Asked(thoughts=thoughts_of("", list(tokenizer.get_added_vocab()), {}))
    chats = {prompt: chat_of(prompt, system) for prompt in prompts}
    texts = {prompt: rendered.texts[chat] for prompt, chat in chats.items() if chat in rendered.texts}
    return Asked(texts, rendered.thoughts)


def within_thoughts(rendered: Rendered) -> list[Chat]:
    """The chats whose phrases are scored in the middle of a thought, since the template begins one."""
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
    """The template's text; its name is taken out of the settings. Raises ConfigError if it can't be told which one."""
    chosen = settings.pop("chat_template", None)
    named = tokenizer.chat_template
    names = list(named) if isinstance(named, Mapping) else []
    lacking = chosen not in names and "{" not in chosen if chosen else "default" not in names
    if names and lacking:
        which = f"has no chat template '{chosen}'" if chosen else "has several chat templates and no default"
        choices = ", ".join(sorted(names))
        raise ConfigError(f"{name}: {which}; choose one with template: {{chat_template: NAME}}: {choices}")
    return tokenizer.get_chat_template(chosen, settings.get("tools"))


def _is_own_code(tokenizer: Any) -> bool:
    """Whether a tokenizer writes chats by a program of its own, which came with it or with another library."""
    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _outcomes(tokenizer: Any, request: Mapping[str, Any]) -> list[Outcome]:
    """What becomes of a request's conversations. One that took too much is the last; those behind it are like it."""
    if _is_own_code(tokenizer):
        return [_by_own_code(tokenizer, request["settings"], messages) for messages in request["conversations"]]
    count = len(request["conversations"])
    found = in_child({**request, "seconds": SECONDS + SECONDS_OF_A_CHAT * count})
    return [*found, *[found[-1]] * (count - len(found))]


def _by_own_code(tokenizer: Any, settings: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> Outcome:
    """By a tokenizer that is a program itself: somebody has said that it is trusted."""
    settings = {**settings, "add_generation_prompt": True, "tokenize": False}
    try:
        return {"text": tokenizer.apply_chat_template(list(messages), **settings)}
    except Exception as error:  # whatever it raises
        return {"refusal": first_line(error)}


def in_child(request: Mapping[str, Any]) -> Sequence[Outcome]:
    """What `template_child.outcomes` makes of a request, in a process apart. At least one outcome: the last one tells
    what was beyond the limits, if something was."""
    command = [sys.executable, "-c", _START, str(_CHILD)]
    root = _CHILD.parents[2]  # from where the child finds this program, and nothing else that lies around
    too_long = f"takes longer than {request['seconds']:.0f} s"
    patience = STARTS_IN + PATIENCE * request["seconds"]
    try:
        ended = subprocess.run(
            command, input=json.dumps(request).encode(), cwd=root, capture_output=True, timeout=patience, check=False
        )
        answer = ended.stdout
        errors = ended.stderr.decode(errors="replace").strip()
        code = ended.returncode
    except subprocess.TimeoutExpired as error:
        answer = error.stdout or b""
        errors = too_long
        code = 1
    found = [json.loads(line) for line in answer.splitlines(keepends=True) if line.endswith(b"\n")]
    if code and not (found and "beyond" in found[-1]):
        words = errors.splitlines()[-1] if errors else f"crashed (exit code {code})"
        ran_out = code == -getattr(signal, "SIGXCPU", 0)
        found.append({"beyond": too_long if ran_out else shortened(words)})
    return found
