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
from modules.config.yaml_file import Place
from modules.runtime.errors import ConfigError
from modules.runtime.text import ranges

VERSION = "1.0.0"  # of the program
TABLES = ("full", "changed", "summary")  # of the command line: how much of the phrase table is shown
# What the programs' help says of options that both have, on one line of a screen.
CONFIG = "the YAML file (default: {})"
SET = "in place of a key of the file"
QUIET = "only warnings, errors and the last line"

_EVEN_IF_ABSENT = Field(validate_default=True)  # of a key that some uses need
# Of a key that has no part in what a search finds: a run goes on that was begun with another value.
_NO_PART = {"no_part": True}


@dataclass(frozen=True)
class Directories(Section):
    """Where the models come from and where the merge goes."""

    model_path1: kinds.Model
    """The base model: a folder, a GGUF file, or an id of the Hugging Face hub (org/name or org/name@revision)."""
    output_directory: Annotated[kinds.Output, _EVEN_IF_ABSENT] = ""
    """Where the merged model goes; must be empty or absent. Only the mapper and --score do without."""
    model_directory: kinds.Folder | None = None
    """All models in this folder are candidates, in alphabetical order, unless models_to_merge names some."""


@dataclass(frozen=True)
class Mapper(Section):
    """How far the mapper follows the model; only the mapper reads this."""

    prob_min: kinds.number(ge=0, le=100) = 10.0
    """Percent; a less probable next token is not followed."""
    top_k: kinds.CountFromOne = 3
    """Next tokens that are followed at every place."""
    max_depth: kinds.CountFromOne = 5
    """Tokens of a branch."""
    additional_length: kinds.Count = 20
    """Tokens by which every branch is continued greedily, to be read."""
    max_branches: kinds.CountFromOne | None = None
    """Branches of a context, the likeliest; all others are cut. null: all."""
    min_joint: kinds.number(gt=0, le=100) | None = None
    """Percent; a branch is not followed to where its tokens together are less probable. null: any."""


@dataclass(frozen=True)
class Discover(Section):
    """What models write for the mapper's --discover and --rate; only these read this."""

    prompts: kinds.AnyPath | None = None
    """A text file with a prompt on each line. null: example_phrases/prompts.txt, or openings.txt if there is no chat
    template."""
    samples: kinds.CountFromOne = 8
    """Texts that are drawn for every prompt."""
    tokens: kinds.CountFromOne = 220
    """Tokens of a text, at most."""
    temperature: kinds.Limit = 0.8
    """By which logits are divided before a token is drawn."""
    language: kinds.Text = "en"
    """The language of the texts: a code that wordfreq knows."""
    phrases: kinds.CountFromOne = 30
    """Phrases that --yaml gets, the most over-used first."""


@dataclass(frozen=True)
class Joint(Section):
    """How a joint search steps; merge_ratios and min_gain are not used by it."""

    steps: kinds.CountFromOne = 25
    """How many steps a joint search makes; each costs about four forwards of all phrases."""
    step_size: kinds.number(gt=0, le=1) = 0.08
    """By how much a candidate's weight moves at most in the first step; in the last it is a tenth of that."""


@dataclass(frozen=True)
class Learn(Section):
    """How --learn makes an adapter of the base; only it reads this."""

    rank: kinds.CountFromOne = 8
    """Rank of the adapter's matrices; more can learn more, and drift further."""
    steps: kinds.Count = 40
    """How many steps are made; each costs about three forwards of its pairs and texts. 0: --unslop learns nothing."""
    learning_rate: kinds.Limit = 1e-3
    """By how much a weight of the adapter moves at most in the first step; in the last it is a tenth of that."""
    pairs: kinds.CountFromOne = 16
    """Pairs of phrase and context that a step looks at; all have had their turn before any comes again."""
    drift_tokens: kinds.CountFromOne = 512
    """At how many tokens of neutral text, and of the base's own answers, a step compares the adapter with the base."""


