"""The texts on which drift is measured: neutral text and the base's own answers. One part of each is for the drift that
is shown, another for the drift that trials are judged by.

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

# Passages are padded to a multiple of so many tokens, so that several have one length and pass through the model
# together. Later tokens do not change a decoder's outputs at earlier ones.
FILLED_TO = 32


@dataclass(frozen=True)
class Texts:
    """Passages of neutral text and of the base's own answers."""

    neutral: Sequence[Passage] = ()  # takes no part in the search
    neutral_for_trials: Sequence[Passage] = ()
    own_answers: Sequence[Passage] = ()
    own_for_trials: Sequence[Passage] = ()

    @property
    def all(self) -> list[Passage]:
        """All passages."""
        return [*self.neutral, *self.neutral_for_trials, *self.own_answers, *self.own_for_trials]

    @property
    def for_trials(self) -> list[Sequence[Passage]]:
        """The texts that trials are judged by; all count the same."""
        return [text for text in (self.neutral_for_trials, self.own_for_trials) if text]


def drift_texts(config: Config, model: ResidentModel, tokenizer: Any, answers: Answers) -> Texts:
    """The texts of a run. answers: the base's."""
    neutral = read_neutral_texts(config.neutral_texts)
    trial_tokens = config.neutral_tokens if config.is_guarded else 0
    if answers.weighed and neutral:
        trial_tokens //= 2
    pairs = (*config.pairs, *config.held_out_pairs)
    shown, for_trials = neutral_windows(tokenizer, neutral, model.vocabulary, model.max_tokens, trial_tokens)
    weighed = answer_passages(tokenizer, answers.weighed, pairs, model.max_tokens)
    return Texts(
        neutral=[full_passage(window) for window in shown],
        neutral_for_trials=[full_passage(window) for window in for_trials],
        own_answers=answer_passages(tokenizer, answers.shown, pairs, model.max_tokens),
        own_for_trials=_first_passages(weighed, trial_tokens),
    )


def answer_passages(
    tokenizer: Any, answers: Sequence[Answer], pairs: Sequence[Pair], longest: int | None
) -> list[Passage]:
    """Prompts with their answers as passages. Compared are the positions that predict a token of the answer, its end
    token included, but no token of a listed phrase: there the model is meant to change.

    longest: the most tokens that the model takes.
    """
    phrases = {variant.phrase.strip() for pair in pairs for variant in pair.each}
    phrase_pattern = re.compile("|".join(map(re.escape, sorted(filter(None, phrases)))) or r"(?!)", re.IGNORECASE)
    passages = []
    for answer in answers:
        first = len(answer.given) - 1
        in_phrase = _in_phrases(tokenizer, answer.written.tokens, phrase_pattern)
        tokens = answer.given + answer.written.tokens
        size = -(-len(tokens) // FILLED_TO) * FILLED_TO
        filling = max(0, min(size, longest or size) - len(tokens))
        compared = [False] * first + [not inside for inside in in_phrase] + [False] * (1 + filling)
        if any(compared):
            passages.append(Passage(tokens + tokens[-1:] * filling, tuple(compared)))
    return passages


def _first_passages(passages: Sequence[Passage], tokens: int) -> list[Passage]:
    """The fewest of the first passages that compare so many tokens together; all if they compare fewer."""
    first_passages = []
    compared_count = 0
    for passage in passages:
        if compared_count < tokens:
            first_passages.append(passage)
            compared_count += sum(passage.compared)
    return first_passages


def decoded(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """The text of some tokens, and where in it each of them ends."""
    lengths = [len(_decoded(tokenizer, tokens[: end + 1])) for end in range(len(tokens))]
    return _decoded(tokenizer, tokens), lengths


def _in_phrases(tokenizer: Any, tokens: Sequence[int], phrase_pattern: re.Pattern[str]) -> list[bool]:
    """For each token, whether its text overlaps a listed phrase."""
    text, ends = decoded(tokenizer, tokens)
    matches = [match.span() for match in phrase_pattern.finditer(text)]
    inside = []
    begin = 0
    for end in ends:
        inside.append(any(begin < stop and start < end for start, stop in matches))
        begin = end
    return inside


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
