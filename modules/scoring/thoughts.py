"""Which parts of a model's text are thoughts rather than the answer: by its chat template and its tokenizer's tokens.

Knows: tags of thoughts, settings that switch thoughts off. Refuses to know: models, token ids, how a chat is rendered.

Models mark thoughts in different ways. Counted are a pair of tags with a telling name (<think> and </think>, [THINK]
and [/THINK], <|START_THINKING|> and <|END_THINKING|>), and a channel with one (<|channel|>analysis).
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TAG = re.compile(r"<[^<>\s'\"{}]{1,40}>|\[/?[A-Za-z_]{1,40}\]|\u25c1[^\u25c1\u25b7\s]{1,40}\u25b7")
_TELLING = r"(?i:think|thought|reason|analy|reflect|ponder|scratch|inner_|monologue|cot\b)"
_CHANNEL = re.compile(r"<\|[^<>|]*channel[^<>|]*\|>")
_CONTROL = r"<\|[^<>|]+\|>"
_ENDS = (("START", "END"), ("BEGIN", "END"), ("start", "end"), ("begin", "end"), ("open", "close"))
_ENDS += (("prefix", "suffix"), ("bot", "eot"), ("bo", "eo"))
_SWITCHES = "enable_thinking", "thinking"  # settings that templates take


@dataclass(frozen=True)
class Mark:
    """How a block of thoughts begins and ends, as patterns; and the text that closes it, if known."""

    opens: str
    closes: str
    closing: str | None = None


@dataclass(frozen=True)
class Thoughts:
    """How a model's text marks its thoughts."""

    marks: tuple[Mark, ...] = ()
    switch: str | None = None  # the template's setting that turns them off if false

    def opened_by(self, given: str) -> Mark | None:
        """The mark that opens a block of thoughts at the very end of a given text, None if there is none."""
        return next((mark for mark in self.marks if re.search(rf"(?:{mark.opens})\s*\Z", given)), None)

    def closing(self, given: str) -> str:
        """The text to append to a given text so that the answer begins; empty if no thought is open."""
        mark = self.opened_by(given)
        if mark is None or mark.closing is None:
            return ""
        return f"\n{mark.closing}\n\n" if given.endswith("\n") else mark.closing

    def closed_in(self, text: str) -> bool:
        """Whether a block of thoughts ends in a text."""
        return any(re.search(mark.closes, text) for mark in self.marks)

    def answer(self, text: str, opened: bool) -> str | None:
        """A text without its thoughts; None if it has none. opened: whether the text begins inside a thought.

        Text before an end without a beginning is a thought as well.
        """
        answer_parts = list[str]()
        inside = opened
        last = 0
        changes = list(self._changes(text))
        for begins, first, end in changes:
            if begins and not inside:
                answer_parts.append(text[last:first])
            elif not begins and not inside:
                answer_parts.clear()
            inside = begins
            last = end
        if not inside:
            answer_parts.append(text[last:])
        return "".join(answer_parts) if opened or changes else None

    def _changes(self, text: str) -> Iterator[tuple[bool, int, int]]:
        """The marks in a text: whether a block begins (True) or ends there, and the mark's start and end."""
        patterns = [f"(?P<open{number}>{mark.opens})|(?:{mark.closes})" for number, mark in enumerate(self.marks)]
        for match in re.finditer("|".join(patterns), text) if patterns else ():
            yield bool(match.lastgroup), match.start(), match.end()


def thoughts_of(template: str, added: Collection[str], settings: Mapping[str, Any]) -> Thoughts:
    """How a model marks its thoughts. template: its text; added: the names of its tokenizer's added tokens; settings:
    of the template."""
    tags = {*_TAG.findall(template), *(name for name in added if _TAG.fullmatch(name))}
    channels = {*_CHANNEL.findall(" ".join(added)), *re.findall(rf"({_CONTROL})(?={_TELLING})", template)}
    marks = [*map(_channel, sorted(channels)), *(_tags(*pair) for pair in _pairs(tags))]
    for switch in _SWITCHES:
        # As a variable of its own, within the braces of a statement.
        if settings.get(switch) is not False and re.search(rf"\{{[%{{][^{{}}]*(?<![.\w'\"]){switch}\b", template):
            return Thoughts(tuple(marks), switch)
    return Thoughts(tuple(marks))


def _pairs(tags: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of tags that open and close thoughts. Many templates contain only one of the two: their prompt ends
    with the first, or they cut earlier turns at the second."""
    pairs = []
    for tag in sorted(tags):
        telling = re.search(_TELLING, tag) is not None
        if telling and tag[1] == "/":
            pairs.append((tag.replace("/", "", 1), tag))
        elif telling or "channel" in tag:
            closers = [closer for closer in _closers(tag) if closer in tags]
            if telling and not closers and tag[1] != "|":
                closers = [f"{tag[0]}/{tag[1:]}"]
            pairs += [(tag, closer) for closer in closers]
    return list(dict.fromkeys(pairs))


def _closers(tag: str) -> list[str]:
    """The possible names of the tag that closes this one."""
    first = tag[0]
    name = tag[1:-1]
    last = tag[-1]
    swapped = [f"{first}{name.replace(begin, end)}{last}" for begin, end in _ENDS if begin in name]
    if name.startswith("|") and name.endswith("|"):
        return [*swapped, f"{first}|/{name[1:]}{last}"]
    if name.startswith("|"):
        return [f"{first}{name[1:]}|{last}"]
    return [f"{first}/{name}{last}", *swapped]


def _tags(opener: str, closer: str) -> Mark:
    return Mark(re.escape(opener), re.escape(closer), closer)


def _channel(control: str) -> Mark:
    """The mark of a channel: thoughts stand behind a control token and a telling name, up to the same token with
    another name."""
    begin = re.escape(control)
    return Mark(
        rf"{begin}\s*{_TELLING}\w*[^<]{{0,40}}?(?:{_CONTROL}|\n|\Z)",
        rf"{begin}\s*(?!{_TELLING})\w+[^<]{{0,80}}?(?:{_CONTROL}|\n|\Z)",
    )
