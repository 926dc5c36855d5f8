"""What the lines of the journal are, and the parts of a recipe: types whose fields are checked when they are read.

Knows: names, types, limits, in which order a run can have written them. Refuses to know: files, what becomes of them.

What was read is not always what was written: a disk or an editor may have changed it.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    ValidationError,
)

from modules.config import COMPUTE_DTYPES, DTYPES, PHRASES, STRATEGIES, Chat, Config, Message, OneOf
from modules.merging.methods import parsed, spelled
from modules.search import Decision

FORMAT = 1  # of journals and recipes

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int | float, Field(ge=-sys.float_info.max, le=sys.float_info.max)]
Method = Annotated[str, AfterValidator(lambda text: spelled(*parsed(text)))]
# JSON has no infinity: a probability of zero, whose logarithm that is, is written as null.
LogProbability = Annotated[
    float,
    Field(lt=math.inf),
    BeforeValidator(lambda value: -math.inf if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
LogProbabilities = Annotated[tuple[LogProbability, ...], Strict(False)]  # joint ones, of the pairs


class Record(BaseModel):
    """A mapping of a journal or a recipe; its fields are in the order in which they are written. Others are kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    def written(self, *without: str) -> dict[str, Any]:
        """The mapping, as JSON has it: what was not there when it was read is not made up."""
        return self.model_dump(exclude=set(without), exclude_unset=True)


class Directories(Record):
    """As they were given."""

    model_path1: str
    output_directory: str
    model_directory: str | None


class Settings(Record):
    """A configuration as JSON has it. Of what nothing reads here again, there is no more than its place."""

    directories: Directories
    models_to_merge: list[str]
    tokenizer: str | None = None  # younger than journals are
    on_error: Any
    keep_downloads: Any
    merge_ratios: Any
    merge_method: list[Method]
    layers: list[Count] | None = None  # younger than journals are
    merge_headers: Any
    strategy: Annotated[str, OneOf(STRATEGIES)]
    strategy_threshold: Number
    auto_weights: Any
    bad_phrases: Any
    good_phrases: Any
    phrase_files: Any
    neutral_texts: Any = None  # this and the samples are younger than journals are
    samples: Any = None
    device: str
    dtype: Literal[DTYPES]
    compute_dtype: Literal[COMPUTE_DTYPES] = "auto"  # younger than journals are
    random_seed: Count
    trust_remote_code: bool


class Turn(Record):
    """A turn of a chat."""

    role: str
    content: str


class ChatContext(Record):
    """The chat that a context is, before it was rendered; younger than recipes are."""

    messages: Annotated[tuple[Turn, ...], Strict(False)]
    answer: str

    @property
    def chat(self) -> Chat:
        """The chat as it was before it was written down."""
        return Chat(tuple(Message(turn.role, turn.content) for turn in self.messages), self.answer)


class _ChatPair(Record):
    """A pair whose context is a chat."""

    context: str
    chat: ChatContext


def rendered_in(settings: Settings) -> dict[Chat, str]:
    """The chats among the contexts of a run, and what they were rendered as. What is none, nobody has written."""
    found = {}
    for key in (*PHRASES, "held_out_pairs"):
        pairs = settings.written().get(key)
        for pair in pairs if isinstance(pairs, list) else []:
            with suppress(ValidationError):
                known = _ChatPair.model_validate(pair)
                found.setdefault(known.chat.chat, known.context)
    return found


class Run(Record):
    """How a run began. device: the one that was meant; folder: where relative paths begin, from the output on."""

    format: Any  # another one is answered before the rest is read
    program: Any
    settings: Settings
    config: str
    device: str | None = None  # this and the folder are younger than journals are
    folder: str = ""
    computed: Literal[COMPUTE_DTYPES[1:]] | None = None  # in what; younger still
    neutral: str | None = None  # a digest of the texts, where trials are judged by their drift
    libraries: dict[str, Any]


class Widened(Record):
    """That a run goes on in another arithmetic, since its own is too narrow for what comes next."""

    computed: Literal[COMPUTE_DTYPES[1:]]


class Source(Record):
    """The base, which is number 0, or a candidate. text: what the configuration calls it; where: exactly."""

    number: Count
    name: str
    text: str
    where: str
    fingerprint: dict[str, Any]


class Packed(Record):
    """How phrases were packed; younger than journals are."""

    model_config = ConfigDict(extra="forbid")
    layout: str
    tokens: Count
    logits: Count
    stacked: bool


class Start(Record):
    """The base's scores, and the signed weights."""

    log_probabilities: LogProbabilities
    weights: Annotated[tuple[Number, ...], Strict(False)]
    rounding: Annotated[tuple[Number, ...], Strict(False)] = ()  # of the probabilities; of half types, and younger
    packing: Packed | None = None


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
    drift: Number | None = None  # only where it is guarded against
    warning: str | None
    note: str | None
    packing: Packed | None = None
    seconds: Number
    computed: Literal[COMPUTE_DTYPES[1:]] | None = None  # what the run goes on in, if not in what it was taken in

    @property
    def decision(self) -> Decision:
        """The decision as it was before it was written down."""
        return Decision(**{field.name: getattr(self, field.name) for field in fields(Decision)})