@dataclass(frozen=True)
class Settings(Section):
    """The settings of Merge Monster and Monster Mapper. Only `directories` and some phrases must be there."""

    directories: Directories
    models_to_merge: Annotated[kinds.Candidates, _EVEN_IF_ABSENT] = ()
    """The candidates, in the order in which they are tried: models of the base's architecture and size, LoRA adapters
    of the base, or model+adapter."""
    tokenizer: kinds.Folder | None = None
    """A folder from which GGUF files have their tokenizer. null: it is rebuilt from each file. See
    docs/use.md#gguf-files."""
    on_error: Literal["stop", "skip"] = field(default="stop", metadata=_NO_PART)
    """If a candidate can't be read any more: stop (mend it, then --resume) or skip (keep what was accepted of it, go on
    without it)."""
    keep_downloads: kinds.Boolean = field(default=True, metadata=_NO_PART)
    """Leave what is fetched from the hub in its cache. false removes it again once the output is written."""
    search: Literal["greedy", "joint"] = "greedy"
    """greedy tries merge_ratios on layer after layer, candidate after candidate; joint moves all weights at once, by
    gradient, and drift counts. See docs/search.md."""
    joint: Joint = field(default_factory=Joint)
    merge_ratios: kinds.one_or_more(kinds.number(ge=0, le=1)) = (0.2, 0.4, 0.6, 0.8)
    """The candidate's weights that are tried on every layer, 0 to 1 (1 takes its layer). The time grows with their
    number."""
    merge_method: kinds.Methods = ("lerp",)
    """How two layers are mixed; of a list, one after another, each going on from the last one's result. ties and
    dare take a density, 0.5 unless it is given: {name: ties, density: 0.3}."""
    layers: kinds.Layers | None = None
    """The layers that are searched, counted from 0: 8-24, or a list such as [0, 3, 8-12]; null: all. The others stay
    the base's."""
    merge_headers: kinds.Boolean = True
    """Try the input embedding and the output head too, after a candidate's layers; rows are matched token by token."""
    strategy: kinds.Strategy = "cumulative"
    """When a merge of a layer is accepted."""
    strategy_threshold: kinds.number(gt=0, le=1) = 0.6
    """quantitive: the share of the pairs of phrase and context that must improve."""
    auto_weights: kinds.Boolean = False
    """Give every phrase the weight 1 / its probability in the base, so that all count the same at the start."""
    bad_phrases: Phrases = ()
    """What the merged model should say less: a list of phrases with their contexts. See docs/phrases.md."""
    good_phrases: Phrases = ()
    """What the merged model should say more."""
    system: System = field(default=None, metadata=_NO_PART)
    """A system turn for all chats of this file that have none."""
    template: kinds.Template | None = None
    """Settings of the base's chat template, such as {enable_thinking: false}."""
    phrase_files: kinds.Paths = field(default=(), metadata=_NO_PART)
    """YAML files whose bad_phrases and good_phrases are added."""
    held_out: kinds.number(ge=0, lt=1) = field(default=0.0, metadata=_NO_PART)
    """The share of each phrase's contexts that is scored and never searched, to show overfitting; 0.25 is a good share
    of long lists. See docs/phrases.md."""
    held_out_files: kinds.Paths = field(default=(), metadata=_NO_PART)
    """Phrase files whose pairs are all scored and never searched."""
    min_gain: kinds.AutoOrWeight = "auto"
    """cumulative: the smallest drop of the total that is accepted. auto: twice the total's rounding error, 0 in
    float32. See docs/hardware.md#rounding."""
    drift_weight: kinds.AutoOrWeight | None = None
    """What a nat of drift (KL from the base) adds to the total that trials are judged by. null: 0, or auto for a joint
    search. auto: 0.05 nats count as much as all phrases do in the base."""
    max_drift: kinds.Limit | None = None
    """Reject trials that drift further from the base, in nats per token (0.02, say). Judging drift takes two or three
    times as long."""
    neutral_tokens: kinds.CountFromOne = 1024
    """Tokens on which the drift of every trial is measured, if it counts: half of neutral text, half of the base's own
    answers. More are slower and surer."""
    baselines: kinds.Boolean = field(default=True, metadata=_NO_PART)
    """Score every candidate on its own, too, and show it beside the merge."""
    samples: kinds.Texts | None = field(default=None, metadata=_NO_PART)
    """Prompts that base and merge answer with the same seed, for the log and the model card. null: three of those of
    own_texts; []: the merge answers nothing."""
    eval: kinds.Texts = field(default=(), metadata=_NO_PART)
    """Tasks of lm_eval (pip install lm-eval) on which base and merge are scored."""
    eval_path: kinds.Folder | None = field(default=None, metadata=_NO_PART)
    """A folder of your own tasks, in lm_eval's format."""
    neutral_texts: kinds.Paths | None = field(default=None, metadata=_NO_PART)
    """Text files on which drift is measured. null: those of the program (example_phrases/neutral); [] for none. See
    docs/search.md#neutral-text."""
    own_texts: kinds.Paths | None = field(default=None, metadata=_NO_PART)
    """Files of prompts, one a line. The base answers them at the start, and drift is measured on its answers too. null:
    those of the program (example_phrases/prompts.txt, or openings.txt without a chat template); [] for none."""
    device: kinds.Device = "auto"
    """Where to compute. auto takes an accelerator if there is one, else cpu."""
    dtype: Literal[kinds.DTYPES] = "auto"
    """What the merged model is saved in, and computed in unless compute_dtype says otherwise. auto: every tensor as the
    base stores it."""
    compute_dtype: Literal[kinds.COMPUTE_DTYPES] = "auto"
    """What is computed in. auto: float32 on a CPU if it fits; on a GPU float16, or bfloat16+float32 where float16
    overflows. See docs/hardware.md#data-types."""
    random_seed: kinds.Count = 512
    """The seed of all that is drawn: contexts that are held out, texts that models write."""
    trust_remote_code: kinds.Boolean = False
    """Run Python code that a model brings along; only for architectures that need it."""
    mapper: Mapper = field(default_factory=Mapper, metadata=_NO_PART)
    discover: Discover = field(default_factory=Discover, metadata=_NO_PART)
    learn: Learn = field(default_factory=Learn, metadata=_NO_PART)

    @property
    def weight_of_drift(self) -> float | str:
        """What a nat of drift adds to the total, or auto."""
        if self.drift_weight is None:
            return "auto" if self.search == "joint" else 0.0
        return self.drift_weight

    @property
    def is_guarded(self) -> bool:
        """Whether drift counts in what is judged by."""
        return self.weight_of_drift != 0 or self.max_drift is not None

    def layers_in(self, count: int) -> tuple[int, ...]:
        """Which layers are searched of a base that has so many. Raises ConfigError if one of them is not there."""
        absent = [layer for layer in self.layers or () if layer >= count]
        if absent:
            raise ConfigError(f"layers: {', '.join(ranges(absent))}: the base has {count} layers, 0 to {count - 1}")
        return tuple(range(count)) if self.layers is None else self.layers


