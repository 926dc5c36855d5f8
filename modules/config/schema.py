"""The keys of the YAML file, their kinds and defaults, as frozen dataclasses and as a JSON schema for editors.

Knows: every key. Refuses to know: torch, models, tokenizers: it must answer a typo in under a second; and how a file is
read.

`python -m modules.run.schema > modules/config/schema.json` writes the JSON schema anew after a change.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

import modules.config.fields as kinds
from modules.config.phrase_lists import (
    CLOSED,
    BadPhrases,
    ChatContext,
    Context,
    GoodPhrases,
    Message,
    Pair,
    Phrase,
    PhraseLists,
    System,
)
from modules.config.yaml_file import Place
from modules.runtime import ConfigError, spans

VERSION = "1.0.0"  # of the program
TABLES = ("full", "changed", "summary")  # of the command line: how much of the phrase table is shown

# Keys that have no part in what a search finds: a run goes on that was begun with others. (What phrase_files name is in
# bad_phrases and good_phrases, and `system` is in their chats.) All other keys have one, those of `directories` as far
# as they name models.
NO_PART = (
    "on_error",
    "keep_downloads",
    "phrase_files",
    "system",
    "held_out",
    "held_out_files",
    "held_out_pairs",
    "baselines",
    "samples",
    "neutral_texts",
    "mapper",
    "discover",
)


@dataclass(frozen=True)
class Directories:
    """Where the models come from and where the merge goes."""

    __pydantic_config__ = CLOSED
    model_path1: kinds.Model
    """The base model, with which everything starts: a folder, a GGUF file or an id of the hub."""
    output_directory: Annotated[kinds.Output, Field(default="")]
    """The merged model's folder; must be empty or absent. Only the mapper and --score run without one."""
    model_directory: kinds.Folder | None = None
    """All models in here are candidates, alphabetically, unless models_to_merge names some."""


@dataclass(frozen=True)
class Mapper:
    """How far the mapper follows the model."""

    __pydantic_config__ = CLOSED
    prob_min: kinds.Percent = 10.0
    """Percent; a less probable next token is not followed."""
    top_k: kinds.CountFromOne = 3
    """Next tokens that are followed at every place."""
    max_depth: kinds.CountFromOne = 5
    """Tokens of a branch."""
    additional_length: kinds.Count = 20
    """Tokens by which every branch is continued greedily, to be read."""
    max_branches: kinds.CountFromOne | None = None
    """Branches of a context, the likeliest; all others are cut. null: all."""
    min_joint: kinds.PercentAboveZero | None = None
    """Percent; a branch is not followed to where all of its tokens together are less probable. null: any."""


@dataclass(frozen=True)
class Discover:
    """What the mapper lets models write, where it looks for their own phrases and counts them."""

    __pydantic_config__ = CLOSED
    prompts: kinds.AnyPath | None = None
    """A text file with a prompt on each line, in place of the program's own."""
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
class Joint:
    """How a joint search steps."""

    __pydantic_config__ = CLOSED
    steps: kinds.CountFromOne = 25
    """How many steps are made; each costs about four forwards of all phrases."""
    step_size: kinds.Threshold = 0.08
    """By how much a share moves at most in the first step; in the last it is a tenth of that."""


