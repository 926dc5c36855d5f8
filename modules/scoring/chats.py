"""Chats to the texts that a model reads: by the tokenizer's own chat template, once.

Knows: chat templates. Refuses to know: token ids, torch, models; what a pair is scored for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from modules.config import PHRASES, Chat, Config
from modules.runtime import ConfigError, first_line

MOST_REFUSALS = 10  # that are told one by one

_PAIRS = (*PHRASES, "held_out_pairs")


def chats_of(config: Config) -> list[Chat]:
    """The chats among the contexts, each once."""
    pairs = [pair for key in _PAIRS for pair in getattr(config, key)]
    return list(dict.fromkeys(pair.chat for pair in pairs if pair.chat is not None))


def render_chats(
    tokenizer: Any, name: str, chats: Iterable[Chat], template: Mapping[str, Any] | None
) -> dict[Chat, str]:
    """What the model reads before the phrase: the chat as the template writes it, then the beginning of the answer.

    name: the model's, for messages. template: its settings. Raises ConfigError if there is no template, or for all
    chats that it refuses.
    """
    texts, refusals = dict[Chat, str](), list[str]()
    for chat in chats:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"{name}: its tokenizer has no chat template, which the context '{chat}' needs")
        try:
            texts[chat] = rendered(tokenizer, chat, template) + chat.answer
        except Exception as error:  # whatever a template raises, or runs into
            refusals.append(f"{name}: its chat template refuses the context '{chat}': {first_line(error)}")
    more = len(refusals) - MOST_REFUSALS
    if refusals:
        raise ConfigError(*refusals[:MOST_REFUSALS], *([f"and {more} more contexts"] if more > 0 else []))
    return texts


def rendered(tokenizer: Any, chat: Chat, template: Mapping[str, Any] | None) -> str:
    """A chat as the template writes it, up to where the answer begins. Raises whatever the template does."""
    turns = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **(template or {}))


def with_texts(config: Config, texts: Mapping[Chat, str]) -> Config:
    """The configuration with chats' texts as the contexts that are scored; a chat without one stays as it is."""
    return replace(
        config,
        **{
            key: tuple(
                replace(pair, context=texts[pair.chat]) if pair.chat in texts else pair for pair in getattr(config, key)
            )
            for key in _PAIRS
        },
    )
