"""Chat templates that let a model think, in the shapes that real ones have, and what models write by them."""

from dataclasses import dataclass, field

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@dataclass(frozen=True)
class Shape:
    template: str
    texts: dict  # what is written -> what a reader sees of it
    opened: bool = False  # whether the beginning of an answer is the beginning of a thought
    settings: dict = field(default_factory=dict)
    added: tuple = ()  # tokens of the tokenizer that the template has nothing of
    switch: str | None = None
    closing: str = ""


SHAPES = {
    "opened by the prompt": Shape(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        {"Hm.\n</think>\n\nA house.": "A house.", "Hm, <tag> and so on": "", "Hm.</think>": ""},
        opened=True,
        closing="\n</think>\n\n",
    ),
    "opened in one word, by a name of its own": Shape(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<inner_thought>{% endif %}",
        {"Hm.</inner_thought>A house.": "A house.", "Hm.": ""},
        opened=True,
        closing="</inner_thought>",
    ),
    "a switch, off by a closed block": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content is defined %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        {"<think>\nHm.\n</think>\n\nA house.": "A house.", "A house.": None, "<think>\nHm.": "", "I <b>see</b>": None},
        switch="enable_thinking",
    ),
    "the same, switched off": Shape(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        {"A house.": None},
        settings={"enable_thinking": False},
    ),
    "a switch between opened and closed": Shape(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if thinking %}<ponder>{% else %}</ponder>{% endif %}{% endif %}",
        {"Hm.</ponder>A house.": "A house."},
        settings={"thinking": True},
        opened=True,
        switch="thinking",
        closing="</ponder>",
    ),
    "only the end is known": Shape(
        "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        {"Hm.\n</think>\nA house.": "A house.", "<think>Hm.</think>A <think>b</think>house.": "A house."},
    ),
    "channels": Shape(
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
        "<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        {
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A house.": "A house.",
            "<|channel|>final<|message|>A house.": "A house.",
            "<|channel|>analysis<|message|>Hm. Final": "",
            "<|channel|>commentary<|message|>I see.": "I see.",
        },
    ),
    "a channel that the prompt opens": Shape(
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|channel|>analysis<|message|>{% endif %}",
        {"Hm.<|end|><|start|>assistant<|channel|>final<|message|>A house.": "A house.", "Hm.": ""},
        opened=True,
    ),
    "channels that only the tokenizer has": Shape(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        {"<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>A house.": "A house."},
        added=("<|channel|>", "<|message|>"),
    ),
    "a channel with an end of its own": Shape(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>model\n"
        "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}",
        {"<|channel>thought\nHm.\n<channel|>A house.": "A house."},
        settings={"enable_thinking": True},
        switch="enable_thinking",
    ),
    "square brackets that only the tokenizer has": Shape(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}",
        {"[THINK]Hm.[/THINK]A house.": "A house.", "[INST] A [/INST] house.": None},
        added=("[INST]", "[/INST]", "[THINK]", "[/THINK]"),
    ),
    "start and end": Shape(
        "{% for m in messages %}<|START_TURN|>{{ m.role }}: {{ m.content }}<|END_TURN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_TURN|>chatbot: {% if reasoning %}<|START_THINKING|>{% endif %}"
        "{% endif %}",
        {"Hm.<|END_THINKING|><|START_RESPONSE|>A house.": "<|START_RESPONSE|>A house."},
        settings={"reasoning": True},
        added=("<|START_THINKING|>", "<|END_THINKING|>"),
        opened=True,
        closing="<|END_THINKING|>",
    ),
    "a name behind the token of a turn": Shape(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>think\n{% endif %}",
        {"Hm.<|im_end|>\n<|im_start|>answer\nA house.": "A house.", "Hm.": ""},
        opened=True,
    ),
    "no thoughts": Shape(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        {"A <b>house</b>.": None, "<think>To the letter.</think>": None},
    ),
    "a tag around every answer": Shape(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        {"A house.</assistant>": None},
        added=("<tool_call>", "</tool_call>"),
    ),
}
