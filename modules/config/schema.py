"""The keys of the YAML file, their kinds, defaults and descriptions, as frozen dataclasses.

Knows: every key. Refuses to know: torch, models, tokenizers: it must answer a typo in under a second; and how a file is
read.

The text under a key is its only description. After a change `python demo/write_keys.py` writes schema.json, the table
in docs/use.md and the comments of default.yaml and default-mapper.yaml anew.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter

import modules.config.fields as kinds
from modules.config.phrase_lists import PHRASES, Context, Message, Pair, Phrase, Phrases, Section, System
from modules.config.yaml_file import KeyPath
from modules.runtime.errors import ConfigError
from modules.runtime.text import pluralize, ranges

VERSION = "1.0.0"  # of the program
TABLES = ("full", "changed", "summary")  # of the command line: how much of the phrase table is shown
# Help texts of options that both programs have, on one line of a screen.
CONFIG = "configuration file (default: {})"
SET = "override a setting (repeatable)"
QUIET = "show only warnings, errors and the last line"

_EVEN_IF_ABSENT = Field(validate_default=True)  # of a key that some uses need
# Marks a key that does not affect what a search finds: a run can be resumed with another value of it.
_NO_PART = {"no_part": True}


@dataclass(frozen=True)
class Directories(Section):
    """Where the models are and where the merge goes."""

    model_path1: kinds.Model
    """The base model: a folder, a GGUF file or a Hugging Face id (org/name or org/name@revision)."""
    output_directory: Annotated[kinds.Output, _EVEN_IF_ABSENT] = ""
    """Folder for the merged model; must be empty or absent. The mapper and --score do not need it."""
    model_directory: kinds.Folder | None = None
    """Every model in this folder is a candidate, in alphabetical order, unless models_to_merge is set."""


@dataclass(frozen=True)
class Mapper(Section):
    """How far the mapper follows the model; only the mapper reads this."""

    prob_min: kinds.number(ge=0, le=100) = 10.0
    """Minimum probability of a next token, in percent."""
    top_k: kinds.CountFromOne = 3
    """Next tokens to follow at each position."""
    max_depth: kinds.CountFromOne = 5
    """Maximum length of a branch, in tokens."""
    additional_length: kinds.Count = 20
    """Tokens that continue each branch greedily, to make it readable."""
    max_branches: kinds.CountFromOne | None = None
    """Branches to keep per context, the most probable ones. null: all."""
    min_joint: kinds.number(gt=0, le=100) | None = None
    """Minimum joint probability of a branch, in percent. null: none."""


@dataclass(frozen=True)
class Discover(Section):
    """What models generate for the mapper's --discover and --rate; only these read this."""

    prompts: kinds.AnyPath | None = None
    """Text file with one prompt per line. null: example_phrases/prompts.txt, or openings.txt without chat template."""
    samples: kinds.CountFromOne = 8
    """Texts to generate per prompt."""
    tokens: kinds.CountFromOne = 220
    """Maximum length of a text, in tokens."""
    temperature: kinds.Limit = 0.8
    """Sampling temperature."""
    language: kinds.Text = "en"
    """Language of the texts: a language code of wordfreq."""
    phrases: kinds.CountFromOne = 30
    """Maximum number of phrases that --yaml writes, the most overused first."""


@dataclass(frozen=True)
class StartWeight(Section):
    """The weight of a candidate where the steps of a joint search begin."""

    candidate: kinds.CountFromOne
    """The candidate's number in merge order."""
    weight: kinds.number(ge=0, le=1)
    """Its weight."""
    layers: kinds.Layers | None = None
    """The layers in which it has this weight. null: all, and embedding, LM head and final norm."""


@dataclass(frozen=True)
class Joint(Section):
    """The steps of a joint search, which ignores merge_ratios and min_gain."""

    steps: kinds.CountFromOne = 25
    """Number of steps; each takes about four forward passes over all phrases."""
    step_size: kinds.number(gt=0, le=1) = 0.08
    """Largest change of a weight in the first step; it falls to a tenth of this in the last step."""
    start: tuple[StartWeight, ...] = ()
    """Weights to start from: [{candidate: 1, layers: 0-7, weight: 0.3}]; without layers: all. []: the best model."""


@dataclass(frozen=True)
class Learn(Section):
    """How --learn and --unslop make an adapter. Keys: docs/use.md#all-keys."""

    rank: kinds.CountFromOne = 8
    """Rank of the adapter."""
    steps: kinds.Count = 60
    """Number of steps; each takes about three forward passes over its pairs and texts. 0: --unslop learns nothing."""
    learning_rate: kinds.Limit = 1e-3
    """Adam's learning rate in the first step; it falls to a tenth of this in the last step."""
    pairs: kinds.CountFromOne = 8
    """Pairs of phrase and context per step."""
    texts: kinds.AnyPath | None = None
    """A file that --discover keeps in samples: more answers to train on and to stay close to."""
    drift_tokens: kinds.CountFromOne = 1024
    """Tokens per step on which the adapter is compared with the base: a quarter neutral text, the rest its own answers.
    Listed phrases in those answers are trained on, too."""


