"""The YAML file as a frozen dataclass.

Knows: every key, its type, its default and what is allowed; reports all errors of a file together.
Refuses to know: torch, models, tokenizers. It must answer a typo in under a second.
"""

import difflib
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from modules.config.locations import missing_folder, parse_location, parse_source

VERSION = "1.0.0"  # of the program

_LARGEST = 100_000_000  # bytes of a YAML file; what has more is none, and may have no end (/dev/zero)
_MOST_VALUES = 2_000_000  # in a YAML file: many times as many lists can stand in a short one that refers to itself
_MOST_PAIRS = 100_000
_MOST_ERRORS = 50  # of a file that are told one by one

_NUMBER = re.compile(r"[+-]?\d{1,20}[.,]?\d{0,20}(e[+-]?\d{1,3})?", re.IGNORECASE)

DEVICES = "auto, cpu, cuda, cuda:N or mps"
DTYPES = ("auto", "float16", "bfloat16", "float32")
METHODS = ("lerp", "slerp", "slice", "cyclic", "gradient")
ON_ERROR = ("stop", "skip")
STRATEGIES = ("cumulative", "all_phrases", "quantitive")
TABLES = ("full", "changed", "summary")  # of the command line: how much of the phrase table is shown


class ConfigError(Exception):
    """The configuration, the arguments or the models they name can't be used.

    The message is for the user. Each argument is a line of it: names in it may have line ends of their own.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class CheckpointError(Exception):
    """A checkpoint can't be read or written; the message is for the user."""


DEMO_MODELS = ("cliche-base", "plain-prose", "apple-logic")  # what demo/make_models.py makes


@dataclass(frozen=True)
class Pair:
    """One phrase in one context: the unit that is scored."""

    kind: str  # "BAD" or "GOOD"
    phrase: str
    context: str
    weight: float = 1.0

    def __str__(self) -> str:
        """The pair in a message; of a long context its end is shown."""
        return f"the phrase '{self.phrase}' after '{shortened(self.context)}'"


def shortened(context: str) -> str:
    """A context in a message: of a long one, its end."""
    return context if len(context) <= 40 else "..." + context[-37:]


@dataclass(frozen=True)
class Directories:
    """Where the models come from and where the merge goes."""

    model_path1: str  # the base model: a folder or an id of the hub
    output_directory: str  # the merged model's folder; empty if the mapper runs without one
    model_directory: str | None = None  # its sub-folders are the candidates, unless models_to_merge names them


@dataclass(frozen=True)
class Mapper:
    """How far the mapper follows the model; `mapper` in the YAML file."""

    prob_min: float = 10.0  # percent; a less probable next token is not followed
    top_k: int = 3  # next tokens followed at every place
    max_depth: int = 5  # tokens of a branch
    additional_length: int = 20  # tokens by which every branch is continued greedily, to be read


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Each field is the YAML key of the same name."""

    directories: Directories
    models_to_merge: tuple[str, ...] = ()  # candidates in the order in which they are tried, see locations.py
    on_error: str = "stop"  # what becomes of the run if a candidate can't be read any more; skip goes on without it
    keep_downloads: bool = True  # leave what is fetched from the hub in its cache after the run
    merge_ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)  # shares of the candidate that are tried, 0 to 1
    merge_method: tuple[str, ...] = ("lerp",)  # one of METHODS, or a list that is tried in order
    merge_headers: bool = True  # try the input embedding and the output head after a candidate's layers
    strategy: str = "cumulative"  # one of STRATEGIES
    strategy_threshold: float = 0.6  # share of the pairs that must improve; quantitive only
    auto_weights: bool = False  # weigh every pair by 1 / the base model's probability
    bad_phrases: tuple[Pair, ...] = ()  # what the merged model should say less
    good_phrases: tuple[Pair, ...] = ()  # what it should say more
    phrase_files: tuple[str, ...] = ()  # YAML files whose bad_phrases and good_phrases are added
    device: str = "auto"  # auto takes cuda, else mps, else cpu
    dtype: str = "auto"  # auto computes in the checkpoint's half type and saves what the base stores
    random_seed: int = 512
    trust_remote_code: bool = False  # run Python code that a checkpoint brings along
    mapper: Mapper = field(default_factory=Mapper)  # read by monster_mapper.py only
    text: str = field(default="", repr=False)  # the YAML file to the letter; not a key

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs, the bad ones first."""
        return self.bad_phrases + self.good_phrases


