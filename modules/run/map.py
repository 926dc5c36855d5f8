"""Carries out a whole mapping, from the configuration to the printed trees and the requested files.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.checkpoints.open_models import Models
from modules.config.phrase_lists import Chat, Pair
from modules.config.schema import Config
from modules.mapper import report as mapping_report
from modules.mapper.completion_tree import BeamSearch, CompletionTree
from modules.mapper.detokenize import Detokenizer
from modules.mapper.next_tokens import build_predictor
from modules.mapper.ranking import PhraseRank, rank_phrases
from modules.model.base_model import ResidentModel
from modules.model.loading import ModelLoader
from modules.output.text_files import check_file, write_text
from modules.run.steps import end, prepare_libraries, with_chats_rendered
from modules.runtime.console import Console
from modules.runtime.errors import ConfigError
from modules.scoring.layout import score_once
from modules.scoring.scorer import by_pair
from modules.scoring.tokenization import Encoded, doubled_tokens, doubtful_phrases, encode_contexts, encode_pairs


@dataclass(frozen=True)
class Exports:
    """Files that are written beside the log; None: not requested."""

    json: Path | None
    yaml: Path | None


def map_model(config: Config, console: Console, exports: Exports) -> None:
    """Explore every context of a config under its base model, print the trees, write the requested files.

    Raises ConfigError for what can't be used, found before any work; CheckpointError or OSError if a file fails.
    """
    prepare_libraries(config.random_seed)
    loader = ModelLoader(config, console)
    models = loader.open_base()
    loader = with_chats_rendered(loader.fitting(models), models)
    config = loader.config
    console.warnings(doubtful_phrases(config.pairs))
    trees, ranks, detokenizer = loader.in_range(lambda wide: _explored(wide, models))
    all_ranks = [rank for context_ranks in ranks for rank in context_ranks]
    console.lines(mapping_report.phrase_table(all_ranks, config.mapper))
    console.lines(mapping_report.cut_lines(trees))
    if exports.json:
        document = mapping_report.document(models.base.name, config.mapper, trees, ranks, detokenizer)
        write_text(exports.json, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
        console.timed(f"Wrote the whole tree to {exports.json}")
    if exports.yaml:
        write_text(exports.yaml, mapping_report.phrase_list(all_ranks, models.base.name))
        console.timed(f"Wrote the suggestions to {exports.yaml}")
    end(console, config, models)


def _explored(loader: ModelLoader, models: Models) -> tuple[list[CompletionTree], list[list[PhraseRank]], Detokenizer]:
    """Load the base in the loader's arithmetic and `explore`. Returns its results and the detokenizer."""
    model, tokenizer = loader.load(models, loader.placement(models, with_header=False))
    detokenizer = Detokenizer(tokenizer, model.vocabulary)
    return *explore(loader.config, loader.console, model, tokenizer, detokenizer), detokenizer


def explore(
    config: Config, console: Console, model: ResidentModel, tokenizer: Any, detokenizer: Detokenizer
) -> tuple[list[CompletionTree], list[list[PhraseRank]]]:
    """Find and print the tree of every distinct context and the ranks of its phrases."""
    settings = config.mapper
    console.warnings(doubled_tokens(tokenizer, config.pairs))
    encoded = encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens)
    console.timed("Scoring the phrases")
    scorer, log_probabilities = score_once(model, encoded)
    phrases: dict[tuple[str, Chat | None], list[tuple[Pair, Sequence[Encoded], float]]] = {}
    for pair, variants, log_probability in zip(config.pairs, by_pair(encoded, encoded), log_probabilities, strict=True):
        phrases.setdefault((pair.context, pair.chat), []).append((pair, variants, log_probability))
    contexts, chats = zip(*phrases, strict=True)
    roots = encode_contexts(tokenizer, contexts, model.vocabulary, chats)
    longest = max(len(root.tokens) for root in roots) + settings.max_depth + settings.additional_length
    predictor = build_predictor(model, detokenizer, scorer, [root.tokens for root in roots], longest)
    console.lines(mapping_report.summary(config, len(roots), model.describe(saving=False), predictor.way))
    trees = []
    ranks = []
    with console.progress(len(roots)) as bar:
        search = BeamSearch(predictor, settings, detokenizer, model.end_tokens())
        for tree in search.trees(roots):
            tree_ranks = rank_phrases(tree, phrases[tree.root.context, tree.root.chat], settings, detokenizer)
            number = f"{len(trees) + 1}/{len(roots)}"
            console.coloured_lines(mapping_report.tree_lines(number, tree, tree_ranks, settings, detokenizer))
            bar.update(1)
            trees.append(tree)
            ranks.append(tree_ranks)
    return trees, ranks


def check_exports(exports: Exports, overwrite: bool) -> None:
    """Raise ConfigError if a file can't be written, or exists already and `overwrite` is not set."""
    for option, path in (("--json", exports.json), ("--yaml", exports.yaml)):
        if path is not None:
            check_file(option, path, overwrite)
    if exports.json and exports.yaml and exports.json.resolve() == exports.yaml.resolve():
        raise ConfigError(f"--json and --yaml both name {exports.json}; choose two files")