@dataclass(frozen=True)
class Settings(Section):
    """The settings of Merge Monster and Monster Mapper. Only `directories` and some phrases are required."""

    directories: Directories
    models_to_merge: Annotated[kinds.Candidates, _EVEN_IF_ABSENT] = ()
    """Candidates in merge order: models of the base's architecture and size, LoRA adapters of the base, or
    model+adapter."""
    tokenizer: kinds.Folder | None = None
    """Folder with the tokenizer for GGUF files. null: rebuild it from each file. See docs/use.md#gguf-files."""
    on_error: Literal["stop", "skip"] = field(default="stop", metadata=_NO_PART)
    """If a candidate can't be read during the run: stop (fix it, then --resume) or skip (keep its merges so far)."""
    keep_downloads: kinds.Boolean = field(default=True, metadata=_NO_PART)
    """Keep downloads in the Hugging Face cache. false: remove this run's downloads after the output is written."""
    search: Literal["greedy", "joint"] = "greedy"
    """greedy tries merge_ratios layer by layer. joint optimizes all weights at once by gradient. See docs/search.md."""
    joint: Joint = field(default_factory=Joint)
    merge_ratios: kinds.one_or_more(kinds.number(ge=0, le=1)) = (0.2, 0.4, 0.6, 0.8)
    """Candidate weights to try on each layer, 0 to 1 (1 replaces the layer). The time grows with their number."""
    merge_method: kinds.Methods = ("lerp",)
    """How two layers are mixed, or a list of methods to apply in turn. With a density (default 0.5): {name: ties,
    density: 0.3}."""
    layers: kinds.Layers | None = None
    """Layers to search, counted from 0: 8-24 or [0, 3, 8-12]. null: all. The other layers stay the base's."""
    merge_headers: kinds.Boolean = True
    """Also merge the input embedding and LM head, after a candidate's layers. Rows are matched by token."""
    strategy: kinds.Strategy = "cumulative"
    """When a layer's merge is accepted."""
    strategy_threshold: kinds.number(gt=0, le=1) = 0.6
    """quantitive: the fraction of all pairs of phrase and context that must improve."""
    auto_weights: kinds.Boolean = False
    """Weight each pair by 1 / its probability in the base, so that all count the same at the start."""
    bad_phrases: Phrases = ()
    """What the merged model should say less: phrases with their contexts. See docs/phrases.md."""
    good_phrases: Phrases = ()
    """What the merged model should say more."""
    system: System = field(default=None, metadata=_NO_PART)
    """System message for all chats in this file that have none."""
    template: kinds.Template | None = None
    """Variables for the base's chat template, such as {enable_thinking: false}."""
    phrase_files: kinds.Paths = field(default=(), metadata=_NO_PART)
    """YAML files with more bad_phrases and good_phrases."""
    held_out: kinds.number(ge=0, lt=1) = field(default=0.0, metadata=_NO_PART)
    """Fraction of each phrase's contexts to hold out: scored, not searched. Try 0.25 for long lists."""
    held_out_files: kinds.Paths = field(default=(), metadata=_NO_PART)
    """Phrase files whose pairs are all held out."""
    min_gain: kinds.AutoOrWeight = "auto"
    """cumulative: the smallest drop of the total that counts. auto: twice its rounding (docs/hardware.md#rounding)."""
    drift_weight: kinds.AutoOrWeight | None = None
    """Penalty per nat of KL from the base. null: 0, or auto for joint. auto: 0.05 nats cost as much as all phrases."""
    max_drift: kinds.Limit | None = None
    """Limit on the KL from the base, in nats per token; try 0.02. A greedy search takes 2-3 times as long."""
    neutral_tokens: kinds.CountFromOne = 1024
    """Tokens on which each trial's KL is measured, half neutral text, half own answers; more are more precise."""
    baselines: kinds.Boolean = field(default=True, metadata=_NO_PART)
    """Also score each candidate on its own, to compare it with the merge."""
    samples: kinds.Texts | None = field(default=None, metadata=_NO_PART)
    """Prompts to show the answers of base and merge to, with the same seed. null: three of own_texts. []: none."""
    eval: kinds.Texts = field(default=(), metadata=_NO_PART)
    """Tasks of lm_eval (pip install lm-eval) on which base and merge are scored."""
    eval_path: kinds.Folder | None = field(default=None, metadata=_NO_PART)
    """Folder of your own tasks, in lm_eval's format."""
    neutral_texts: kinds.Paths | None = field(default=None, metadata=_NO_PART)
    """Text files on which drift (KL from the base) is measured. null: example_phrases/neutral. []: none."""
    own_texts: kinds.Paths | None = field(default=None, metadata=_NO_PART)
    """Files of prompts. The base's answers are text for drift too (docs/search.md). null: built-in ones. []: none."""
    device: kinds.Device = "auto"
    """Where to compute. auto: an accelerator if there is one, else cpu."""
    dtype: Literal[kinds.DTYPES] = "auto"
    """Dtype to save: auto (the base's), float16, bfloat16 or float32. Unless auto, compute_dtype auto takes it too."""
    compute_dtype: Literal[kinds.COMPUTE_DTYPES] = "auto"
    """Data type of the computation. auto: float32 on a CPU, float16 on a GPU. See docs/hardware.md#data-types."""
    random_seed: kinds.Count = 512
    """Seed for held-out contexts, for dare and for generated text."""
    trust_remote_code: kinds.Boolean = False
    """Run Python code that comes with a model. Only some architectures need it."""
    mapper: Mapper = field(default_factory=Mapper, metadata=_NO_PART)
    discover: Discover = field(default_factory=Discover, metadata=_NO_PART)
    learn: Learn = field(default_factory=Learn, metadata=_NO_PART)

    @property
    def weight_of_drift(self) -> float | str:
        """The penalty that a nat of drift adds to the total, or auto."""
        if self.drift_weight is None:
            return "auto" if self.search == "joint" else 0.0
        return self.drift_weight

    @property
    def is_guarded(self) -> bool:
        """Whether drift counts in the objective or has a limit."""
        return self.weight_of_drift != 0 or self.max_drift is not None

    def layers_in(self, count: int) -> tuple[int, ...]:
        """The layers to search. count: the base's layers. Raises ConfigError if a layer does not exist."""
        absent = [layer for layer in self.layers or () if layer >= count]
        if absent:
            raise ConfigError(f"layers: {', '.join(ranges(absent))}: the base has {count} layers, 0 to {count - 1}")
        return tuple(range(count)) if self.layers is None else self.layers

    def start_in(self, layers: int, candidates: int) -> tuple[StartWeight, ...]:
        """The weights where a joint search begins. layers, candidates: their numbers. Raises ConfigError if a candidate
        or a layer does not exist."""
        for number, entry in enumerate(self.joint.start):
            key = f"joint.start[{number}]"
            if entry.candidate > candidates:
                count = pluralize(candidates, "candidate")
                raise ConfigError(f"{key}.candidate: {entry.candidate}, but this run has {count}")
            if entry.layers and entry.layers[-1] >= layers:
                raise ConfigError(f"{key}.layers: {entry.layers[-1]}, but the base has layers 0 to {layers - 1}")
        return self.joint.start


