"""Models side by side: the phrases with every model's probability."""

import math

from modules.config import Pair
from modules.output.standings import Scored, ScoredPairs, Standing, probability_table, score_document

SPINE, APPLE, ARM = Pair("BAD", "spine", "down her "), Pair("GOOD", "apple", "where? "), Pair("BAD", "arm", "up his ")


def scored(name, *probabilities):
    values = [math.log(value) if value else -math.inf for value in probabilities]
    return Scored(name, f"/models/{name}", Standing(name, 1.0, None, None), values[:2], values[2:])


def test_no_digit_below_its_rounding_is_shown():
    pairs = ScoredPairs([SPINE, APPLE], [ARM], [1.0, -2.0, 1.0], [0.0, 0.002])
    lines = probability_table(
        pairs, [scored("base", 0.5, 0.25, 0.75), scored("a-model-with-quite-a-long-name", 0, 0.3, 1)]
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells == [
        ["Type", "Phrase", "Context", "base", "...ith-quite-a-long-name"],
        ["BAD", "spine", "down her", "50.00000%", "0.00000%"],
        ["GOOD", "apple", "where?", "25%", "30%"],
        ["BAD", "arm", "up his", "75%", "100%"],
    ]
    assert lines.index("Held out:") == 6 and len({len(line) for line in lines[:6]}) == 1


def test_what_json_gets_of_a_phrase():
    pairs = ScoredPairs([SPINE, APPLE], [ARM], [1.0, -2.0, 1.0])
    document = score_document(pairs, [scored("base", 0, 0.25, 0.75)])
    assert document["models"] == [
        {"name": "base", "where": "/models/base", "settings": "own", "total": 1.0, "held_out": None, "drift": None}
    ]
    assert [phrase["weight"] for phrase in document["phrases"]] == [1.0, 2.0, 1.0]
    assert [phrase["held_out"] for phrase in document["phrases"]] == [False, False, True]
    assert document["phrases"][0]["probabilities"] == {"base": 0.0}
