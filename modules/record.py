"""What a run writes down and reads back: settings, sources, decisions, scores; the journal while it works, the recipe
when it is done.

Knows: what each record holds. Refuses to know: how a decision is taken or carried out, files other than its own.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from modules.checkpoints import Checkpoint, candidate_sources
from modules.composition import Shares
from modules.config import (
    DTYPES,
    METHODS,
    NO_PART,
    STRATEGIES,
    VERSION,
    Config,
    ConfigError,
    Directories,
    Pair,
    is_number,
)
from modules.config.locations import Source, parse_source
from modules.journal import Journal, Record, naming
from modules.memory import Packing
from modules.models import resolve_device, resolve_dtype
from modules.search import Decision
from modules.strategies import improved, probability, scores, total

FORMAT = 1  # of journals and recipes
RECIPE_FILE = "merge_monster_recipe.json"


class RunRecord:
    """A run's journal, in terms of what happens in a run. Candidates are numbered from 1; the base is number 0."""

    def __init__(self, journal: Journal, config: Config, base: Checkpoint | None = None) -> None:
        """Begin a journal, or go on with one. Raises ConfigError, saying what has changed, if it is another run's, or
        naming the line that no run can have written.

        base: the model that the dtype was chosen for; without one, nothing is said of what has changed.
        """
        self.journal, self._device = journal, resolve_device(config.device).type
        now = {"format": FORMAT, "program": VERSION, "settings": settings_of(config), "config": config.text}
        now |= {"device": self._device, "folder": os.path.abspath("")}
        if not journal.records:
            journal.append("run", **now, libraries=_libraries())
            return
        begun = journal.records[0]
        if begun["kind"] == "run":
            _refuse_other_version(begun, now, journal.path)
        damaged = 1 if begun["kind"] != "run" or not _is_sound("run", begun) else None
        if damaged is None:
            if base is not None:
                _refuse_changes(begun, now, base, journal.path)
            damaged = _first_damaged(journal.records, config)
        if damaged is not None:
            raise ConfigError(f"{journal.path}: line {damaged} is damaged; begin again with --restart")

    @property
    def count(self) -> int:
        """How many decisions were taken."""
        return len(self.journal.of_kind("decision"))

    @property
    def packing(self) -> Packing | None:
        """How the phrases were packed for the last scores that are noted; None if there are none, or it was not."""
        known = [record["packing"] for record in self.journal.records if record.get("packing")]
        return Packing(**known[-1]) if known else None

    def warnings(self, packing: Packing) -> list[str]:
        """What may keep the rest of the run from being what it would have been without the break.

        packing: that it goes on with.
        """
        run = self.journal.of_kind("run")[0]
        now = {**_libraries(), "device": self._device}
        begun = {**run["libraries"], "device": run.get("device", self._device)}
        changes = [
            f"the run began with {name} {begun.get(name)}, this is {value}"
            for name, value in now.items()
            if begun.get(name) != value
        ]
        if self.packing is None:
            changes.append("how phrases were packed before the break is not in the journal")
        elif self.packing != packing:
            changes.append(f"phrases were scored as {self.packing} before the break, and here as {packing}")
        return [f"{change}: the last digits may differ" for change in changes]

    def compares(self, packing: Packing) -> bool:
        """Whether the base's noted scores, and those with this packing, must be the same to the last digit."""
        return self.journal.of_kind("start")[0].get("packing") in (None, asdict(packing))

    def source(self, number: int, text: str, where: str, checkpoint: Checkpoint) -> Record:
        """Note a model, or compare it with what was noted; text: what the configuration calls it, where: exactly.

        Returns what is noted. Raises ConfigError if it is another one.
        """
        known = [record for record in self.journal.of_kind("source") if record["number"] == number]
        if known:
            since = f"has changed since {self.journal.path} was begun; --restart begins again"
            compare_fingerprints(known[0], checkpoint, since)
            return known[0]
        identity = {"number": number, "name": checkpoint.name, "text": text, "where": where}
        return self.journal.append("source", **identity, fingerprint=checkpoint.fingerprint())

    def start(
        self, log_probabilities: Sequence[float], weights: Sequence[float], packing: Packing
    ) -> tuple[list[float], list[float]]:
        """Note the base's scores, or find what was noted: joint log-probabilities, signed weights."""
        known = self.journal.of_kind("start")
        record = (
            known[0]
            if known
            else self.journal.append(
                "start", **_scores(log_probabilities), weights=list(weights), packing=asdict(packing)
            )
        )
        return _log_probabilities(record), record["weights"]

    def decided(self, number: int, decision: Decision, seconds: float, packing: Packing) -> None:
        """Note a decision."""
        fields = {**asdict(decision), **_scores(decision.log_probabilities), "packing": asdict(packing)}
        self.journal.append("decision", candidate=number, **fields, seconds=round(seconds, 3))

    def decisions(self, number: int | None = None) -> list[Decision]:
        """What was decided, on one candidate or altogether."""
        records = [r for r in self.journal.of_kind("decision") if number is None or r["candidate"] == number]
        return [decision_of(record) for record in records]

    def closed(self, number: int, log_probabilities: Sequence[float], failure: str | None, packing: Packing) -> None:
        """Note that a candidate has been searched, or given up."""
        fields = {**_scores(log_probabilities), "packing": asdict(packing)}
        self.journal.append("candidate", number=number, **fields, failure=failure)

    def end(self, number: int) -> tuple[list[float], str | None] | None:
        """The scores after a candidate and why it was given up, if it was; None if its search is not over."""
        known = [record for record in self.journal.of_kind("candidate") if record["number"] == number]
        return (_log_probabilities(known[0]), known[0]["failure"]) if known else None

    def recipe(
        self,
        pairs: Sequence[Pair],
        weights: Sequence[float],
        scores_now: Sequence[float],
        composition: Shares,
        model: Mapping[str, str | None],
        seconds: Mapping[str, float],
    ) -> Record:
        """Everything that another person needs to build the same model and to see what it is; see the README.

        model: device, compute dtype, saved dtype. seconds: by phase; those of the search are in the journal.
        """
        begun, start = self.journal.of_kind("run")[0], _log_probabilities(self.journal.of_kind("start")[0])
        decisions = self.journal.of_kind("decision")
        phrases = [
            {**asdict(pair), "weight": weight, "before": probability(before), "after": probability(after)}
            for pair, weight, before, after in zip(pairs, weights, start, scores_now, strict=True)
        ]
        return {
            **{key: begun[key] for key in ("format", "program", "libraries", "settings", "config")},
            **model,
            "sources": [_for_others(record) for record in self.journal.of_kind("source")],
            "decisions": [_for_others(record) for record in decisions],
            "failures": {r["number"]: r["failure"] for r in self.journal.of_kind("candidate") if r["failure"]},
            "phrases": phrases,
            "total": {"before": total(scores(start, weights)), "after": total(scores(scores_now, weights))},
            "composition": dict(composition),
            "seconds": {**seconds, "search": round(sum(record["seconds"] for record in decisions), 1)},
        }