class Drifted(Record):
    """How far a model is from the base on neutral text."""

    divergence: Number
    agreement: Number
    perplexity: Number
    base_perplexity: Number
    tokens: Count


class Baseline(Record):
    """How a candidate does that is taken whole: totals of the searched pairs and of those that are held out."""

    number: Count
    total: Number
    held_out: Number | None
    drift: Drifted | None
    guarded: Number | None = None  # its drift as trials are judged by it


Rows = Annotated[tuple[Annotated[tuple[Number, ...], Strict(False)], ...], Strict(False)]  # one number per candidate


class JointStart(Record):
    """Where the steps of a joint search begin, and how total and drift change there with each share."""

    shares: Rows
    total_slopes: Rows
    drift_slopes: Rows | None = None


class Stepped(Record):
    """A step, and what it began with: total and drift, and the total of the pairs that are held out."""

    step: Count
    total: Number
    drift: Number
    held_out: Number | None
    seconds: Number


class Step(Stepped):
    """The same with what it has led to."""

    shares: Rows
    mean: Rows
    square: Rows
    packing: Packed


class Closed(Record):
    """The end of a candidate's search; drift: of the merge by then; failure: why it was given up, if it was."""

    number: Count
    log_probabilities: LogProbabilities
    packing: Packed | None = None
    drift: Drifted | None = None
    failure: str | None


class Phrase(Record):
    """A pair of phrase and context with its signed weight, and its probability before and after the run."""

    kind: Literal["BAD", "GOOD"]
    phrase: str
    context: str
    weight: Number
    before: Number
    after: Number
    rounding: Number = 0  # of the probabilities; only where a half type was computed in
    chat: ChatContext | None = None
    variants: Annotated[tuple[str, ...], Strict(False)] = ()  # of an any-of phrase, which shows them all

    @property
    def shown(self) -> str:
        """The context as people read it."""
        return self.context if self.chat is None else str(self.chat.chat)


class Total(Record):
    """The total score before and after the run."""

    before: Number
    after: Number
    rounding: Number = 0


class HeldOut(Record):
    """The pairs that were scored and never searched."""

    phrases: list[Phrase]
    total: Total


class Sample(Record):
    """A prompt, and what the base and the merge have answered."""

    prompt: str
    base: str
    merge: str


class Joint(Record):
    """What a joint search has kept. shares: a row for each layer and, if it is mixed, for what is outside of them."""

    shares: Rows
    start: JointStart
    steps: list[Stepped]

    @property
    def is_even(self) -> bool:
        """Whether there is a slope for each share."""
        given = (self.shares, self.start.shares, self.start.total_slopes, self.start.drift_slopes)
        forms = [[len(row) for row in rows] for rows in given if rows is not None]
        return all(form == forms[0] for form in forms)


# By kind, as the journal calls them. Others are nobody's business here.
LINES = {
    "run": Run,
    "widened": Widened,
    "source": Source,
    "start": Start,
    "baseline": Baseline,
    "joint": JointStart,
    "step": Step,
    "decision": Decided,
    "candidate": Closed,
}


def _rows_of(line: Step | JointStart) -> list[Rows]:
    return [line.shares, *([line.mean, line.square] if isinstance(line, Step) else [])]


def read_lines(records: Sequence[Mapping[str, Any]], config: Config) -> tuple[list[Record], int | None]:
    """A journal's lines, up to the first that a run of this configuration can't have written there, and its number."""
    lines: list[Record] = []
    decisions: dict[int, int] = {}  # how many there are of each source
    for number, record in enumerate(records, start=1):
        try:
            values = {key: value for key, value in record.items() if key != "kind"}
            line = LINES.get(record["kind"], Record).model_validate(values)
        except ValidationError:
            return lines, number
        sound = number > 1 or isinstance(line, Run)
        for key in ("log_probabilities", "weights"):
            sound = sound and len(getattr(line, key, config.pairs)) == len(config.pairs)
        if isinstance(line, Step):
            before = [other for other in lines if isinstance(other, Step | JointStart)]
            forms = [[len(row) for row in rows] for one in (line, *before[:1]) for rows in _rows_of(one)]
            sound = len(before) == line.step and all(form == forms[0] for form in forms)
        if isinstance(line, Source):
            decisions.setdefault(line.number, 0)
        elif isinstance(line, Decided):
            sound = sound and line.candidate in decisions and any(isinstance(other, Start) for other in lines)
            turn, method = divmod(decisions.get(line.candidate, 0), len(config.merge_method))
            layer = turn if config.layers is None else dict(enumerate(config.layers)).get(turn, -1)
            sound = sound and (line.layer, line.method) in ((layer, config.merge_method[method]), (None, "lerp"))
            decisions[line.candidate] = decisions.get(line.candidate, 0) + 1
        if not sound:
            return lines, number
        lines.append(line)
    return lines, None
