"""How a GGUF file's byte-level tokenizer cuts text into words before it merges bytes: by the name that the file gives.

Knows: the names in tokenizer.ggml.pre, and the rule that each stands for. Refuses to know: vocabularies, files.

A GGUF file has only the name. What it stands for is written down in llama.cpp's src/llama-vocab.cpp, and in the
tokenizer.json of the models that had the rule first; transformers has some of the names, and takes GPT-2's rule for
all others.
"""

from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from modules.runtime.text import shortened

_SENTENCE_MARKS = r"\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C}"
_HAN_AND_HANGUL = r"[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"
_HAN_AND_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
_DEEPSEEK_3 = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cut(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cut at what matches the first pattern, the rest at what matches the next, and so on."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGIT_BY_DIGIT = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT_2])
_FALCON = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        _GPT_2,
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)

_RULES = (
    (
        _GPT_2,
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4 modern-bert roberta-bpe "
        "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code",
    ),
    (_DIGIT_BY_DIGIT, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_FALCON, "falcon"),
    (_cut(rf" ?[^({_SENTENCE_MARKS})]+"), "bloom poro-chat gpt3-finnish"),
    (_cut(rf" ?[^({_SENTENCE_MARKS})]+", r"\p{N}"), "viking"),
    (
        _cut(r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", _DEEPSEEK_MARKS, r"\s+$", _HAN_AND_HANGUL, r"\p{N}+"),
        "deepseek-llm",
    ),
    (_cut(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, r"\p{N}"), "deepseek-coder"),
    (_cut(r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK_3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (_cut(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "stablelm2 hunyuan solar-open grok-2"),
    (_cut(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "glm4 chatglm-bpe"),
)
_BY_NAME = {name: _cut(pattern) for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()}
_BY_NAME |= {name: rule for rule, names in _RULES for name in names.split()}

_NOT_SAID = (None, "", "default")

# Names that stand for more than where text is cut, unless the file says otherwise.
_LIKE_LLAMA_3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
_LIKE_LLAMA_3 |= {"jina-v5-nano", "tekken"}
BEGINS_WITH_BOS = frozenset(_LIKE_LLAMA_3 | {"chameleon"})
TAKES_WHOLE_WORDS = frozenset(_LIKE_LLAMA_3 | {"minicpm5", "youtu", "granite-embed-multi-97m"})  # before it merges

# What the rules cut in different ways: contractions, digits, runs of spaces and of line ends, marks, other scripts.
TEXTS = (
    "It's what they'LL say: we've, I'm, you're, he'd, can't, DON'T.",
    "'Tis the dogs' day, y'all; rock'n'roll",
    "In 2024, 12345678 of 1,000,000 cost $3.14159 or 99%.",
    "1. One\n2. Two\n\n10. Ten\n   11. Eleven\n",
    "the year  1984   and 7even 4ever A4 x2y",
    "def f(x):\n    if x != 10:\n        return x**2  # note\n\n\n\treturn [0]\r\n",
    "a.b_c->d::e(f)[g]{h};i=j+k/l\\m|n&o^p~q`r",
    "Well... she said, \"No!\" -- and left (quickly).\n\n\"Why?!\"\n",
    "   leading and trailing   ",
    "tabs\tand\t\tmore \t mixed\n \n  \n   x",
    "CamelCaseWords HTTPServer iPhone McDonald",
    "Crème brûlée, naïve café, Straße, cafe\u0301",
    "日本語のテキスト、 漢字とかな。中文2024年3月",
    " 中文 한국어 텍스트입니다 ไทย हिन्दी",
    "Привет, мир! Γειά σου 12 עברית العربية، نعم۔",
    "🙂🙂 👩‍👩‍👧 \U0001d400\U0001d401 ½ ² Ⅷ ٣٤",
    "http://example.com/a/b?c=1&d=2#e @name #tag <tag attr='x'>",
)  # fmt: skip


def settle_split(backend: Tokenizer, name: str | None) -> list[str]:
    """Have a byte-level tokenizer cut text as the name says; a line if that can't be known."""
    rule = _BY_NAME.get(name or "")
    if rule is not None:
        backend.pre_tokenizer = rule
        return []
    if name not in _NOT_SAID:
        return [f"its pre-tokenizer {name} (tokenizer.ggml.pre) is not known here, so texts may become other tokens"]
    for rule in _BY_NAME.values():
        text = _first_difference(backend, rule) if _makes_all_tokens(rule, backend) else None
        if text is not None:  # with this vocabulary it makes a difference
            texts = f"texts like {shortened(repr(text))}"
            return [f"the file names no pre-tokenizer (tokenizer.ggml.pre), so {texts} may become other tokens"]
    return []


def _first_difference(backend: Tokenizer, rule: pre_tokenizers.PreTokenizer) -> str | None:
    """A text that becomes other tokens by a rule than as it is; None if all of TEXTS become the same."""
    before = _encoded(backend)
    used, backend.pre_tokenizer = backend.pre_tokenizer, rule
    after = _encoded(backend)
    backend.pre_tokenizer = used
    return next((text for text, one, two in zip(TEXTS, before, after, strict=True) if one.ids != two.ids), None)


def _makes_all_tokens(rule: pre_tokenizers.PreTokenizer, backend: Tokenizer) -> bool:
    """Whether a vocabulary may have come about by a rule: it cuts none of the tokens of which TEXTS are made."""
    pairs = zip(TEXTS, _encoded(backend), strict=True)
    pieces = {text[start:end] for text, encoding in pairs for start, end in encoding.offsets}
    return all(len(rule.pre_tokenize_str(piece)) == 1 for piece in pieces)


def _encoded(backend: Tokenizer) -> list[Encoding]:
    return [backend.encode(text, add_special_tokens=False) for text in TEXTS]  # no batch: that would start threads