def write_recipe(folder: Path, recipe: Record) -> None:
    """Write a recipe into an output. Raises OSError if it can't be written."""
    text = json.dumps(recipe, ensure_ascii=False, indent=1, allow_nan=False)
    with naming(folder / RECIPE_FILE):
        (folder / RECIPE_FILE).write_text(text + "\n", encoding="utf-8")


def read_recipe(path: Path) -> Record:
    """A recipe of this version, named itself or as the output that holds it. Raises ConfigError if it is none."""
    path = path / RECIPE_FILE if os.path.isdir(path) else path
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(recipe, ensure_ascii=False, allow_nan=False).encode()  # as it will be written into the output
        sound = all(isinstance(recipe[key], kind) for key, kind in _PARTS.items())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a recipe is the {RECIPE_FILE} of an output") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ConfigError(f"{path}: not a recipe; it is the {RECIPE_FILE} of an output")
    if recipe["format"] != FORMAT:
        raise ConfigError(f"{path}: a recipe of format {recipe['format']}, this program reads format {FORMAT}")
    problem = _recipe_problem(recipe)
    if problem:
        raise ConfigError(f"{path}: damaged, {problem}; take the {RECIPE_FILE} of the output once more")
    return recipe


def is_finished(config: Config, output: Path) -> bool:
    """Whether an output is what a run of this configuration has written."""
    try:
        recipe = read_recipe(output / RECIPE_FILE)
        begun = {"settings": recipe["settings"], "device": recipe["device"].partition(":")[0]}
        return not _changes(begun, {"settings": settings_of(config)})
    except (ConfigError, *_NOT_SETTINGS):
        return False


