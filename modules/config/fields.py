"""The kinds of values that keys have, and what is said of a value that is none of its kind.

Knows: types with their limits, what can be a path, a model's name, an output. Refuses to know: which keys there are.

A check that a value fails raises ValueError with what is allowed. Its `info.context` names the keys that lead to
candidates of which none is read: there they may still be missing. DUMPED in it: they are values of `Config.dumped`,
and their paths were checked when the file was read.
"""

import difflib
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    Strict,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import core_schema

from modules.config.choices import ACCELERATORS, DEVICE_PATTERN, DEVICES, STRATEGIES
from modules.config.excerpts import shown
from modules.config.locations import missing_folder, parse_location, parse_source
from modules.merging.methods import METHODS, parsed, spelled

DUMPED = "dumped"

# What the scripts of demo/ make.
MADE_BY = {
    **{f"demo/models/{name}": "demo/make_models.py" for name in ("cliche-base", "plain-prose", "apple-logic")},
    **{f"demo/real/{name}": "demo/make_real.py" for name in ("base", "plain", "reference", "careful", "overfit")},
}

# What base and merge answer where nobody asks something else: a story, a question, an instruction.
SAMPLES = (
    "The last train had gone. She was alone on the platform, and",
    "Why does bread go stale sooner in the fridge than on the table?",
    "Write a short note to a neighbour whose dog barks at night.",
)

Check = Callable[[Any], Any]  # the value to keep; raises what pydantic takes for an error

_NUMBER = re.compile(r"[+-]?\d{1,20}[.,]?\d{0,20}(e[+-]?\d{1,2})?", re.IGNORECASE)
_BESIDE = 40  # characters by which the names are longer, at most, that stand beside an output while it is made


def said(words: Callable[[Any], str]) -> WrapValidator:
    """Whatever a type refuses, for whatever reason, is answered with these words on the value."""

    def check(value: Any, validate: Check) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(words(value)) from None

    return WrapValidator(check)


def keys_of(section: type) -> BeforeValidator:
    """For a mapping that becomes a dataclass: a key of it that holds nothing is as good as absent, and all are text."""
    known = set(names_of_keys(section))

    def given(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {_encodable(key): item for key, item in value.items() if item is not None or key not in known}

    return BeforeValidator(given)


def names_of_keys(section: type) -> tuple[str, ...]:
    """The keys of a section; one that is a word of Python's is a field with an underscore behind it."""
    return tuple(field.name.removesuffix("_") for field in fields(section))


def _encodable(key: Any) -> str:
    return (key if isinstance(key, str) else shown(key)).encode(errors="backslashreplace").decode()


def listed(value: Any) -> Any:
    """For a tuple: nothing but a list of the file becomes one."""
    if not isinstance(value, list):
        raise ValueError("expected a list")
    return value


def is_number(value: Any) -> bool:
    """Whether a value from YAML or JSON is a finite number that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _number(what: str) -> WrapValidator:
    return said(lambda value: f"expected {what}{_number_as_text(value)}")


def _whole_number(low: int) -> WrapValidator:
    return said(lambda value: f"expected a whole number of at least {low}{_number_as_text(value, whole=True)}")


def _number_as_text(value: Any, whole: bool = False) -> str:
    """What to write in place of a number that YAML reads as text: 1e-3 has no point, 0,5 a comma, "0.5" quotes."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return ""
    meant = float(value.replace(",", "."))
    if whole and not meant.is_integer():
        return ""
    return f"; YAML reads this as text: write {f'{meant:.0f}' if whole else yaml.safe_dump(meant).split()[0]}"


Boolean = Annotated[bool, Strict(), said(lambda value: "expected true or false")]
_Ratio = Annotated[float, Strict(), Field(ge=0, le=1), _number("a number from 0 to 1")]
Share = Annotated[float, Strict(), Field(ge=0, lt=1), _number("a number from 0 and below 1")]
Threshold = Annotated[float, Strict(), Field(gt=0, le=1), _number("a number above 0 and up to 1")]
Percent = Annotated[float, Strict(), Field(ge=0, le=100), _number("a number from 0 to 100")]
Weight = Annotated[float, Strict(), Field(ge=0, le=1e300), _number("a number of at least 0")]
PercentAboveZero = Annotated[float, Strict(), Field(gt=0, le=100), _number("a number above 0 and up to 100")]
Limit = Annotated[float, Strict(), Field(gt=0, le=1e300), _number("a number above 0")]
AutoOrWeight = Annotated[
    Annotated[float, Strict(), Field(ge=0, le=1e300)] | Literal["auto"], _number("auto or a number of at least 0")
]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63), _whole_number(0)]
CountFromOne = Annotated[int, Strict(), Field(ge=1, lt=2**63), _whole_number(1)]


