"""How often models write the phrases of a list: the base and others, asked the same with the same seeds.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

import gc
import json
from collections.abc import Sequence
from pathlib import Path

from modules.config import Config, Location, Source, names_of, parse_location
from modules.discovery import Counts, counts
from modules.discovery import report as found_report
from modules.output import write_text
from modules.run.map import Exports
from modules.run.steps import prepare_libraries
from modules.run.writing import check_prompts, folder_beside, open_writer, write_texts
from modules.runtime import Console


def rate(config: Config, others: Sequence[Config], console: Console, exports: Exports) -> None:
    """Let the config's base write, then the base of each of the others, and print how often they say the phrases.

    Raises ConfigError for what can't be used, OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    check_prompts(config)
    bad, good = (
        tuple(dict.fromkeys(pair.phrase for pair in pairs)) for pairs in (config.bad_phrases, config.good_phrases)
    )
    groups = {name: some for name, some in (("all bad phrases", bad), ("all good phrases", good)) if some}
    phrases = tuple(dict.fromkeys([*bad, *good]))
    variants = {pair.phrase: pair.variants for pair in config.pairs if pair.variants}
    folder = folder_beside(exports.json)
    found: dict[str, Counts] = {}
    first: dict[str, str] = {}
    models = (config, *others)
    base = open_writer(config, console)
    prompts = base.prompts
    # What a template refuses is told before any work.
    writers = [base, *(open_writer(other, console, prompts) for other in others)]
    for name, one, opened in zip(names_for(models), models, writers, strict=True):
        if name in found:
            continue
        writer = opened.load()
        texts = write_texts(writer, prompts, one, console, folder)
        found[name], first[name] = counts(texts, phrases, variants), texts[0][0]
        del writer
        gc.collect()  # one model at a time
    console.lines(found_report.rate_lines(groups, variants, found))
    console.warnings(found_report.doubts(phrases, variants, found))
    console.lines(found_report.sample_lines(prompts[0], first))
    if exports.json:
        document = found_report.rate_document(groups, found)
        write_text(exports.json, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        console.timed(f"All rates are in {exports.json}")
    console.final(f"Done. The log is {console.log_path}")


def names_for(models: Sequence[Config]) -> list[str]:
    """What reports call the bases: ids of the hub, folders by their names or as much more as tells them apart."""
    texts = [one.directories.model_path1 for one in models]
    # Of a folder that has gone meanwhile, whoever opens it says so.
    locations = [parse_location(text) or Location(text, Path(text)) for text in texts]
    names = names_of([Source(location.text, location) for location in locations])
    return [location.name if location.folder is None else name for location, name in zip(locations, names, strict=True)]