def read_outputs(outputs: Iterable[Path]) -> dict[str, Record]:
    """The recipes of finished outputs by the outputs' names; each is given as its folder or as its recipe.

    Raises ConfigError, naming all that are no finished output.
    """
    recipes, problems = {}, []
    for output in outputs:
        try:
            recipe = read_recipe(output)
        except ConfigError as error:
            problems.append(f"  {error}")
            continue
        recipes[str(output.parent if output.name == RECIPE_FILE else output)] = recipe
    if problems:
        raise ConfigError("not all of these are finished outputs:", *problems)
    return recipes


_PARTS = {
    "format": int,
    "program": str,
    "settings": dict,
    "sources": list,
    "decisions": list,
    "failures": dict,
    "phrases": list,
    "total": dict,
    "composition": dict,
    "seconds": dict,
    "dtype": str,
    "device": str,
}


# ---------------------------------------------------------------------------------------------------------------------
# What a recipe says
# ---------------------------------------------------------------------------------------------------------------------


def accepted_of(recipe: Record, number: int) -> list[Record]:
    """The decisions of a recipe that merged something of a candidate."""
    return [record for record in recipe["decisions"] if record["candidate"] == number and record["ratio"] is not None]


def needed_sources(recipe: Record) -> list[Record]:
    """The base and those candidates of which something was accepted."""
    return [s for s in recipe["sources"] if s["number"] == 0 or accepted_of(recipe, s["number"])]


def improved_phrases(recipe: Record) -> int:
    """How many phrases score better in the output than in the base."""
    before, after = ([phrase[key] * phrase["weight"] for phrase in recipe["phrases"]] for key in ("before", "after"))
    return improved(before, after)


# ---------------------------------------------------------------------------------------------------------------------
# What was read is not what was written: a disk or an editor may have changed it
# ---------------------------------------------------------------------------------------------------------------------


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _is_packing(value: Any) -> bool:
    """Or none: what a journal says of it is younger than journals are."""
    kinds = {"layout": _is(str), "tokens": _is_count, "logits": _is_count, "stacked": _is(bool)}
    return value is None or (
        isinstance(value, dict) and value.keys() == kinds.keys() and all(kinds[key](value[key]) for key in kinds)
    )


def _are_scores(value: Any) -> bool:
    return isinstance(value, list) and all(item is None or is_number(item) for item in value)


_is_text, _is_text_or_none = _is(str), _is(str, type(None))

# By kind of record, each key that is read again, and what its value must be.
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "run": {"settings": _is(dict), "libraries": _is(dict), "config": _is_text},
    "source": {"number": _is_count, "name": _is_text, "text": _is_text, "where": _is_text, "fingerprint": _is(dict)},
    "start": {"log_probabilities": _are_scores, "weights": _are_numbers},
    "decision": {
        "candidate": _is_count,
        "model": _is_text,
        "layer": lambda value: value is None or _is_count(value),
        "method": lambda value: value in METHODS,
        "ratio": lambda value: value is None or (is_number(value) and 0 <= value <= 1),
        "before": _is(int, float),
        "after": _is(int, float),
        "log_probabilities": _are_scores,
        "warning": _is_text_or_none,
        "note": _is_text_or_none,
        "seconds": is_number,
    },
    "candidate": {"number": _is_count, "log_probabilities": _are_scores, "failure": _is_text_or_none},
    "phrase": {
        "kind": lambda value: value in ("BAD", "GOOD"),
        "phrase": _is_text,
        "context": _is_text,
        "weight": is_number,
        "before": is_number,
        "after": is_number,
    },
}