@dataclass(frozen=True)
class Config(Settings):
    """Everything a run depends on: what the file says, with pairs of all files in place of its own phrases."""

    bad_phrases: tuple[Pair, ...] = ()
    good_phrases: tuple[Pair, ...] = ()
    held_out_pairs: tuple[Pair, ...] = field(default=(), metadata=_NO_PART)  # scored and never searched

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All searched pairs, the bad ones first."""
        return self.bad_phrases + self.good_phrases

    def dumped(self) -> dict[str, Any]:
        """All keys as JSON values, with pairs and their rendered chats instead of phrase lists."""
        pairs = {}
        for key in (*PHRASES, "held_out_pairs"):
            pairs[key] = [pair.written() for pair in getattr(self, key)]
        return json.loads(json.dumps({**asdict(self), **pairs}))

    @classmethod
    def loaded(cls, values: Mapping[str, Any]) -> Self:
        """The configuration from a dump. Nothing is checked on the disk. Raises ValueError if it is no dump."""
        return TypeAdapter(cls).validate_python(values)


CONFIG_KEYS = tuple(key.name for key in fields(Settings))
# The phrases of phrase_files are in bad_phrases and good_phrases, and `system` is in their chats. All keys that are not
# here affect the result; of `directories`, only those that name models.
NO_PART = tuple(key.name for key in fields(Config) if key.metadata.get("no_part"))

_SECTIONS = {
    "directories": Directories,
    "joint": Joint,
    "start": StartWeight,
    "mapper": Mapper,
    "discover": Discover,
    "learn": Learn,
    "bad_phrases": Phrase,
    "good_phrases": Phrase,
    "contexts": Context,
    "messages": Message,
}


def known_keys(key_path: KeyPath) -> tuple[str, ...]:
    """The keys that the mapping at a key path can have."""
    names = [part for part in key_path if isinstance(part, str)]
    section = _SECTIONS[names[-1]] if names else Settings
    # A key that is a keyword of Python is a field with an underscore after it.
    return tuple(key.name.removesuffix("_") for key in fields(section))
