"""Which items a step looks at."""

from collections import Counter

import pytest

from modules.learn.steps import drawn


@pytest.mark.parametrize("count, many", [(10, 3), (7, 7), (5, 9), (1, 1), (12, 4)])
def test_each_item_comes_once_before_any_comes_again(count, many):
    seen = Counter()
    for step in range(20):
        chosen = drawn(count, many, step, "seed")
        assert chosen == drawn(count, many, step, "seed") and len(chosen) == min(many, count)
        seen.update(chosen)
        assert max(seen.values()) - min(seen[item] for item in range(count)) <= 1


def test_the_seed_settles_the_order():
    assert drawn(50, 10, 0, "1 pairs") != drawn(50, 10, 0, "2 pairs")