def _is_sound(kind: str, record: Any) -> bool:
    """Whether a record has all that is read of its kind."""
    return isinstance(record, Mapping) and all(
        key in record and check(record[key]) for key, check in _FIELDS.get(kind, {}).items()
    )


def _first_damaged(records: Sequence[Record], config: Config) -> int | None:
    """The line of a journal's first record that a run of this configuration can't have written there."""
    methods, pairs = config.merge_method, len(config.pairs)
    sources: set[int] = set()
    counts: dict[int, int] = {}  # decisions of each candidate
    begun = False
    for line, record in enumerate(records, start=1):
        kind = record["kind"]
        sound = _is_sound(kind, record) and _is_packing(record.get("packing"))
        sound = sound and all(len(record[key]) == pairs for key in ("log_probabilities", "weights") if key in record)
        if sound and kind == "source":
            sources.add(record["number"])
        elif sound and kind == "decision":
            count = counts[record["candidate"]] = counts.get(record["candidate"], 0) + 1
            due = (count - 1) // len(methods), methods[(count - 1) % len(methods)]
            sound = begun and record["candidate"] in sources
            sound = sound and (record["layer"], record["method"]) in (due, (None, "lerp"))
        begun = begun or kind == "start"
        if not sound:
            return line
    return None


# Of a recipe's settings, those that are read again.
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "merge_method": lambda value: isinstance(value, list) and all(method in METHODS for method in value),
    "strategy": lambda value: value in STRATEGIES,
    "strategy_threshold": is_number,
    "random_seed": _is_count,
    "trust_remote_code": _is(bool),
}


def _recipe_problem(recipe: Mapping[str, Any]) -> str | None:
    """What keeps a recipe from being carried out, if anything does."""
    dtypes = DTYPES[1:]
    for kind in ("source", "decision", "phrase"):
        for number, record in enumerate(recipe[f"{kind}s"], start=1):
            if not _is_sound(kind, record):
                return f"its {kind} {number} is none"
    # A number is missing where a candidate was given up before it could be opened.
    numbers = [source["number"] for source in recipe["sources"]]
    if numbers[:1] != [0] or numbers != sorted(set(numbers)):
        return "its sources are not numbered from 0"
    if any(decision["candidate"] not in numbers[1:] for decision in recipe["decisions"]):
        return "a decision is on no source"
    if recipe["dtype"] not in dtypes or recipe.get("saved_dtype") not in (None, *dtypes):
        return "its dtypes are none"
    if not all(key in recipe["settings"] and check(recipe["settings"][key]) for key, check in _SETTINGS.items()):
        return "its settings are none"
    if not {"before", "after"} <= recipe["total"].keys():
        return "its total is none"
    for part in ("total", "composition", "seconds"):
        if not all(map(is_number, recipe[part].values())):
            return f"its {part} has a value that is no number"
    return None if isinstance(recipe.get("config"), str) else "its config is missing"


# ---------------------------------------------------------------------------------------------------------------------
# Values to JSON and back
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(config: Config) -> Record:
    """A configuration's values, as JSON has them."""
    values = asdict(config)
    del values["text"]
    return json.loads(json.dumps(values))


def compare_fingerprints(record: Mapping[str, Any], checkpoint: Checkpoint, trouble: str) -> None:
    """Raise ConfigError, naming the first file that differs, if a source is not what was recorded.

    trouble: what that means, to be said of the file.
    """
    now = checkpoint.fingerprint()
    for file in sorted(now.keys() | record["fingerprint"].keys()):
        if now.get(file) != record["fingerprint"].get(file):
            raise ConfigError(f"{checkpoint.path}: {file} {trouble}")


def decision_of(record: Mapping[str, Any]) -> Decision:
    """A decision as it was before it was written down."""
    names = ("model", "layer", "method", "ratio", "before", "after", "warning", "note")
    return Decision(**{name: record[name] for name in names}, log_probabilities=tuple(_log_probabilities(record)))


def _scores(log_probabilities: Iterable[float]) -> Record:
    # JSON has no infinity: a probability of zero, whose logarithm that is, is written as null.
    return {"log_probabilities": [value if math.isfinite(value) else None for value in log_probabilities]}


