"""The kinds of values that keys have.

Knows: types with their limits, what can be a path, a model's name, an output. Refuses to know: which keys there are.

The context of a validation is a set of what must exist: MERGE, SCORE or MAP. Without a context nothing is checked on
the disk: a dumped configuration may name folders of another machine.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

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
from pydantic_core import PydanticCustomError

from modules.config.choices import ACCELERATORS, DEVICE_PATTERN, DEVICES, STRATEGIES
from modules.config.locations import missing_folder, parse_location, parse_source
from modules.merging.methods import METHODS, parsed, spelled

MAP = frozenset({"base"})  # candidates and output may be absent
SCORE = MAP | {"candidates"}
MERGE = SCORE | {"folders", "output"}

# By folder, the script that makes the models in it.
MADE_BY = {"demo/models": "demo/make_models.py", "demo/real": "demo/make_real.py"}
_BESIDE = 40  # the most characters that are added to an output's name while it is written

# ---------------------------------------------------------------------------------------------------------------------
# Numbers, names, texts
# ---------------------------------------------------------------------------------------------------------------------


def _with_exponent(value: Any) -> Any:
    """Convert a number with an exponent. YAML 1.1 reads 1e-3 (no point) and 1.5e3 (no sign) as text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,3}", value, re.ASCII):
        return float(value)
    return value


def number(**limits: float) -> Any:
    """The type of a finite number within limits, as pydantic's Field calls them."""
    return Annotated[float, Strict(), Field(allow_inf_nan=False, **limits), BeforeValidator(_with_exponent)]


def _auto_or_number(value: Any, validate: Callable[[Any], float]) -> float | str:
    if value == "auto":
        return value
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("expected auto or a number of at least 0") from None


def one_or_more(kind: Any) -> Any:
    """The type of a tuple that the file writes as a list or as a single value."""

    def listed(value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    return Annotated[
        tuple[kind, ...],
        BeforeValidator(listed, json_schema_input_type=kind | list[kind]),
        AfterValidator(not_empty),
    ]


def not_empty(values: tuple) -> tuple:
    """Raise ValueError if there is no value."""
    if not values:
        raise ValueError("expected at least one value")
    return values


def is_number(value: Any) -> bool:
    """Whether a value from YAML or JSON is a finite number that a float can hold. true and false are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


Boolean = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
CountFromOne = Annotated[int, Strict(), Field(ge=1, lt=2**63)]
Weight = number(ge=0, le=1e300)
Limit = number(gt=0, le=1e300)
AutoOrWeight = Annotated[Weight, WrapValidator(_auto_or_number, json_schema_input_type=Literal["auto"] | Weight)]

DTYPES = ("auto", "float16", "bfloat16", "float32")
# Half types with a float32 residual stream beside them.
COMPUTE_DTYPES = (*DTYPES, "float16+float32", "bfloat16+float32")


def _one_of(names: Collection[str], value: Any) -> str:
    """Check that a value is one of some names, which may still grow."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"expected one of {', '.join(names)}")
    return value


def _method(value: Any) -> str:
    """A method's text, from its name or from a mapping of its name and its parameters."""
    name = value
    parameters = {}
    if isinstance(value, Mapping):
        name = value.get("name")
        parameters = {str(key): item for key, item in value.items() if key != "name"}
    elif isinstance(value, str) and "(" in value:
        name, parameters = parsed(value)
    return spelled(_one_of(METHODS, name), parameters)


def _method_schema() -> dict[str, Any]:
    """The schema of a method for editors: a name, or a mapping with a name."""
    name = {"enum": list(METHODS), "type": "string"}
    mapping = {"type": "object", "properties": {"name": name}, "required": ["name"]}
    return {"anyOf": [name, mapping]}


Methods = one_or_more(Annotated[str, PlainValidator(_method), WithJsonSchema(_method_schema())])


def _strategy(value: Any) -> str:
    return _one_of(STRATEGIES, "quantitive" if value == "quantitative" else value)


_STRATEGY_SCHEMA = {"enum": [*STRATEGIES, "quantitative"], "type": "string"}
Strategy = Annotated[str, PlainValidator(_strategy), WithJsonSchema(_STRATEGY_SCHEMA)]

Text = Annotated[str, Strict(), Field(pattern=r"\S")]
Texts = tuple[Text, ...]
EmptyOrText = Annotated[str, Strict(), Field(pattern=r"^$|\S")]


def _device(text: str) -> str:
    if not re.fullmatch(DEVICE_PATTERN, text):
        raise ValueError(f"expected {DEVICES}")
    return text


_DEVICE_SCHEMA = {"pattern": DEVICE_PATTERN, "examples": ["auto", "cpu", *ACCELERATORS], "format": DEVICES}
Device = Annotated[str, Strict(), AfterValidator(_device), Field(json_schema_extra=_DEVICE_SCHEMA)]

# Of layers, by number: one, or the first and the last of several. No model has as many as four digits can say.
_SPAN = r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?"


def _layers(value: Any) -> tuple[int, ...]:
    """Numbers of layers, in order, each once; written as one span or as a list of them."""
    items = value if isinstance(value, list | tuple) else [value]
    layers = set()
    for item in items:
        span = re.fullmatch(_SPAN, str(item), re.ASCII) if isinstance(item, int | str) else None
        numbers = range(int(span[1]), int(span[2] or span[1]) + 1) if span else ()
        if not numbers:
            raise ValueError("expected layer numbers, counted from 0, such as 8-24 or [0, 3, 8-12]")
        layers.update(numbers)
    return not_empty(tuple(sorted(layers)))


_OneSpan = Annotated[int, Field(ge=0, lt=10_000)] | Annotated[str, Field(pattern=f"^{_SPAN}$")]
Layers = Annotated[
    tuple[int, ...],
    PlainValidator(_layers, json_schema_input_type=_OneSpan | list[_OneSpan]),
    Field(json_schema_extra={"format": "layers, such as 8-24 or [0, 3, 8-12]"}),
]


def _template(value: Any) -> dict[str, Any]:
    """Settings of a chat template, as JSON has them."""
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping of names to values")
    try:
        return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError):
        raise ValueError("expected text, numbers, true, false, lists or mappings") from None


