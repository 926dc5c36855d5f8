"""Whether what --discover finds in a model's texts is there in texts of another seed too.

    python benchmarks/bench_discover.py    # on what `make real-discover` has made; ten minutes at first, then one

Draws texts of another seed, unless they are kept. Takes every phrase of the list in demo/real/found.yaml as it stands
there, cuts contexts before it and scores them all, none left out for its probability; and counts the phrases in both
seeds' texts. Prints this and, as its last line, JSON.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from modules.config import load_config
from modules.discovery import Finding, Text, counts, possible_contexts
from modules.run.discover import probabilities
from modules.run.steps import prepare_libraries
from modules.run.writing import Author, open_writer, write_texts
from modules.runtime import Console

REAL = ROOT / "demo/real"
FRESH = 513  # the other seed
CONFIG, LIST = ROOT / "demo/real-mapper.yaml", REAL / "found.yaml"


def main() -> int:
    """Draw, score, count, print."""
    if not LIST.is_file():
        print(f"{LIST} is missing: run `make real-discover` first", file=sys.stderr)
        return 2
    config = load_config(CONFIG, mapping=True, sets=[f"phrase_files=[{LIST}]", "bad_phrases=[]"])
    prepare_libraries(config.random_seed)
    with Console("bench-discover") as console:
        opened = open_writer(config, console)
        prompts, writer = opened.prompts, opened.load()
        before, fresh = (
            write_texts(writer, prompts, replace(config, random_seed=seed), console, REAL / "samples")
            for seed in (config.random_seed, FRESH)
        )
        phrases = list(dict.fromkeys(pair.phrase for pair in config.bad_phrases))
        scored = contexts_of(phrases, fresh, prompts, writer)
    rates = [counts(texts, phrases).rate(phrases) for texts in (before, fresh)]
    found = {
        "contexts": len(scored),
        "above_1_percent": sum(value >= 0.01 for value in scored) / len(scored),
        "mean": sum(scored) / len(scored),
        "rate": rates[0],
        "fresh_rate": rates[1],
    }
    share, again = found["above_1_percent"], rates[1] / rates[0]
    print(f"{len(scored)} contexts in texts of seed {FRESH}, none left out: {share:.0%} have at least 1 %")
    print(f"Their mean is {found['mean']:.1%}")
    print(f"The {len(phrases)} phrases stand {rates[1]:.2f} times in 1,000 fresh words, {again:.0%} of before")
    print(json.dumps(found))
    return 0


def contexts_of(
    phrases: list[str], written: list[tuple[str, ...]], prompts: tuple[str, ...], writer: Author
) -> list[float]:
    """How probable every phrase is where the texts have it, at most twelve places each, as a list would have them."""
    texts = [Text(number, text) for number, of_prompt in enumerate(written) for text in of_prompt]
    pairs = []
    for phrase in phrases:
        pattern = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)")
        places = tuple(
            (number, *said.span()) for number, text in enumerate(texts) for said in pattern.finditer(text.text)
        )
        finding = Finding(phrase, len(places), 0, 0, 0.0, 0.0, 0.0, 0.0, places)
        count = lambda text: len(writer.tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
        pairs += [one.pair for one in possible_contexts(finding, texts, prompts, writer.chats, count)]
    return probabilities(writer, pairs)


if __name__ == "__main__":
    sys.exit(main())