# Keys that have no part in what a search finds: a run goes on that was begun with others. (What phrase_files name is in
# bad_phrases and good_phrases.) All other keys have one, those of `directories` as far as they name models.
NO_PART = ("on_error", "keep_downloads", "phrase_files", "mapper")


@dataclass(frozen=True)
class _Request:
    """What the command line asks for: values in place of the file's own, and whether it is the mapper that asks."""

    device: str | None
    output: str | None
    model: str | None
    mapping: bool


def load_config(
    path: str | Path,
    device: str | None = None,
    output: str | None = None,
    model: str | None = None,
    mapping: bool = False,
) -> Config:
    """Read and check a YAML file; `device`, `output` and `model`, the base, replace the file's own values.

    mapping: for the mapper, which needs neither candidates nor an output directory.
    Raises ConfigError with one line for every error found.
    """
    text, document = _read_yaml(Path(path), "Name a YAML file with --config.")
    errors: list[str] = []
    config = replace(_parse(document, errors, _Request(device, output, model, mapping)), text=text)
    errors = list(dict.fromkeys(errors))
    if errors:
        noun = "error" if len(errors) == 1 else "errors"
        more = [f"and {len(errors) - _MOST_ERRORS} more"] if len(errors) > _MOST_ERRORS else []
        lines = [f"  {line}" for line in errors[:_MOST_ERRORS] + more]
        raise ConfigError(f"{path} has {len(errors)} {noun}:", *lines)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# YAML to plain values
# ---------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key that stands twice in one mapping is an error, since the first would be lost silently;
    and so are aliases of aliases that stand for more than there is time to look at."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}  # of each node, how many it stands for, itself included; by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node of the file; of an alias, the node that it stands for."""
        node = super().compose_node(parent, index)
        if node is not None and id(node) not in self._sizes:
            size = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(self._size(child) for child in node.value)
            self._sizes[id(node)] = size
            if size > _MOST_VALUES:
                problem = f"this stands for more than {_MOST_VALUES:,} values"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def _size(self, child: Any) -> int:
        """Of an item of a list, or of a key with its value. A node that holds itself has no size yet."""
        return sum(self._sizes.get(id(node), 1) for node in (child if isinstance(child, tuple) else (child,)))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key}' stands twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<) resolved. A mapping merged twice counts once: mappings of such mappings would grow without
        end."""
        super().flatten_mapping(node)
        node.value = list({id(key): (key, value) for key, value in node.value}.values())


def _read_yaml(path: Path, if_absent: str) -> tuple[str, Any]:
    """A file's text and what it says. if_absent: what to do where there is no such file."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ConfigError(f"{path}: has more than {_LARGEST // 1_000_000} MB; this is no YAML file of settings")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. {if_absent}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}).") from None
    try:
        return text, yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise ConfigError(f"{path}: not valid YAML at {where}: {error.problem or error.context}.") from None
    except Exception as error:  # whatever the library makes of a value that its tag does not fit
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Plain values to fields: a check returns the value to keep or raises _Invalid with what is allowed
# ---------------------------------------------------------------------------------------------------------------------

Check = Callable[[Any], Any]
_REQUIRED = object()


class _Invalid(Exception):
    pass


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Invalid("expected text" + (" (put it in quotes)" if isinstance(value, bool | int | float) else ""))
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _Invalid("holds half of a character (a lone surrogate)")
    return value


def _path(value: Any) -> Path:
    try:
        path = Path(_text(value)).expanduser()
    except RuntimeError as error:  # there is no such user
        raise _Invalid(f"not a usable path ({error})") from None
    trouble = unusable(path)
    if trouble:
        raise _Invalid(f"not a usable path ({trouble})")
    return path


def unusable(path: Path) -> str | None:
    """Why nothing can be at this path, such as too long a name; None if something is, or could be."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _context_text(value: Any) -> str:
    """Like text, but empty is allowed: an empty context scores the phrase from the beginning of a text."""
    return value if value == "" else _text(value)


def _folder(value: Any) -> str:
    path = _path(value)
    if not path.is_dir():
        raise _Invalid("no such folder")
    return str(path)


def _model(value: Any) -> str:
    """A folder or an id of the hub. Whether the hub has it can't be known here."""
    return _model_named(value, parse_location)


def _candidate(value: Any) -> str:
    """A model, an adapter, or both joined by a plus."""
    return _model_named(value, parse_source)


