"""A stranger's template in a process of its own: it writes what transformers does, and can't take what it likes."""

import time

import pytest
from chats import CHATML, LLAMA_3, chat_tokenizer

from modules.config.phrase_lists import Chat, Message
from modules.runtime.errors import ConfigError
from modules.scoring import chats
from modules.scoring.chats import in_child, render
from modules.scoring.template_child import LONGEST

USER, OTHER = Message("user", "Where is the apple? \U0001f642 \ud800"), Message("assistant", "In the kitchen.")
CHATS = [Chat((USER,)), Chat((USER, OTHER, USER), "The "), Chat((USER,), "It is"), Chat((USER, USER))]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": LOOPS,
    "a loop for the second chat": "{% if messages | length > 1 %}" + LOOPS + "{% endif %}",
    "memory": "{{ 'x' * 8000000000 }}",
    "many texts": "{% set n = namespace(t='x' * 99999) %}{% for a in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "a long text": "{{ 'x' * " + str(LONGEST + 1) + " }}",
}


@pytest.fixture
def in_a_child(monkeypatch):
    monkeypatch.setattr(chats, "in_child", in_child)


def asked_of(template, *conversations, seconds=0.5):
    messages = [[{"role": turn.role, "content": turn.content} for turn in chat.messages] for chat in conversations]
    return {"template": template, "settings": {"bos_token": "<s>"}, "conversations": messages, "seconds": seconds}


def test_a_child_answers_as_transformers_does(in_a_child):
    tokenizer = chat_tokenizer(LLAMA_3, adds_bos=True)
    found = render(tokenizer, "base", dict.fromkeys(CHATS, "contexts"), {"more": [1, {"a": None}]})
    assert not found.refusals
    for chat in CHATS:
        turns = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert found.texts[chat] == text + chat.answer


@pytest.mark.sampled(8)
@pytest.mark.parametrize("template", HOSTILE.values(), ids=list(HOSTILE))
def test_what_takes_too_much_is_ended_in_time(template):
    began = time.monotonic()
    found = in_child(asked_of(template, CHATS[0], CHATS[1], seconds=1))
    assert set(found[-1]) == {"beyond"} and len(found) == 1 + (template == HOSTILE["a loop for the second chat"])
    assert time.monotonic() - began < 30  # in a few seconds, on a machine that has nothing else to do


def test_what_takes_too_much_is_no_refusal(in_a_child, monkeypatch):
    """It ends a run, also where a refusal would not."""
    monkeypatch.setattr(chats, "SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"^models/base: its chat template takes longer .*'Where is .*\(samples\)"):
        render(chat_tokenizer(LOOPS), "models/base", {CHATS[0]: "samples"}, None)


def test_an_interpreter_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(chats, "_START", "raise SystemExit('no such library')")
    assert in_child(asked_of(CHATML, CHATS[0])) == [{"beyond": "no such library"}]


def test_a_refusal_names_model_and_key():
    system = "Answer in plain words."
    pairs = {Chat((Message("system", system), USER)): "discover.prompts", Chat((OTHER, USER)): "contexts"}
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('only users begin') }}{% endif %}"
    found = render(chat_tokenizer(template), "models/base", pairs, None, system)
    first, second = found.refusals.values()
    assert first.startswith("models/base: ") and "only users begin (discover.prompts, system)" in first
    assert second.endswith("only users begin (contexts)") and found.texts == {}


@pytest.mark.parametrize("chosen, words", [(None, "no default"), ("rags", "no chat template 'rags'")])
def test_of_several_templates_one_is_picked(chosen, words):
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = {"rag": "r: {{ messages[0].content }}", "tool_use": "t"}
    found = render(tokenizer, "base", {CHATS[0]: "contexts"}, {"chat_template": "rag"})
    assert found.texts == {CHATS[0]: f"r: {USER.content}"}
    with pytest.raises(ConfigError, match=rf"^base: has .*{words}.*template: .*rag, tool_use"):
        render(tokenizer, "base", {CHATS[0]: "contexts"}, {"chat_template": chosen} if chosen else None)


def test_a_tokenizer_that_is_a_program_writes_chats_itself():
    class Own(type(chat_tokenizer(CHATML))):
        def apply_chat_template(self, conversation, **settings):
            return f"{len(conversation)} {sorted(settings)}"

    tokenizer = chat_tokenizer(CHATML)
    tokenizer.__class__ = Own
    found = render(tokenizer, "base", {CHATS[1]: "contexts"}, {"more": 1})
    assert found.texts == {CHATS[1]: "3 ['add_generation_prompt', 'more', 'tokenize']The "}


def test_without_chats_no_child_is_started(monkeypatch):
    monkeypatch.setattr(chats, "in_child", None)
    assert render(chat_tokenizer(None), "base", {}, None).texts == {}
