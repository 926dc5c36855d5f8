"""How a GGUF file's byte-level tokenizer cuts text into words before it merges bytes, by the rule's name in the file.

Knows: the names in tokenizer.ggml.pre, and the rule of each. Refuses to know: vocabularies, files.

A GGUF file has only the name. The rules are defined in llama.cpp's src/llama-vocab.cpp, and in the tokenizer.json of
the models that had them first. transformers knows some of the names, and uses GPT-2's rule for all others.
"""

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

_SENTENCE_MARKS = r"\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C}"
_HAN_AND_HANGUL = r"[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"
_HAN_AND_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
_DEEPSEEK_3 = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cut(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """A rule that cuts at matches of the first pattern, then cuts the pieces at matches of the next, and so on."""
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

# Names that also imply other settings, unless the file sets them.
_LIKE_LLAMA_3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
_LIKE_LLAMA_3 |= {"jina-v5-nano", "tekken"}
BEGINS_WITH_BOS = frozenset(_LIKE_LLAMA_3 | {"chameleon"})
TAKES_WHOLE_WORDS = frozenset(_LIKE_LLAMA_3 | {"minicpm5", "youtu", "granite-embed-multi-97m"})  # before it merges


def settle_split(backend: Tokenizer, name: str | None) -> list[str]:
    """Set a byte-level tokenizer's cutting rule by its name; returns a line if the name is missing or unknown."""
    rule = _BY_NAME.get(name or "")
    if rule is not None:
        backend.pre_tokenizer = rule
        return []
    stated = "the file names no pre-tokenizer" if name in _NOT_SAID else f"its pre-tokenizer {name} is unknown"
    return [f"{stated} (tokenizer.ggml.pre), so texts may be tokenized differently"]