class OneOf:
    """The type of a value that is one of a few names; a list of names may still grow."""

    def __init__(self, allowed: Collection[str], *also: str) -> None:
        """also: names that an editor takes beside them."""
        self._allowed, self._also = allowed, also

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(self.checked)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        return {"enum": [*self._allowed, *self._also], "type": "string"}

    def checked(self, value: Any) -> str:
        """The value. Raises ValueError, with the nearest name, if it is none of them."""
        names = list(self._allowed)
        if isinstance(value, str) and value in names:
            return value
        guess = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else []
        hint = f"; did you mean '{guess[0]}'?" if guess else ""
        raise ValueError(f"expected {', '.join(names[:-1])} or {names[-1]}{hint}")


def _one_or_more(kind: Any) -> Any:
    """The type of a tuple that the file writes as a list or as a single value. What is wrong is said of the whole."""

    def check(value: Any, validate: Check) -> Any:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError("expected at least one value")
        try:
            return validate(values)
        except ValidationError as error:
            raise error.errors()[0]["ctx"]["error"] from None

    return Annotated[tuple[kind, ...], WrapValidator(check, json_schema_input_type=kind | list[kind])]


# Of layers, by number: one, or the first and the last of several. No model has as many as four digits can say.
_SPAN = r"\d{1,4}(\s*-\s*\d{1,4})?"


def _layers(value: Any) -> tuple[int, ...]:
    """Numbers of layers, in order, each once; written as one span or as a list of them."""
    found = set[int]()
    for item in value if isinstance(value, list) else [value]:
        is_span = isinstance(item, int | str) and re.fullmatch(_SPAN, str(item), re.ASCII)
        first, *last = map(int, str(item).split("-")) if is_span else (1, 0)
        found.update(span := range(first, (last or [first])[0] + 1))
        if not span:
            raise ValueError("expected numbers of layers, from 0 on, such as 8-24 or [0, 3, 8-12]")
    if not found:
        raise ValueError("expected at least one layer")
    return tuple(sorted(found))


_OneSpan = Annotated[int, Field(ge=0, lt=10_000)] | Annotated[str, Field(pattern=f"^{_SPAN}$")]
Layers = Annotated[tuple[int, ...], PlainValidator(_layers, json_schema_input_type=_OneSpan | list[_OneSpan])]

ROLES = ("system", "user", "assistant")
DTYPES = ("auto", "float16", "bfloat16", "float32")
# Half types with a float32 residual stream beside them.
COMPUTE_DTYPES = (*DTYPES, "float16+float32", "bfloat16+float32")
ON_ERROR = ("stop", "skip")
SEARCHES = ("greedy", "joint")

Device = Annotated[
    str,
    Strict(),
    Field(pattern=DEVICE_PATTERN, examples=["auto", "cpu", *ACCELERATORS]),
    said(lambda value: f"expected {DEVICES}"),
]
ComputeDtype = Annotated[str, OneOf(COMPUTE_DTYPES)]
Dtype = Annotated[str, OneOf(DTYPES)]
_METHOD_NAME = OneOf(METHODS)


def _method(value: Any) -> str:
    """A method's text, from its name or from a mapping of its name and its parameters."""
    name, parameters = value, {}
    if isinstance(value, Mapping):
        name = value.get("name")
        parameters = {str(key): item for key, item in value.items() if key != "name"}
    elif isinstance(value, str) and "(" in value:
        name, parameters = parsed(value)
    return spelled(_METHOD_NAME.checked(name), parameters)


def _method_schema() -> dict[str, Any]:
    """What an editor takes: a name, or a mapping with a name."""
    name = {"enum": list(METHODS), "type": "string"}
    mapping = {"type": "object", "properties": {"name": name}, "required": ["name"]}
    return {"anyOf": [name, mapping]}


