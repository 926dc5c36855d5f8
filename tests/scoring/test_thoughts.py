"""What is thought in a text is no part of the answer, however a template or a tokenizer marks it."""

import pytest
from thinking import SHAPES

from modules.scoring.template_child import outcomes
from modules.scoring.thoughts import thoughts_of

USER = [{"role": "user", "content": "Describe <think>ing</think> houses."}]


def of(shape):
    """What marks thoughts, and what is given before an answer."""
    asked = {"template": shape.template, "settings": shape.settings, "conversations": [USER]}
    (given,) = outcomes(asked)
    return thoughts_of(shape.template, shape.added, shape.settings), given["text"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_reader_sees_the_answer_alone(shape):
    thoughts, given = of(shape)
    opened = thoughts.opened_by(given) is not None
    assert (opened, thoughts.closing(given), thoughts.switch) == (shape.opened, shape.closing, shape.switch)
    for text, answer in shape.texts.items():
        found = thoughts.answer(text, opened)
        assert (found if found is None else found.strip()) == answer, text
    assert thoughts.closed_in(shape.closing) == bool(shape.closing)


def test_what_is_behind_a_closed_block_is_an_answer():
    thoughts, given = of(SHAPES["opened by the prompt"])
    assert thoughts.opened_by(given + "Hm.</think>") is None and thoughts.closing(given + "Hm.</think>") == ""
    assert thoughts.answer("A house. <think>Hm.</think> A garden.", False) == "A house.  A garden."