Template = Annotated[dict[str, Any], PlainValidator(_template, json_schema_input_type=dict[str, Any])]

# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------


def unusable(path: Path) -> str | None:
    """Why a path can't exist, such as a name that is too long; None if it exists or could."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _needs(info: ValidationInfo, requirement: str) -> bool:
    return requirement in (info.context or ())


def _expanded(text: str) -> str:
    return str(Path(os.path.expanduser(text)))  # Path.expanduser would raise an error where there is no such user


def _folder(text: str, info: ValidationInfo) -> str:
    folder = _expanded(text)
    if _needs(info, "folders") and not os.path.isdir(folder):
        raise ValueError("no such folder")
    return folder


def _existing_model(requirement: str, parse: Callable[[str], Any]) -> AfterValidator:
    """Check that a text names an existing model, if the validation's context requires one."""

    def checked(text: str, info: ValidationInfo) -> str:
        if _needs(info, requirement) and parse(text) is None:
            raise ValueError(_no_model(text))
        return text

    return AfterValidator(checked)


def _no_model(text: str) -> str:
    script = MADE_BY.get(os.path.dirname(os.path.normpath(text)))
    return f"no such folder; run python {script} to make it" if script else missing_folder(text)


def _candidates(texts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    directories = info.data.get("directories")
    if _needs(info, "output") and not texts and not (directories and directories.model_directory):
        raise PydanticCustomError("absent", "no candidates; list models here or set directories.model_directory")
    return texts


def _output(text: str, info: ValidationInfo) -> str:
    if not text and _needs(info, "output"):
        raise PydanticCustomError("absent", "missing")
    if not text or not info.context:
        return text
    try:
        path = Path(text).expanduser()
        full_path = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null character, no such user, the current folder is gone
        raise ValueError(f"invalid path ({error})") from None
    if not full_path.name:
        raise ValueError("the root of a file system can't be the output; use a folder in it")
    problem = unusable(full_path.with_name(full_path.name + "-" * _BESIDE))
    if problem:
        raise ValueError(f"invalid path ({problem})")
    return str(full_path if path.name in ("", "..") else path)


def _named(kind: str) -> Any:
    """The kind of thing that a text names, for the table of keys."""
    return Field(json_schema_extra={"format": kind})


AnyPath = Annotated[Text, AfterValidator(_expanded), _named("file")]
Paths = tuple[AnyPath, ...]
Folder = Annotated[Text, AfterValidator(_folder), _named("folder")]
Model = Annotated[Text, _existing_model("base", parse_location), _named("model")]
Candidate = Annotated[Text, _existing_model("candidates", parse_source), _named("model")]
Candidates = Annotated[tuple[Candidate, ...], AfterValidator(_candidates)]
Output = Annotated[EmptyOrText, AfterValidator(_output), _named("folder")]