@dataclass(frozen=True)
class Settings:
    """The settings of Merge Monster and Monster Mapper. Only `directories` and some phrases must be there."""

    __pydantic_config__ = CLOSED
    directories: Annotated[Directories, kinds.keys_of(Directories)]
    """Where the models come from and where the merge goes."""
    models_to_merge: kinds.Candidates = ()
    """The candidates in the order in which they are tried: folders, GGUF files, ids of the hub, any with +adapter."""
    tokenizer: kinds.Folder | None = None
    """A folder with the tokenizer of the GGUF files among the models, in place of what is rebuilt from the files."""
    on_error: kinds.OnError = "stop"
    """What becomes of the run if a candidate can't be read any more. skip keeps what was accepted and goes on."""
    keep_downloads: kinds.Boolean = True
    """Leave what is fetched from the hub in its cache after the run."""
    search: kinds.Search = "greedy"
    """How shares are found: layer by layer, the best of those that are tried, or all at once, by gradient."""
    joint: Annotated[Joint, kinds.keys_of(Joint)] = field(default_factory=Joint)
    """How a joint search steps."""
    merge_ratios: kinds.Ratios = (0.2, 0.4, 0.6, 0.8)
    """The candidate's shares that are tried on every layer, 0 to 1."""
    merge_method: kinds.Methods = ("lerp",)
    """How two layers are mixed; of a list, one after another, each going on from the last one's result."""
    layers: kinds.Layers | None = None
    """The layers that are searched, counted from 0: 8-24, or a list such as [0, 3, 8-12]; null: all."""
    merge_headers: kinds.Boolean = True
    """Try the input embedding and the output head too, after a candidate's layers."""
    strategy: kinds.Strategy = "cumulative"
    """When a ratio is accepted: a lower total, no phrase worse, or enough phrases better."""
    strategy_threshold: kinds.Threshold = 0.6
    """The share of the pairs that must improve; quantitive only."""
    auto_weights: kinds.Boolean = False
    """Give every phrase the weight 1 / its probability in the base model."""
    bad_phrases: BadPhrases = ()
    """What the merged model should say less."""
    good_phrases: GoodPhrases = ()
    """What the merged model should say more."""
    system: System = None
    """A system turn before all chat contexts of this file that have none."""
    template: kinds.Template | None = None
    """Settings of the base's chat template, such as {enable_thinking: false}."""
    phrase_files: kinds.Paths = ()
    """YAML files whose bad_phrases and good_phrases are added."""
    held_out: kinds.Share = 0.0
    """The share of each phrase's contexts that is scored and never searched."""
    held_out_files: kinds.Paths = ()
    """Phrase files whose pairs are all scored and never searched."""
    min_gain: kinds.AutoOrWeight = "auto"
    """What a merge must gain; cumulative only. auto: twice the total's rounding, which is taken as 0 in float32."""
    drift_weight: kinds.AutoOrWeight | None = None
    """What a nat of drift adds to the total that is judged by; null: 0, or auto if the search is joint. auto: 0.05 nats
    count as much as all phrases do in the base."""
    max_drift: kinds.Limit | None = None
    """Nats per token; a trial that drifts further from the base is not taken."""
    neutral_tokens: kinds.CountFromOne = 512
    """Tokens of neutral text on which the drift of every trial is measured, if it is judged by that."""
    baselines: kinds.Boolean = True
    """Score every candidate taken whole, too, and show it beside the merge."""
    samples: kinds.Texts | None = None
    """Prompts that base and merge answer, in place of the program's own; [] for none."""
    neutral_texts: kinds.Paths | None = None
    """Text files on which drift is measured, in place of the program's own; [] for none."""
    device: kinds.Device = "auto"
    """Where to compute. auto takes an accelerator if there is one, else cpu."""
    dtype: kinds.Dtype = "auto"
    """What is computed in and saved as. auto: what compute_dtype says, and what the base stores."""
    compute_dtype: kinds.ComputeDtype = "auto"
    """What is computed in, whatever is saved. auto: float32 on a CPU if it fits; on a GPU float16, or bfloat16+float32
    where float16 overflows."""
    random_seed: kinds.Count = 512
    """What chance there is begins with this."""
    trust_remote_code: kinds.Boolean = False
    """Run Python code that a checkpoint brings along."""
    mapper: Annotated[Mapper, kinds.keys_of(Mapper)] = field(default_factory=Mapper)
    """How far the mapper follows the model; only the mapper reads this."""
    discover: Annotated[Discover, kinds.keys_of(Discover)] = field(default_factory=Discover)
    """What models write for the mapper's --discover and --rate; only these read this."""

    @property
    def weight_of_drift(self) -> float | str:
        """What a nat of drift adds to the total, or auto."""
        if self.drift_weight is None:
            return "auto" if self.search == "joint" else 0.0
        return self.drift_weight

    @property
    def tokens_for_trials(self) -> int:
        """Tokens of neutral text that are set aside for what is judged by drift; 0 if nothing is."""
        return self.neutral_tokens if self.is_guarded else 0

    def layers_in(self, count: int) -> tuple[int, ...]:
        """Which layers are searched of a base that has so many. Raises ConfigError if one of them is not there."""
        absent = [layer for layer in self.layers or () if layer >= count]
        if absent:
            raise ConfigError(f"layers: {', '.join(spans(absent))}: the base has {count} layers, 0 to {count - 1}")
        return tuple(range(count)) if self.layers is None else self.layers

    @property
    def is_guarded(self) -> bool:
        """Whether drift counts in what is judged by."""
        return self.weight_of_drift != 0 or self.max_drift is not None


@dataclass(frozen=True)
class Config(Settings):
    """Everything a run depends on: what the file says, with the phrases of the files that it names."""

    text: str = field(default="", repr=False)  # the YAML file to the letter; not a key
    held_out_pairs: tuple[Pair, ...] = ()  # scored and never searched; of these keys, and of marked contexts

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs that are searched with, the bad ones first."""
        return self.bad_phrases + self.good_phrases

    @property
    def prompts(self) -> tuple[str, ...]:
        """What base and merge are asked."""
        return kinds.SAMPLES if self.samples is None else self.samples


CONFIG_KEYS = tuple(key.name for key in fields(Settings))

_SECTIONS = {
    "directories": Directories,
    "joint": Joint,
    "mapper": Mapper,
    "discover": Discover,
    "bad_phrases": Phrase,
    "good_phrases": Phrase,
    "contexts": (Context, ChatContext),
    "messages": Message,
}


def known_keys(place: Place) -> tuple[str, ...]:
    """The keys that the mapping at a place of a file can have."""
    names = [part for part in place if isinstance(part, str)]
    sections = _SECTIONS[names[-1]] if names else Settings
    of_each = [kinds.names_of_keys(section) for section in (sections if isinstance(sections, tuple) else (sections,))]
    return tuple(dict.fromkeys(key for keys in of_each for key in keys))


def json_schema() -> dict[str, Any]:
    """What an editor needs to complete and check a configuration and, under $defs/PhraseLists, a phrase list."""
    CLOSED["use_attribute_docstrings"] = True  # only now: to read them takes time that a typo should not wait for
    schema, lists = (TypeAdapter(kind).json_schema() for kind in (Settings, PhraseLists))
    schema["$defs"] |= lists.pop("$defs") | {"PhraseLists": lists}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