def _model_named(value: Any, parse: Callable[[str], object]) -> str:
    path = _path(value)
    if parse(value) is None:
        of_demo = path.parts[:2] == ("demo", "models") and path.name in DEMO_MODELS
        raise _Invalid("no such folder; python demo/make_models.py makes it" if of_demo else missing_folder(value))
    return value


def _any_path(value: Any) -> str:
    return str(_path(value))


_BESIDE = 40  # characters by which the names are longer, at most, that stand beside an output while it is made


def _output(value: Any) -> str:
    path = _path(value)
    try:
        whole = path.resolve()
    except OSError:
        raise _Invalid("the folder that you are in is gone; go to one that is there") from None
    if not whole.name:
        raise _Invalid("a whole file system can't be an output; name a folder in it")
    if path.name in ("", ".."):
        path = whole
    if unusable(whole.with_name(whole.name + "-" * _BESIDE)):
        raise _Invalid(f"its name is too long; the names that stand beside it for a while add {_BESIDE} to it")
    return str(path)


def output_directory(name: str, value: str) -> Path:
    """An output as an option called `name` gives it. Raises ConfigError if none can be written there."""
    try:
        return Path(_output(value))
    except _Invalid as error:
        raise ConfigError(f"{name}: {_shown(value)}: {error}") from None


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Invalid("expected true or false")
    return value


def is_number(value: Any) -> bool:
    """Whether a value from YAML or JSON is a finite number that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _number(low: float, high: float, what: str) -> Check:
    def check(value: Any) -> float:
        if not is_number(value) or not low <= value <= high:
            raise _Invalid(f"expected {what}{_number_as_text(value)}")
        return float(value)

    return check


def _number_as_text(value: Any, whole: bool = False) -> str:
    """What to write in place of a number that YAML reads as text: 1e-3 has no point, 0,5 a comma, "0.5" quotes."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return ""
    number, exponent, power = value.strip().lower().replace(",", ".").partition("e")
    if whole:
        meant = float(number + exponent + power)
        return f"; YAML reads this as text: write {meant:.0f}" if meant.is_integer() else ""
    if exponent:
        number += "" if "." in number else ".0"
        power = power if power.startswith(("+", "-")) else f"+{power}"
    return f"; YAML reads this as text: write {number}{exponent}{power}"


_ratio = _number(0.0, 1.0, "a number from 0 to 1")
_weight = _number(0.0, 1e300, "a number of at least 0")


def _threshold(value: Any) -> float:
    if _ratio(value) == 0.0:
        raise _Invalid("expected a number above 0 and up to 1")
    return float(value)


