"""The lines of a journal and the parts of a recipe, as types whose fields are checked when they are read.

Knows: names, types, limits. Refuses to know: files, the order in which a run writes them.

They are checked because a disk or an editor may have changed them. No record contains a path.
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
# JSON has no infinity: minus infinity, the logarithm of a probability of zero, is written as null.
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
Packed = Annotated[Packing, PlainValidator(_packing), PlainSerializer(asdict)]  # how phrases were packed for scoring


class Record(BaseModel):
    """A mapping in a journal or a recipe. Its fields are in the order of writing. Unknown fields are kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    def written(self, *without: str) -> dict[str, Any]:
        """The mapping as JSON values. Fields with default values are left out."""
        return self.model_dump(exclude=set(without), exclude_defaults=True)


class Run(Record):
    """How a run began, or the arithmetic in which it continues."""

    format: Literal[FORMAT]
    program: str
    libraries: dict[str, str]
    settings: Settings
    device: str  # its type
    computed: ComputeDtype
    neutral: str | None = None  # a digest of the texts, if trials are judged by their drift


class Source(Record):
    """The base, which is number 0, or a candidate."""

    number: Count
    name: str
    where: str  # an id of the hub with its commit, or a folder's name; an adapter follows after a plus
    fingerprint: dict[str, Any]


class Scored(Record):
    """The scores of a model: the base, a candidate taken whole, or the merge after a candidate."""

    number: Count  # of the source
    log_probabilities: LogProbabilities
    packing: Packed
    metrics: Metrics = {}
    weights: Numbers = ()  # signed; of the base
    rounding: Numbers = ()  # by how much it changes the probabilities; of the base, in half types
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
    computed: ComputeDtype | None = None  # the run's next arithmetic, if it is not that of the decision

    @property
    def decision(self) -> Decision:
        """The decision that this line records."""
        numbers = self.before, self.after, self.log_probabilities, self.metrics
        return Decision(self.model, self.layer, self.method, self.ratio, *numbers, self.warning, self.note)


class Mixed(Record):
    """A joint search: its first weights, the gradient of each metric there, and its result."""

    start: Rows
    slopes: dict[str, Rows]  # of the total and of the metrics that are weighed
    weights: Rows = ()
    steps: list[Metrics] = []  # those before each step, and its seconds


class Step(Record):
    """A step of a joint search: the metrics before it, and the state after it."""

    step: Count
    weights: Rows
    mean: Rows
    square: Rows
    metrics: Metrics
    packing: Packed
    seconds: Number


class Learned(Record):
    """A step of learning: the metrics before it."""

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
    rounding: Number = 0  # of the probabilities; only if the arithmetic is a half type
    chat: Chat | None = None
    variants: Annotated[tuple[str, ...], Strict(False)] = ()  # of an any-of phrase; `phrase` shows them all

    @property
    def shown(self) -> str:
        """The context for display."""
        return self.context if self.chat is None else str(self.chat)


class Sample(Record):
    """A prompt, and the answers of base and merge."""

    prompt: str
    base: str
    merge: str
    broken_off: Annotated[tuple[Literal["base", "merge"], ...], Strict(False)] = ()  # answers that reached the limit


class Answered(Record):
    """The base's answers to prompts."""

    answers: Annotated[Answers, PlainValidator(_answers), PlainSerializer(asdict)]


class OnTasks(Record):
    """The base's scores on tasks of lm_eval."""

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