@dataclass(frozen=True)
class Config(Settings):
    """Everything a run depends on: what the file says, with pairs of all files in place of its own phrases."""

    bad_phrases: tuple[Pair, ...] = ()
    good_phrases: tuple[Pair, ...] = ()
    held_out_pairs: tuple[Pair, ...] = field(default=(), metadata=_NO_PART)  # scored and never searched

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs that are searched with, the bad ones first."""
        return self.bad_phrases + self.good_phrases

    def dumped(self) -> dict[str, Any]:
        """All keys as JSON has them, pairs with their rendered chats in place of phrase lists."""
        pairs = {key: [pair.written() for pair in getattr(self, key)] for key in (*PHRASES, "held_out_pairs")}
        return json.loads(json.dumps({**asdict(self), **pairs}))

    @classmethod
    def loaded(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that was dumped; nothing is looked for on the disk. Raises ValueError if it is none."""
        return TypeAdapter(cls).validate_python(values)


CONFIG_KEYS = tuple(key.name for key in fields(Settings))
# What phrase_files name is in bad_phrases and good_phrases, and `system` is in their chats. All keys that are not here
# have a part in the result, those of `directories` as far as they name models.
NO_PART = tuple(key.name for key in fields(Config) if key.metadata.get("no_part"))

_SECTIONS = {
    "directories": Directories,
    "joint": Joint,
    "mapper": Mapper,
    "discover": Discover,
    "learn": Learn,
    "bad_phrases": Phrase,
    "good_phrases": Phrase,
    "contexts": Context,
    "messages": Message,
}


def known_keys(place: Place) -> tuple[str, ...]:
    """The keys that the mapping at a place of a file can have."""
    names = [part for part in place if isinstance(part, str)]
    section = _SECTIONS[names[-1]] if names else Settings
    # One that is a word of Python's is a field with an underscore behind it.
    return tuple(key.name.removesuffix("_") for key in fields(section))
