"""Whether what --discover finds in a model's texts is there in texts of another seed too.

    python benchmarks/bench_discover.py    # on what `make real-discover` has made; ten minutes at first, then one

Draws texts of another seed, unless they are kept. Takes every phrase of the list in demo/real/found.yaml as it stands
there, cuts contexts before it and scores them all, none left out for its probability; and counts the phrases in both
seeds' texts. Prints this and, as its last line, JSON.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from modules.config.load import load_config
from modules.run.steps import prepare_libraries
from modules.runtime.console import Console
from modules.slop.contexts import candidate_contexts
from modules.slop.discover import probabilities
from modules.slop.finder import Finding, Text
from modules.slop.generate import Generator, generate, load_generator
from modules.slop.rate import counts

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
        generator = load_generator(config, console)
        before, fresh = (generate(generator, seed, console, LIST) for seed in (config.random_seed, FRESH))
        phrases = list(dict.fromkeys(pair.phrase for pair in config.bad_phrases))
        scored = contexts_of(phrases, fresh, generator)
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


def contexts_of(phrases: list[str], answers: list[list[str]], generator: Generator) -> list[float]:
    """How probable every phrase is where the texts have it, at most twelve places each, as a list would have them."""
    texts = [Text(number, text) for number, of_prompt in enumerate(answers) for text in of_prompt]
    pairs = []
    for phrase in phrases:
        pattern = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)")
        places = tuple(
            (number, *match.span()) for number, text in enumerate(texts) for match in pattern.finditer(text.text)
        )
        finding = Finding(phrase, (), 0, 0, 0.0, 0.0, places)
        pairs += candidate_contexts(finding, texts, generator.prompts, generator.answers_begin, generator.count_tokens)
    return probabilities(generator, pairs)


if __name__ == "__main__":
    sys.exit(main())
