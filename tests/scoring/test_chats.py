"""Chats as contexts: what the template writes, each special token once, and what can't be rendered."""

from dataclasses import replace

import pytest
from chats import CHATML, GEMMA, LLAMA_3, MISTRAL, RAISING, STRIPPING, chat_tokenizer
from tiny import WithoutOffsets

from modules.config.phrase_lists import Chat, Message, Pair
from modules.runtime.errors import ConfigError
from modules.scoring.chats import CONTEXTS, MOST_REFUSALS, chat_of, check_refusals, render
from modules.scoring.packing import build_packs
from modules.scoring.tokenization import doubled_tokens, doubtful_phrases, encode_contexts, encode_pairs, encode_prompt

SYSTEM = Message("system", "Answer in plain words.")
USER = Message("user", " Where is the apple? ")
TALK = (USER, Message("assistant", "In the kitchen."), Message("user", "Explain your reasoning."))
ANSWERS = ("", "The apple is in the ", "Her eyes were filled with")
SHAPES = {
    "ChatML": (CHATML, [(USER,), (SYSTEM, USER), TALK]),
    "Llama 3": (LLAMA_3, [(USER,), (SYSTEM, USER), (SYSTEM, *TALK)]),
    "Gemma": (GEMMA, [(USER,), TALK]),
    "Mistral": (MISTRAL, [(USER,), TALK]),
    "Mistral, system": (MISTRAL, [(SYSTEM, USER), (SYSTEM, *TALK)]),
    "strips": (STRIPPING, [(USER,), (SYSTEM, USER), TALK]),
}


def rendered(tokenizer, chats, template=None):
    found = render(tokenizer, "models/base", dict.fromkeys(chats, CONTEXTS), template)
    check_refusals(found.refusals.values(), CONTEXTS)
    return found.texts