Methods = _one_or_more(Annotated[str, PlainValidator(_method), WithJsonSchema(_method_schema())])
OnError = Annotated[str, OneOf(ON_ERROR)]
Ratios = _one_or_more(_Ratio)
Role = Annotated[str, OneOf(ROLES)]
Search = Annotated[str, OneOf(SEARCHES)]
Strategy = Annotated[
    str,
    OneOf(STRATEGIES, "quantitative"),
    BeforeValidator(lambda value: "quantitive" if value == "quantitative" else value),
]


def _about_text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return "holds half of a character (a lone surrogate)"
    return "expected text" + (" (put it in quotes)" if isinstance(value, bool | int | float) else "")


Text = Annotated[str, Strict(), Field(pattern=r"\S"), said(_about_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(listed)]
EmptyOrText = Annotated[str, Strict(), Field(pattern=r"^$|\S"), said(_about_text)]


# What transformers' apply_chat_template takes beside a template's settings, and what is the program's to say.
_NOT_OF_A_TEMPLATE = {
    *("conversation", "messages", "add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


def _template(value: Any) -> dict[str, Any]:
    """Settings of a chat template, as they can be written down."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("expected a mapping of names to values")
    taken = sorted(_NOT_OF_A_TEMPLATE & value.keys())
    if taken:
        raise ValueError(f"{taken[0]} is none of a chat template's settings")
    try:
        return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError):
        raise ValueError("expected text, numbers, true and false, and lists and mappings of them") from None


Template = Annotated[dict[str, Any], PlainValidator(_template, json_schema_input_type=dict[str, Any])]


def unusable(path: Path) -> str | None:
    """Why nothing can be at this path, such as too long a name; None if something is, or could be."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _path(text: str) -> Path:
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # there is no such user
        raise ValueError(f"not a usable path ({error})") from None
    trouble = unusable(path)
    if trouble:
        raise ValueError(f"not a usable path ({trouble})")
    return path


def is_dumped(info: ValidationInfo) -> bool:
    """Whether the values come from `Config.dumped`."""
    return DUMPED in (info.context or ())


def _any_path(text: str, info: ValidationInfo) -> str:
    return text if is_dumped(info) else str(_path(text))


def _folder(text: str, info: ValidationInfo) -> str:
    if is_dumped(info):
        return text
    path = _path(text)
    if "model_directory" not in (info.context or ()) and not path.is_dir():
        raise ValueError("no such folder")
    return str(path)


def _base(text: str, info: ValidationInfo) -> str:
    return _model_named(text, parse_location, info)


def _candidate(text: str, info: ValidationInfo) -> str:
    """A model, an adapter, or both joined by a plus."""
    not_read = "models_to_merge" in (info.context or ())
    return _any_path(text, info) if not_read else _model_named(text, parse_source, info)


def _model_named(text: str, parse: Callable[[str], object], info: ValidationInfo) -> str:
    """A folder or an id of the hub. Whether the hub has it can't be known here."""
    if is_dumped(info):
        return text
    path = _path(text)
    if parse(text) is None:
        script = MADE_BY.get(path.as_posix())
        words = f"no such folder; python {script} makes it" if script else missing_folder(text)
        raise ValueError(_encodable(words))  # a folder's name that is told may be no UTF-8
    return text


def _output(text: str, info: ValidationInfo) -> str:
    if is_dumped(info):
        return text
    if not text:
        raise ValueError("expected text")
    path = _path(text)
    try:
        whole = path.resolve()
    except OSError:
        raise ValueError("the folder that you are in is gone; go to one that is there") from None
    if not whole.name:
        raise ValueError("a whole file system can't be an output; name a folder in it")
    if path.name in ("", ".."):
        path = whole
    if unusable(whole.with_name(whole.name + "-" * _BESIDE)):
        raise ValueError(f"its name is too long; the names that stand beside it for a while add {_BESIDE} to it")
    return str(path)


AnyPath = Annotated[Text, AfterValidator(_any_path)]
Paths = Annotated[tuple[AnyPath, ...], BeforeValidator(listed)]
Folder = Annotated[Text, AfterValidator(_folder)]
Model = Annotated[Text, AfterValidator(_base)]
Candidates = Annotated[tuple[Annotated[Text, AfterValidator(_candidate)], ...], BeforeValidator(listed)]
Output = Annotated[EmptyOrText, AfterValidator(_output)]
