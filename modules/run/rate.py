"""How often models write the phrases of a list: the base and others, asked the same with the same seeds.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

import gc
import json
from collections.abc import Sequence

from modules.config import Config
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
    folder, found, first = folder_beside(exports.json), dict[str, Counts](), dict[str, str]()
    opened = open_writer(config, console)
    prompts, writers = opened.prompts, [opened]
    writers += [open_writer(one, console, prompts) for one in others]  # what a template refuses is told before any work
    for one, opened in zip((config, *others), writers, strict=True):
        writer = opened.load()
        texts = write_texts(writer, prompts, one, console, folder)
        found[writer.name], first[writer.name] = counts(texts, phrases, variants), texts[0][0]
        del writer
        gc.collect()  # one model at a time
    console.lines(found_report.rate_lines(groups, found))
    console.lines(found_report.sample_lines(prompts[0], first))
    if exports.json:
        document = found_report.rate_document(groups, found)
        write_text(exports.json, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        console.timed(f"All rates are in {exports.json}")
    console.final(f"Done. The log is {console.log_path}")
