"""How long a model's answers are, how many end by themselves and how many loop. This shows if a model has stopped
talking, which the phrases' probabilities do not show.

Knows: what is counted in an answer. Refuses to know: who answered, to which prompts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from modules.metrics.metric import Column, Metric

LOOP_WORDS = 6  # words in the same order
LOOP_TIMES = 4  # repetitions of these in one answer
MOST_CHANGE = 0.2  # of the number of words in an answer, without a warning


def count_answers(texts: Sequence[str], ended: Sequence[bool]) -> dict[str, float]:
    """Mean number of words of an answer, and fractions of the answers that end and that loop; empty without answers.

    ended: for each text, whether the model ended it by itself.
    """
    if not texts:
        return {}
    return {
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "ends": sum(ended) / len(texts),
        "loops": sum(map(loops, texts)) / len(texts),
    }


def loops(text: str) -> bool:
    """Whether a text repeats the same words again and again."""
    words = text.lower().split()
    starts = range(len(words) - LOOP_WORDS + 1)
    times = Counter(tuple(words[first : first + LOOP_WORDS]) for first in starts)
    return max(times.values(), default=0) >= LOOP_TIMES


def warnings(base: Mapping[str, float], merge: Mapping[str, float], what: str = "merge") -> list[str]:
    """A line each if the merge's answers differ much in length from the base's, or loop more often. what: the name of
    the merge."""
    if not (base and merge):
        return []
    lines = []
    change = merge["words"] / base["words"] - 1 if base["words"] else 0.0
    if abs(change) > MOST_CHANGE:
        comparative = "longer" if change > 0 else "shorter"
        words = f"{base['words']:.1f} -> {merge['words']:.1f} words"
        lines.append(f"the {what}'s answers are {abs(change):.0%} {comparative} than the base's: {words}")
    if merge["loops"] > base["loops"]:
        lines.append(
            f"the {what}'s answers loop more often than the base's: {base['loops']:.0%} -> {merge['loops']:.0%}"
        )
    return lines


METRIC = Metric(
    columns=(
        Column("words", "Words per answer", ".1f"),
        Column("ends", "Answers that end", ".0%"),
        Column("loops", "Answers that loop", ".0%"),
    ),
)
