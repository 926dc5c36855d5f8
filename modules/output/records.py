"""What the lines of a journal and the parts of a recipe are: types whose fields are checked when they are read.

Knows: names, types, limits. Refuses to know: files, in which order a run writes them.

What was read is not always what was written: a disk or an editor may have changed it. No record holds a path.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    TypeAdapter,
)

from modules.config.fields import COMPUTE_DTYPES
from modules.config.phrase_lists import Chat
from modules.config.schema import Config
from modules.merging.methods import parsed, spelled
from modules.metrics.own_answers import ANSWERS, Answers
from modules.scoring.budget import Packing
from modules.search.decision import Decision

FORMAT = 1  # of journals and recipes

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int | float, Field(ge=-sys.float_info.max, le=sys.float_info.max)]
Method = Annotated[str, AfterValidator(lambda text: spelled(*parsed(text)))]
Numbers = Annotated[tuple[Number, ...], Strict(False)]
Rows = Annotated[tuple[Numbers, ...], Strict(False)]  # one for each layer, with a number for each candidate
Metrics = dict[str, Number]  # by name
ComputeDtype = Literal[COMPUTE_DTYPES[1:]]
# JSON has no infinity: a probability of zero, whose logarithm that is, is written as null.
LogProbability = Annotated[
    float,
    Field(lt=math.inf),
    BeforeValidator(lambda value: -math.inf if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
LogProbabilities = Annotated[tuple[LogProbability, ...], Strict(False)]  # joint ones, of the pairs


_PACKING = TypeAdapter(Packing)


def _settings(value: Any) -> Config:
    if not isinstance(value, Config | Mapping):
        raise ValueError("expected settings")
    return value if isinstance(value, Config) else Config.loaded(value)


def _packing(value: Any) -> Packing:
    packing = _PACKING.validate_python(value)
    if min(packing.tokens, packing.logits) < 0:
        raise ValueError("expected sizes of at least 0")
    return packing


def _answers(value: Any) -> Answers:
    return value if isinstance(value, Answers) else ANSWERS.validate_python(value)


Settings = Annotated[Config, PlainValidator(_settings), PlainSerializer(Config.dumped)]
Packed = Annotated[Packing, PlainValidator(_packing), PlainSerializer(asdict)]  # how phrases were packed for scores


class Record(BaseModel):
    """A mapping of a journal or a recipe; its fields are in the order in which they are written. Others are kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    def written(self, *without: str) -> dict[str, Any]:
        """The mapping as JSON has it; what has its default is left out."""
        return self.model_dump(exclude=set(without), exclude_defaults=True)


class Run(Record):
    """How a run began, or in what it computes from here on."""

    format: Literal[FORMAT]
    program: str
    libraries: dict[str, str]
    settings: Settings
    device: str  # its type
    computed: ComputeDtype
    neutral: str | None = None  # a digest of the texts, where trials are judged by their drift


class Source(Record):
    """The base, which is number 0, or a candidate."""

    number: Count
    name: str
    where: str  # an id of the hub with its commit, or a folder's name; an adapter's behind a plus
    fingerprint: dict[str, Any]


class Scored(Record):
    """What was measured of a model: of the base, of a candidate taken whole, or of the merge after its turn."""

    number: Count  # of the source
    log_probabilities: LogProbabilities
    packing: Packed
    metrics: Metrics = {}
    weights: Numbers = ()  # signed; of the base
    rounding: Numbers = ()  # how far it moves the probabilities; of the base, in half types
    failure: str | None = None  # why the candidate was given up


class Decided(Record):
    """A decision, and how long it took."""

    candidate: Count
    model: str
    layer: Count | None
    method: Method
    ratio: Annotated[int | float, Field(ge=0, le=1)] | None
    before: int | float  # a total may be too large for a number
    after: int | float
    log_probabilities: LogProbabilities
    metrics: Metrics = {}  # those that are weighed or limited, afterwards
    warning: str | None
    note: str | None
    packing: Packed | None = None
    seconds: Number
    computed: ComputeDtype | None = None  # what the run goes on in, if not in what it was taken in

    @property
    def decision(self) -> Decision:
        """The decision as it was before it was written down."""
        numbers = self.before, self.after, self.log_probabilities, self.metrics
        return Decision(self.model, self.layer, self.method, self.ratio, *numbers, self.warning, self.note)


class Mixed(Record):
    """A joint search: where its steps begin, how each metric changes there with each weight; what it has kept."""

    start: Rows
    slopes: dict[str, Rows]  # of the total and of the metrics that are weighed
    weights: Rows = ()
    steps: list[Metrics] = []  # what each began with, and its seconds


class Step(Record):
    """A step of a joint search: the metrics that it began with, and what it has led to."""

    step: Count
    weights: Rows
    mean: Rows
    square: Rows
    metrics: Metrics
    packing: Packed
    seconds: Number


class Learned(Record):
    """A step of learning: the metrics that it began with."""

    step: Count
    metrics: Metrics  # loss, total and, by text, drift
    seconds: Number


class Phrase(Record):
    """A pair of phrase and context with its signed weight, and its probability before and after the run."""

    kind: Literal["BAD", "GOOD"]
    phrase: str
    context: str
    weight: Number
    before: Number
    after: Number
    rounding: Number = 0  # of the probabilities; only where a half type was computed in
    chat: Chat | None = None
    variants: Annotated[tuple[str, ...], Strict(False)] = ()  # of an any-of phrase, which shows them all

    @property
    def shown(self) -> str:
        """The context as people read it."""
        return self.context if self.chat is None else str(self.chat)


class Sample(Record):
    """A prompt, and what the base and the merge have answered."""

    prompt: str
    base: str
    merge: str
    broken_off: Annotated[tuple[Literal["base", "merge"], ...], Strict(False)] = ()  # answers that reached the limit


class Answered(Record):
    """What the base has answered to prompts."""

    answers: Annotated[Answers, PlainValidator(_answers), PlainSerializer(asdict)]


class OnTasks(Record):
    """What the base scores on tasks of lm_eval."""

    metrics: Metrics


# The lines of a journal, by kind.
LINES = {
    "run": Run,
    "source": Source,
    "answers": Answered,
    "start": Scored,
    "tasks": OnTasks,
    "baseline": Scored,
    "joint": Mixed,
    "step": Step,
    "learned": Learned,
    "decision": Decided,
    "candidate": Scored,
}
