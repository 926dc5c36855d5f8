"""The texts on which drift is measured: neutral text and the base's own answers; of each a part for what is shown and
another for what trials are judged by.

Knows: how many tokens each has, which positions are compared. Refuses to know: how drift is measured.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modules.config.inputs import read_neutral_texts
from modules.config.phrase_lists import Pair
from modules.config.schema import Config
from modules.metrics.own_answers import Answer, Answers
from modules.model.base_model import ResidentModel
from modules.scoring.drift import Passage, full_passage
from modules.scoring.tokenization import neutral_windows

# Passages are filled up to a multiple of so many tokens, so that several have one length and pass through the model
# together. What stands behind a token changes nothing of what a decoder says before it.
FILLED_TO = 32


@dataclass(frozen=True)
class Texts:
    """Passages of neutral text and of the base's own answers."""

    neutral: Sequence[Passage] = ()  # takes no part in the search
    neutral_for_trials: Sequence[Passage] = ()
    own: Sequence[Passage] = ()
    own_for_trials: Sequence[Passage] = ()

    @property
    def all(self) -> list[Passage]:
        """All passages."""
        return [*self.neutral, *self.neutral_for_trials, *self.own, *self.own_for_trials]

    @property
    def for_trials(self) -> list[Sequence[Passage]]:
        """The texts that trials are judged by; each counts as much as another."""
        return [text for text in (self.neutral_for_trials, self.own_for_trials) if text]


def drift_texts(config: Config, model: ResidentModel, tokenizer: Any, answers: Answers) -> Texts:
    """The texts of a run. answers: of the base."""
    neutral = read_neutral_texts(config.neutral_texts)
    each = config.neutral_tokens if config.is_guarded else 0
    if answers.weighed and neutral:
        each //= 2
    pairs = (*config.pairs, *config.held_out_pairs)
    shown, for_trials = neutral_windows(tokenizer, neutral, model.vocabulary, model.max_tokens, each)
    weighed = answer_passages(tokenizer, answers.weighed, pairs, model.max_tokens)
    return Texts(
        neutral=[full_passage(window) for window in shown],
        neutral_for_trials=[full_passage(window) for window in for_trials],
        own=answer_passages(tokenizer, answers.shown, pairs, model.max_tokens),
        own_for_trials=_first(weighed, each),
    )


def answer_passages(
    tokenizer: Any, answers: Sequence[Answer], pairs: Sequence[Pair], longest: int | None
) -> list[Passage]:
    """Prompts with their answers, compared where the model predicts a token of the answer, its end included; but not
    where that is a token of a listed phrase: there the model is meant to change.

    longest: tokens that the model takes.
    """
    phrases = {variant.phrase.strip() for pair in pairs for variant in pair.each}
    listed = re.compile("|".join(map(re.escape, sorted(filter(None, phrases)))) or r"(?!)", re.IGNORECASE)
    made = []
    for answer in answers:
        first = len(answer.given) - 1
        in_phrase = _in_phrases(tokenizer, answer.written.tokens, listed)
        tokens = answer.given + answer.written.tokens
        size = -(-len(tokens) // FILLED_TO) * FILLED_TO
        filling = max(0, min(size, longest or size) - len(tokens))
        compared = [False] * first + [not inside for inside in in_phrase] + [False] * (1 + filling)
        if any(compared):
            made.append(Passage(tokens + tokens[-1:] * filling, tuple(compared)))
    return made


def _first(some: Sequence[Passage], tokens: int) -> list[Passage]:
    """As many of the first passages as compare so many tokens together, if there are as many."""
    taken = []
    counted = 0
    for passage in some:
        if counted < tokens:
            taken.append(passage)
            counted += sum(passage.compared)
    return taken


def decoded(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """The text that tokens write, and where in it each of them ends."""
    lengths = [len(_decoded(tokenizer, tokens[: end + 1])) for end in range(len(tokens))]
    return _decoded(tokenizer, tokens), lengths


def _in_phrases(tokenizer: Any, tokens: Sequence[int], listed: re.Pattern[str]) -> list[bool]:
    """Of each token, whether it writes a letter of a listed phrase."""
    text, ends = decoded(tokenizer, tokens)
    matches = [match.span() for match in listed.finditer(text)]
    inside = []
    begin = 0
    for end in ends:
        inside.append(any(begin < stop and start < end for start, stop in matches))
        begin = end
    return inside


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