def _log_probabilities(record: Mapping[str, Any]) -> list[float]:
    return [-math.inf if value is None else value for value in record["log_probabilities"]]


def _for_others(record: Mapping[str, Any]) -> Record:
    """A record without what only the journal needs."""
    return {key: value for key, value in record.items() if key not in ("kind", "packing")}


def _libraries() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


_HINT = "use what it was begun with, or begin again with --restart"


def _refuse_other_version(begun: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for key, what in (("format", "another version of journals"), ("program", "Merge Monster")):
        if begun.get(key) != now[key]:
            raise ConfigError(f"{path} was begun by {what} {begun.get(key)}, this is {now[key]}; {_HINT}")


def _refuse_changes(begun: Mapping[str, Any], now: Mapping[str, Any], base: Checkpoint, path: Path) -> None:
    try:
        changed = _changes(begun, now, base)
    except _NOT_SETTINGS:
        raise ConfigError(f"{path}: line 1 is damaged; begin again with --restart") from None
    if changed:
        details = "; ".join(_change(key, begun["settings"].get(key), now["settings"].get(key)) for key in changed)
        raise ConfigError(f"the configuration has changed since {path} was begun: {details}; {_HINT}")


_NOT_SETTINGS = (KeyError, TypeError, AttributeError, ValueError)  # what damaged ones make of those who read them


def _changes(begun: Record, now: Record, base: Checkpoint | None = None) -> list[str]:
    """The keys in which two runs' settings differ in what they mean for the search, in alphabetical order.

    begun, now: settings and, if known, the device that was meant and the folder where relative paths begin.
    """
    same = {key for key in ("device", "dtype") if begun["settings"][key] == now["settings"][key]}
    one, other = (_meaning(run, same, base) for run in (begun, now))
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _meaning(run: Record, same: Collection[str], base: Checkpoint | None) -> Record:
    """What decides the result of a search, by key, in one spelling.

    same: keys that are spelt the same in both runs; if they mean something else on this machine, a warning says so.
    """
    settings, folder = run["settings"], run.get("folder", "")
    told = {key: value for key, value in settings.items() if key not in NO_PART}
    directories = dict(settings["directories"])
    if directories["model_directory"] is not None:
        directories["model_directory"] = os.path.join(folder, directories["model_directory"])
    texts = [_found_from(folder, text) for text in (directories["model_path1"], *settings["models_to_merge"])]
    candidates, _ = candidate_sources(Config(Directories(**directories), models_to_merge=tuple(texts[1:])))
    base_source = parse_source(texts[0])
    told["directories"] = base_source and _identity(base_source)
    told["models_to_merge"] = [_identity(source) for source in candidates]
    if settings["strategy"] != "quantitive":
        del told["strategy_threshold"]
    device = run.get("device") or _device_meant(settings["device"])
    if "device" not in same:
        told["device"] = device
    if "dtype" not in same and base is not None:
        told["dtype"] = _dtype_meant(settings["dtype"], base, device)
    return told


def _found_from(folder: str, text: str) -> str:
    """A model's name as it can be read from anywhere, if it is that of a folder."""
    path = os.path.join(folder, os.path.expanduser(text))
    return path if os.path.isdir(path) else text


def _identity(source: Source) -> list[str]:
    places = (place for place in (source.model, source.adapter) if place)
    return [
        str(place.folder.resolve()) if place.folder else f"{place.repo}@{place.revision or 'main'}" for place in places
    ]


def _device_meant(name: str) -> str:
    return resolve_device(name).type if name == "auto" else name.partition(":")[0]


def _dtype_meant(name: str, base: Checkpoint, device: str) -> list[str]:
    """What is computed in and, if it is not what the base stores, what is saved."""
    compute = str(resolve_dtype(name, base.main_dtype(), torch.device(device)))
    stored = {str(info.dtype) for info in base.tensors.values() if info.dtype.is_floating_point}
    return [compute, "stored" if name == "auto" or stored == {compute} else compute]


def _change(key: str, before: Any, after: Any) -> str:
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, after)]
    told = texts[0] != texts[1] and max(map(len, texts)) <= 60
    return f"{key} was {texts[0]}, is {texts[1]}" if told else f"{key} is not the same"
