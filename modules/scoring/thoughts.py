"""What of a model's text is thought, and not the answer: by its chat template and the tokens of its tokenizer.

Knows: tags, how templates open and close a block of thoughts. Refuses to know: models, token ids, how a chat is
rendered.

Nothing marks thoughts in the same way everywhere, so a template is asked: what it writes around a turn's reasoning, and
how the beginning of an answer differs with and without thinking. Beside that, a pair of tags with a telling name counts
(<think> and </think>, [THINK] and [/THINK]), and a channel with one (<|channel|>analysis).
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_TAG = re.compile(r"<[^<>\s'\"{}]{1,40}>|\[/?[A-Za-z_]{1,40}\]|\u25c1[^\u25c1\u25b7\s]{1,40}\u25b7")
_TELLING = r"(?i:think|thought|reason|analy|reflect|ponder|scratch|inner_|monologue|cot\b)"
_CHANNEL = re.compile(r"<\|[^<>|]*channel[^<>|]*\|>")
_CONTROL = r"<\|[^<>|]+\|>"
_ENDS = (("START", "END"), ("BEGIN", "END"), ("start", "end"), ("begin", "end"), ("open", "close"))
_ENDS += (("prefix", "suffix"), ("bot", "eot"), ("bo", "eo"))

ASKED, REASON, ANSWER = "zqquestion", "zqreason", "zqanswer"
_FLAGS = "enable_thinking", "thinking"  # settings that templates take


@dataclass(frozen=True)
class Mark:
    """How a block of thoughts begins and ends, as patterns; and the text that closes it, where that is known."""

    opens: str
    closes: str
    closing: str | None = None


@dataclass(frozen=True)
class Thoughts:
    """What marks the thoughts of a model."""

    marks: tuple[Mark, ...] = ()
    switch: str | None = None  # the setting of the template that, if false, does without them

    def opened_by(self, given: str) -> Mark | None:
        """By which block a text that is given leaves off in the middle of a thought, at its very beginning."""
        return next((mark for mark in self.marks if re.search(rf"(?:{mark.opens})\s*\Z", given)), None)

    def closing(self, given: str) -> str:
        """What a text that is given needs behind it for the answer to begin; nothing if no thought is open."""
        mark = self.opened_by(given)
        if mark is None or mark.closing is None:
            return ""
        return f"\n{mark.closing}\n\n" if given.endswith("\n") else mark.closing

    def closed_in(self, text: str) -> bool:
        """Whether a block of thoughts ends in a text."""
        return any(re.search(mark.closes, text) for mark in self.marks)

    def answer(self, text: str, opened: bool) -> str | None:
        """A text without its thoughts; None if it has none. opened: whether it begins in the middle of one.

        What stands before an end without a beginning is thought as well.
        """
        kept, inside, last = list[str](), opened, 0
        changes = list(self._changes(text))
        for begins, first, end in changes:
            if begins and not inside:
                kept.append(text[last:first])
            elif not begins and not inside:
                kept.clear()
            inside, last = begins, end
        if not inside:
            kept.append(text[last:])
        return "".join(kept) if opened or changes else None

    def _changes(self, text: str) -> Iterator[tuple[bool, int, int]]:
        """Where a block begins (True) or ends, and the first and last character of what marks it."""
        patterns = [f"(?P<open{number}>{mark.opens})|(?:{mark.closes})" for number, mark in enumerate(self.marks)]
        for found in re.finditer("|".join(patterns), text) if patterns else ():
            yield bool(found.lastgroup), found.start(), found.end()


def questions() -> list[dict[str, Any]]:
    """What a template is asked: conversations as `template_child.outcomes` takes them."""
    user, answer = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}
    reasoned = {**answer, "reasoning_content": REASON}
    asked = [
        ([user], True, {}),
        ([user], True, dict.fromkeys(_FLAGS, True)),
        ([user], True, dict.fromkeys(_FLAGS, False)),
        ([user, answer], False, {}),
        ([user, reasoned], False, dict.fromkeys(_FLAGS, True)),
    ]
    return [{"messages": messages, "prompt": prompt, "settings": flags} for messages, prompt, flags in asked]


def thoughts_of(template: str, added: Collection[str], texts: Sequence[str | None] = (None,) * 5) -> Thoughts:
    """What marks a model's thoughts. template: its text; added: the names of its tokenizer's added tokens; texts: what
    the template has answered to `questions`, None where it refused."""
    asked, thinking, silent, answered, reasoned = (text or "" for text in texts)
    known = {*_TAG.findall(template), *(name for name in added if _TAG.fullmatch(name))}
    before_answer = answered.partition(ANSWER)[0].rstrip()
    pairs = [
        _around_reasoning(reasoned, before_answer),
        _of_the_difference(thinking, silent),
        _opened(asked, before_answer, known),
        *_telling(known),
    ]
    marks = [_tags(*pair) for pair in dict.fromkeys(pair for pair in pairs if pair)]
    channels = {*_CHANNEL.findall(" ".join(added)), *re.findall(rf"({_CONTROL})(?={_TELLING})", template)}
    switches = [flag for flag in _FLAGS if re.search(rf"\b{flag}\b", template)] if silent not in ("", asked) else []
    return Thoughts((*map(_channel, sorted(channels)), *marks), next(iter(switches), None))


Pair = tuple[str, str]


def _around_reasoning(reasoned: str, before_answer: str) -> Pair | None:
    """The tags around the reasoning of a turn, if the one before it is not before every answer as well."""
    before, _, behind = reasoned.partition(REASON)
    between, stands, _ = behind.partition(ANSWER)
    first, last = _last_tag(before), _TAG.match(between.lstrip())
    if not (stands and first and last) or before_answer.endswith(first) or first == last.group():
        return None
    return first, last.group()


def _of_the_difference(thinking: str, silent: str) -> Pair | None:
    """The two tags by which the beginning of an answer differs with thinking from that without."""
    ones, others = _TAG.findall(thinking), _TAG.findall(silent)
    while ones and others and ones[0] == others[0]:
        ones, others = ones[1:], others[1:]
    tags = list(dict.fromkeys([*ones, *others]))
    return (tags[0], tags[1]) if len(tags) == 2 and tags[1] in _partners(tags[0]) else None


def _opened(asked: str, before_answer: str, known: Collection[str]) -> Pair | None:
    """The tag that the beginning of an answer ends with, if a turn that is given has none there."""
    tag = _last_tag(asked)
    if tag is None or before_answer.endswith(tag):
        return None
    partners = _partners(tag)
    closer = next((partner for partner in partners if partner in known), None)
    if closer is None and partners and re.search(_TELLING, tag):
        closer = partners[0]
    return (tag, closer) if closer else None


def _telling(known: Collection[str]) -> list[Pair]:
    """Pairs of tags with a telling name."""
    named = [tag for tag in sorted(known) if re.search(rf"{_TELLING}|channel", tag)]
    pairs = [(tag, partner) for tag in named for partner in _partners(tag) if partner in known]
    # Many a template only has the end: it takes away what stands before that in an earlier turn.
    return pairs + [(tag.replace("/", "", 1), tag) for tag in named if tag[1:2] == "/"]


def _last_tag(text: str) -> str | None:
    tags = _TAG.findall(text)
    return tags[-1] if tags and text.rstrip().endswith(tags[-1]) else None


def _partners(tag: str) -> list[str]:
    """How the tag may be called that closes what this one opens."""
    first, name, last = tag[0], tag[1:-1], tag[-1]
    if name.startswith(("/", "|/")):
        return []
    if name.startswith("|") and name.endswith("|"):
        swapped = [name.replace(begin, end) for begin, end in _ENDS if begin in name]
        return [f"{first}{other}{last}" for other in [*swapped, f"|/{name[1:]}"]]
    if name.startswith("|"):
        return [f"{first}{name[1:]}|{last}"]
    swapped = [name.replace(begin, end) for begin, end in _ENDS[:6] if begin in name]
    return [f"{first}{other}{last}" for other in [f"/{name}", *swapped]]


def _tags(opener: str, closer: str) -> Mark:
    return Mark(re.escape(opener), re.escape(closer), closer)


def _channel(control: str) -> Mark:
    """Text behind a control token and a telling name is thought, up to the same token and another name."""
    begin = re.escape(control)
    return Mark(
        rf"{begin}\s*{_TELLING}\w*[^<]{{0,40}}?(?:{_CONTROL}|\n|\Z)",
        rf"{begin}\s*(?!{_TELLING})\w+[^<]{{0,80}}?(?:{_CONTROL}|\n|\Z)",
    )
