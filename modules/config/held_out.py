"""Pairs that are set aside: scored, and never searched, so that they show whether a gain holds beyond the list.

Knows: which pairs are set aside. Refuses to know: files, how anything is scored.
"""

import random
from collections.abc import Sequence

from modules.config.phrase_lists import HeldOut, Pair

FEWEST = 3  # contexts of a phrase of which one is set aside, however small the share


def set_aside(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs that are searched, and those that are held out, both in their order.

    Of each phrase's contexts the share is drawn by chance, at least one where there are FEWEST, and never all; those
    that are marked are held out in any case.
    """
    phrases: dict[tuple[str, str], list[int]] = {}
    for number, pair in enumerate(pairs):
        if not isinstance(pair, HeldOut):
            phrases.setdefault((pair.kind, pair.phrase), []).append(number)
    aside = {number for number, pair in enumerate(pairs) if isinstance(pair, HeldOut)}
    for (kind, phrase), numbers in phrases.items() if share else ():
        count = max(round(share * len(numbers)), int(len(numbers) >= FEWEST))
        # Drawn for each phrase by itself: another phrase in the list changes nothing.
        aside.update(random.Random(f"{seed} {kind} {phrase}").sample(numbers, min(count, len(numbers) - 1)))
    searched = [pair for number, pair in enumerate(pairs) if number not in aside]
    return searched, [Pair(**vars(pairs[number])) for number in sorted(aside)]  # where they stand now says it all
