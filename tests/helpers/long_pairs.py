"""Many long pairs, for a process that has to bear them."""

import random

from modules.config.phrase_lists import Pair


def long_pairs(count):
    """Pairs with contexts of up to 1,500 tokens, a few of them with the same beginning."""
    chance = random.Random(count)
    beginnings = [" ".join(f"w{chance.randrange(500)}" for _ in range(200)) for _ in range(20)]
    pairs = []
    for number in range(count):
        length = 1300 if number == 0 else int(1300 * chance.random() ** 5)
        rest = " ".join(f"w{chance.randrange(500)}" for _ in range(length))
        beginning = beginnings[number % 20] if number % 2 == 0 else ""
        pairs.append(Pair("BAD", f"w{chance.randrange(500)} w7", f"{beginning} {rest} ".lstrip(), 1.0))
    return pairs