def _whole_number(low: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
            raise _Invalid(f"expected a whole number of at least {low}{_number_as_text(value, whole=True)}")
        return value

    return check


def _choice(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            guess = difflib.get_close_matches(value, allowed, 1) if isinstance(value, str) else []
            hint = f"; did you mean '{guess[0]}'?" if guess else ""
            raise _Invalid(f"expected {_listing(allowed)}{hint}")
        return value

    return check


def _strategy(value: Any) -> str:
    return "quantitive" if value == "quantitative" else _choice(*STRATEGIES)(value)


def _device(value: Any) -> str:
    name, colon, index = value.partition(":") if isinstance(value, str) else ("", "", "")
    if name not in ("auto", "cpu", "cuda", "mps") or (colon and (name != "cuda" or not index.isdecimal())):
        raise _Invalid(f"expected {DEVICES}")
    return value


def _one_or_more(check: Check) -> Check:
    """A single value or a non-empty list of them, as a tuple."""

    def check_all(value: Any) -> tuple:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise _Invalid("expected at least one value")
        return tuple(check(item) for item in values)

    return check_all


class _Section:
    """One mapping of the file, read key by key. What is wrong is noted, never raised, so that all of it is reported."""

    def __init__(self, value: Any, where: str, known: tuple[str, ...], errors: list[str]) -> None:
        self.where, self.errors = where, errors
        self.values = value if isinstance(value, Mapping) else {}
        if not isinstance(value, Mapping):
            self.note("", value, "expected a mapping of keys to values")
        for key in self.values:
            if key not in known:
                guess = difflib.get_close_matches(key, known, 1) if isinstance(key, str) else []
                hint = f"did you mean '{guess[0]}'?" if guess else f"known keys: {', '.join(known)}"
                errors.append(f"{self._name(key)}: unknown key; {hint}")

    def _name(self, key: Any) -> str:
        parts = (part if isinstance(part, str) else _shown(part) for part in (self.where, key) if part != "")
        return ".".join(parts) or "the file"

    def note(self, key: str, value: Any, problem: str) -> None:
        self.errors.append(f"{self._name(key)}: {_shown(value)}: {problem}")

    def take(self, key: str, check: Check, default: Any = _REQUIRED) -> Any:
        """The checked value of a key; its default where it is absent or empty, None where it is wrong."""
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                self.errors.append(f"{self._name(key)}: missing")
                return None
            return default
        try:
            return check(value)
        except _Invalid as error:
            self.note(key, value, str(error))
            return None

    def each(self, key: str) -> list[tuple[str, Any]]:
        """The items of a list with their names; an absent key is an empty list."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.note(key, value, "expected a list")
            return []
        return [(f"{self._name(key)}[{i}]", item) for i, item in enumerate(value)]


_CONFIG_KEYS = tuple(f.name for f in fields(Config) if f.name != "text")
_DEFAULTS = {f.name: f.default for f in fields(Config)}


def _parse(document: Any, errors: list[str], request: _Request) -> Config:
    top = _Section({} if document is None else document, "", _CONFIG_KEYS, errors)

    def take(key: str, check: Check) -> Any:
        return top.take(key, check, _DEFAULTS[key])

    bad, good = _phrase_lists(top, errors)
    directories = _parse_directories(top.values.get("directories", {}), errors, request)
    config = Config(
        directories=directories,
        models_to_merge=_list_of(top, "models_to_merge", _candidate_check(request)),
        on_error=take("on_error", _choice(*ON_ERROR)),
        keep_downloads=take("keep_downloads", _boolean),
        merge_ratios=take("merge_ratios", _one_or_more(_ratio)),
        merge_method=take("merge_method", _one_or_more(_choice(*METHODS))),
        merge_headers=take("merge_headers", _boolean),
        strategy=take("strategy", _strategy),
        strategy_threshold=take("strategy_threshold", _threshold),
        auto_weights=take("auto_weights", _boolean),
        bad_phrases=bad,
        good_phrases=good,
        phrase_files=_list_of(top, "phrase_files", _any_path),
        device=take("device", _device),
        dtype=take("dtype", _choice(*DTYPES)),
        random_seed=take("random_seed", _whole_number(0)),
        trust_remote_code=take("trust_remote_code", _boolean),
        mapper=_parse_mapper(top.values.get("mapper"), errors),
    )
    if request.device is not None:
        config = replace(config, device=_argument("--device", request.device, _device, errors))
    _check_together(config, top, errors, request)
    return config


def _candidate_check(request: _Request) -> Check:
    """The mapper reads no candidates: they may still be missing."""
    return _any_path if request.mapping else _candidate


def _parse_directories(value: Any, errors: list[str], request: _Request) -> Directories:
    section = _Section(value, "directories", tuple(f.name for f in fields(Directories)), errors)
    if request.output is not None:
        output_directory = _argument("--output", request.output, _output, errors)
    else:
        output_directory = section.take("output_directory", _output, "" if request.mapping else _REQUIRED)
    if request.model is not None:
        base = _argument("--model", request.model, _model, errors)
    else:
        base = section.take("model_path1", _model)
    return Directories(
        model_path1=base,
        output_directory=output_directory,
        model_directory=section.take("model_directory", _any_path if request.mapping else _folder, None),
    )


def _parse_mapper(value: Any, errors: list[str]) -> Mapper:
    section = _Section({} if value is None else value, "mapper", tuple(f.name for f in fields(Mapper)), errors)
    default = Mapper()
    return Mapper(
        prob_min=section.take("prob_min", _number(0.0, 100.0, "a number from 0 to 100"), default.prob_min),
        top_k=section.take("top_k", _whole_number(1), default.top_k),
        max_depth=section.take("max_depth", _whole_number(1), default.max_depth),
        additional_length=section.take("additional_length", _whole_number(0), default.additional_length),
    )


def _argument(name: str, value: str, check: Check, errors: list[str]) -> Any:
    try:
        return check(value)
    except _Invalid as error:
        errors.append(f"{name}: {_shown(value)}: {error}")
        return None


def _check_together(config: Config, top: _Section, errors: list[str], request: _Request) -> None:
    has_list = bool(top.values.get("models_to_merge"))
    has_directory = isinstance(top.values.get("directories"), Mapping) and top.values["directories"].get(
        "model_directory"
    )
    if not has_list and not has_directory and not request.mapping:
        errors.append("models_to_merge: no candidates; list models here or set directories.model_directory")
    if not config.pairs and not any("phrase" in line for line in errors):
        errors.append("bad_phrases, good_phrases: both are empty; there is nothing to score")


def _list_of(section: _Section, key: str, check: Check) -> tuple:
    return tuple(
        _Section({name: item}, "", (name,), section.errors).take(name, check) for name, item in section.each(key)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Phrase lists
# ---------------------------------------------------------------------------------------------------------------------


def _phrase_lists(top: _Section, errors: list[str]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """The file's own bad and good pairs, then those of its phrase files."""
    bad, good, count = list[Pair](), list[Pair](), 0
    files = (_phrase_file(name, item, errors) for name, item in top.each("phrase_files"))
    for section in filter(None, chain([top], files)):
        count += _count_pairs(section)
        if count > _MOST_PAIRS:  # said before they are made: a short file can stand for very many
            errors.append(f"phrase lists: {count:,} pairs of a phrase and a context; at most {_MOST_PAIRS:,} are taken")
            break
        bad += _phrases(section, "bad_phrases", "BAD")
        good += _phrases(section, "good_phrases", "GOOD")
    return tuple(bad), tuple(good)


def _count_pairs(section: _Section) -> int:
    lists = [section.values.get(key) for key in ("bad_phrases", "good_phrases")]
    entries = [entry for value in lists if isinstance(value, list) for entry in value if isinstance(entry, Mapping)]
    return sum(len(entry["contexts"]) for entry in entries if isinstance(entry.get("contexts"), list))


def _phrase_file(name: str, item: Any, errors: list[str]) -> _Section | None:
    """A phrase file; None if it is none. A whole Merge Monster config may serve as one: only its phrases are taken."""
    where = f"{name} ({item})"
    try:
        _, document = _read_yaml(_path(item), "A relative path begins in the folder you start the program in.")
    except _Invalid:
        return None  # noted where phrase_files itself is read
    except ConfigError as error:
        errors.append(f"{name}: {error}")
        return None
    if document is None:
        errors.append(f"{where}: the file is empty")
        return None
    if isinstance(document, list):
        errors.append(f"{where}: a bare list; bad_phrases: or good_phrases: is missing above it")
        return None
    section = _Section(document, where, _CONFIG_KEYS, errors)
    others = section.values.get("phrase_files")
    if others:
        section.note("phrase_files", others, "a phrase file can't name others; name them all in the first file")
    return section


PHRASE_KEYS = ("phrase", "weight", "contexts")


def _phrases(section: _Section, key: str, kind: str) -> list[Pair]:
    pairs = []
    for name, item in section.each(key):
        entry = _Section(item, name, PHRASE_KEYS, section.errors)
        phrase = entry.take("phrase", _text)
        weight = entry.take("weight", _weight, 1.0)
        contexts = entry.each("contexts")
        if not contexts and not entry.values.get("contexts"):
            entry.errors.append(f'{name}.contexts: missing or empty; list at least one context ("" is the empty one)')
        for context_name, context in contexts:
            text, own_weight = _context(context_name, context, weight, section.errors)
            if None not in (phrase, text, own_weight):
                pairs.append(Pair(kind, phrase, text, own_weight))
    return pairs


def _context(name: str, value: Any, weight: float | None, errors: list[str]) -> tuple[str | None, float | None]:
    """A context is text, or a mapping of text and a weight of its own."""
    if isinstance(value, Mapping):
        section = _Section(value, name, ("context", "weight"), errors)
        return section.take("context", _context_text), section.take("weight", _weight, weight)
    return _argument(name, value, _context_text, errors), weight


# ---------------------------------------------------------------------------------------------------------------------
# Wording
# ---------------------------------------------------------------------------------------------------------------------


class _Excerpt(reprlib.Repr):
    """The beginning of what `repr` would write, in a time that does not grow with the value: the aliases of a short
    file can stand for more than there is memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if abs(value) < 10**60 else "a number of more than 60 digits"


def _shown(value: Any) -> str:
    """A value as the YAML file would write it, short enough for one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    shown = _Excerpt().repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _listing(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