def pairs_of(tokenizer, chats, phrase="bedroom", template=None):
    texts = rendered(tokenizer, chats, template)
    return [Pair("BAD", phrase, texts[chat], chat=chat) for chat in chats]


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("family, adds_bos", [("bpe", False), ("bpe", True), ("spm", True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_the_template_and_the_text(shape, family, adds_bos, offsets):
    template, chats = SHAPES[shape]
    tokenizer = chat_tokenizer(template, family, adds_bos)
    chats = [Chat(messages, answer) for messages in chats for answer in ANSWERS]
    pairs = pairs_of(tokenizer, chats)
    used = tokenizer if offsets else WithoutOffsets(tokenizer)
    for pair, found in zip(pairs, encode_pairs(used, pairs, 10**6, None), strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in pair.chat.messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert pair.context == text + pair.chat.answer
        whole = tokenizer(text + pair.chat.answer + "bedroom", add_special_tokens=False)["input_ids"]
        assert list(found.tokens) == whole
        # The template's own ids stand before it; a space at their end is the next word's beginning.
        own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        own = own[:-1] if text.endswith(" ") else own
        assert whole[: len(own)] == own
        assert found.tokens.count(tokenizer.bos_token_id) == template.count("{{ bos_token }}")
        assert tokenizer.decode(found.tokens[found.start :]).strip() == "bedroom"
        (root,) = encode_contexts(used, [pair.context], 10**6, [pair.chat])
        assert root.tokens == found.tokens[: found.start] and root.chat == pair.chat
    assert doubled_tokens(tokenizer, pairs) == []


@pytest.mark.parametrize("offsets", [True, False])
def test_what_a_template_writes_is_left_as_it_is(offsets):
    """Even where a message begins with what the template, and the tokenizer for other texts, begins with."""
    tokenizer = chat_tokenizer("{{ bos_token }}{{ messages[0].content }}", adds_bos=True)
    pairs = pairs_of(tokenizer, [Chat((Message("user", "<s>Where is the apple? "),))])
    (found,) = encode_pairs(tokenizer if offsets else WithoutOffsets(tokenizer), pairs, 10**6, None)
    whole = tokenizer(pairs[0].context + "bedroom", add_special_tokens=False)["input_ids"]
    assert list(found.tokens) == whole and whole[:2] == [tokenizer.bos_token_id] * 2


def test_a_prompt_of_a_sample_is_the_same_chat():
    tokenizer = chat_tokenizer(CHATML)
    (pair,) = pairs_of(tokenizer, [Chat((USER,))], template={"enable_thinking": False})
    (asked,) = rendered(tokenizer, [chat_of(USER.content)], {"enable_thinking": False}).values()
    tokens = encode_prompt(tokenizer, USER.content, 10**6, None, asked)
    assert tokens == tokenizer(pair.context, add_special_tokens=False)["input_ids"]
    assert pair.context.endswith("assistant\n<think>\n\n</think>\n\n")
    assert not pairs_of(tokenizer, [Chat((USER,))])[0].context.endswith("\n\n")


def test_a_shared_template_is_computed_once():
    """The packed tokens are those of a tree: what the chats begin with is in it once."""
    tokenizer = chat_tokenizer(LLAMA_3)
    chats = [Chat((SYSTEM, USER), answer) for answer in ("", "The ", "The apple is ", "Her ")]
    pairs = [pair for phrase in ("bedroom", "kitchen") for pair in pairs_of(tokenizer, chats, phrase)]
    encoded = encode_pairs(tokenizer, pairs, 10**6, None)
    (pack,) = build_packs(encoded, "forest", 10**6)
    prefixes = {item.tokens[:end] for item in encoded for end in range(1, len(item.tokens))}
    assert pack.tokens == len(prefixes)
    template = len(tokenizer(pairs[0].context, add_special_tokens=False)["input_ids"])
    added = sum(len(item.tokens) - template for item in encoded)
    assert pack.tokens <= template + added < 2 * template


def test_what_is_listed_twice_is_told():
    tokenizer = chat_tokenizer(STRIPPING)
    spaced, plain = Chat((USER,)), Chat((Message("user", USER.content.strip()),))
    pairs = pairs_of(tokenizer, [spaced, plain])
    (doubt,) = doubtful_phrases(pairs)
    assert doubt == "the phrase 'bedroom' after 'user: Where is the apple? ▸ ' is listed twice and counts double"
    # The same text as no chat is not the same: the tokenizer begins it with BOS.
    assert doubtful_phrases([pairs[0], replace(pairs[1], chat=None)]) == []


def test_a_chat_is_shown_on_one_line():
    long = Message("user", "Describe an old house\nby the sea " + "and its garden " * 10)
    assert str(Chat((SYSTEM, long), "The house")) == (
        "system: Answer in plain words. user: Describe an old house by the sea and ... ▸ The house"
    )


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(ConfigError, match="models/base: its tokenizer has no chat template, which the context 'user: "):
        rendered(chat_tokenizer(None), [Chat((USER,), "The")])
    assert rendered(chat_tokenizer(None), []) == {}


def test_a_template_that_raises_is_told_in_its_words():
    chats = [Chat((USER,), f"{number} ") for number in range(MOST_REFUSALS + 2)]
    with pytest.raises(ConfigError) as caught:
        rendered(chat_tokenizer(RAISING), chats)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "models/base: its chat template refuses the context 'user: Where is the apple? ▸ 0 ': never today (contexts)"
    )
    assert len(lines) == MOST_REFUSALS + 1 and lines[-1] == "and 2 more contexts"
    for template, messages, words in (
        (GEMMA, (SYSTEM, USER), "System role not supported"),
        (MISTRAL, (USER, USER), "roles must alternate"),
        ("{{ nobody.there }}", (USER,), "'nobody' is undefined"),
        ("{% if %}", (USER,), "Expected an expression"),
    ):
        with pytest.raises(ConfigError, match=f"base: its chat template refuses the context .*{words}"):
            rendered(chat_tokenizer(template), [Chat(messages)])
