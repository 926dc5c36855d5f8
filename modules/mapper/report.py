"""Completion trees as text, as JSON and as phrase lists.

Knows: widths, digits, wording, file formats. Refuses to know: how values were measured, where the text goes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from modules.config.schema import Config, Mapper
from modules.mapper.completion_tree import Branch, CompletionTree
from modules.mapper.detokenize import Detokenizer
from modules.mapper.ranking import PhraseRank
from modules.runtime.console import coloured, visible
from modules.runtime.text import (
    CONTEXT_WIDTH,
    PHRASE_WIDTH,
    brief_percent,
    ended,
    one_line,
    pluralize,
    shortened,
    table,
)
from modules.search.strategies import probability

INDENT = "     "


def summary(config: Config, contexts: int, model: Mapping[str, object], method: str) -> list[str]:
    """The settings of a run, one line each. model: its own lines, by label. method: how completions are computed."""
    settings = config.mapper
    rows = {
        **model,
        "Model": config.directories.model_path1,
        "Pairs": f"{len(config.pairs)} ({len(config.bad_phrases)} bad, {len(config.good_phrases)} good)",
        "Contexts": contexts,
        "Completions": method,
        "prob_min": f"{settings.prob_min:g}%",
        "top_k": settings.top_k,
        "max_depth": settings.max_depth,
        "additional_length": settings.additional_length,
    }
    if settings.max_branches is not None:
        rows["max_branches"] = settings.max_branches
    if settings.min_joint is not None:
        rows["min_joint"] = f"{settings.min_joint:g}%"
    return [f"{name:<17} : {value}" for name, value in rows.items()]


def tree_lines(
    number: str, tree: CompletionTree, ranks: Sequence[PhraseRank], settings: Mapper, detokenizer: Detokenizer
) -> list[str]:
    """The lines of one context: its branches, then its phrases. number: such as "1/8"."""
    lines = ["-" * 80, f"CONTEXT {number}: {folded(tree.root.shown) or '(empty)'}", ""]
    for position, branch in enumerate(tree.branches, start=1):
        lines += _branch_lines(position, tree, branch, settings, detokenizer)
    ranked = [_rank_line(rank, settings) for rank in ranks]
    return [*lines, f"TOTAL BRANCHES: {len(tree.branches)}", "", *ranked, ""]


def _branch_lines(
    position: int, tree: CompletionTree, branch: Branch, settings: Mapper, detokenizer: Detokenizer
) -> list[str]:
    pieces = detokenizer.pieces(tree.root, branch.tokens[: branch.length])
    explored = "".join(text for _, text in pieces)
    continuation = detokenizer.added(tree.root, branch.tokens, branch.length)
    if len(branch.nodes) - branch.length == settings.additional_length:  # cut at the limit, not ended
        continuation = ended(continuation)
    trace = []
    start = 0
    for count, text in pieces:
        share = probability(sum(node.log_probability for node in branch.nodes[start : start + count]))
        trace.append(coloured(f"{short_percent(share)} [{visible(text.strip(' ') or text)}]", share))
        start += count
    joint = probability(branch.joint)
    texts = [folded(text) for text in (explored, continuation) if text]
    return [
        f"{position:>3}. Sequence: {' | '.join(texts)}",
        f"{INDENT}Trace:    {' > '.join(trace) or f'no next token reaches {settings.prob_min:g}%'}",
        f"{INDENT}Joint:    {coloured(short_percent(joint), joint)}",
        "",
    ]


def _rank_line(rank: PhraseRank, settings: Mapper) -> str:
    share = probability(rank.log_probability)
    rare = f", under {settings.prob_min:g}%" if rank.too_rare else ""
    better = f"  suggestion: {suggestion(rank)}" if rank.suggestion else ""
    shown = f"{quoted(rank.pair.phrase)}  {coloured(brief_percent(share), share)}"
    return f"{rank.pair.kind:<4} {shown}  rank {rank.rank} of {rank.ranked}{rare}{better}"


def cut_lines(trees: Sequence[CompletionTree]) -> list[str]:
    """A line if max_branches has left out branches."""
    cut_counts = [tree.cut for tree in trees if tree.cut]
    if not cut_counts:
        return []
    return [f"Cut by max_branches: at least {sum(cut_counts)} branches in {len(cut_counts)} of {len(trees)} contexts"]


def phrase_table(ranks: Sequence[PhraseRank], settings: Mapper) -> list[str]:
    """All phrases: probability, rank, suggestion; those below prob_min are marked."""
    limit = f"{settings.prob_min:g}%"
    rows = []
    for rank in ranks:
        cells = (
            rank.pair.kind,
            shortened(one_line(rank.pair.phrase), PHRASE_WIDTH),
            shortened(one_line(rank.pair.shown), CONTEXT_WIDTH),
            brief_percent(probability(rank.log_probability)),
            "yes" if rank.too_rare else "",
            f"{rank.rank} of {rank.ranked}",
            suggestion(rank),
        )
        rows.append(cells)
    rare = sum(rank.too_rare for rank in ranks)
    better = sum(rank.suggestion is not None for rank in ranks)
    return [
        *table(("Type", "Phrase", "Context", "Probability", f"Under {limit}", "Rank", "Suggestion"), rows),
        f"{rare} of {pluralize(len(ranks), 'pair')} are under {limit}; {better} have a more probable suggestion",
        "Rank: among all completions with the phrase's number of words",
    ]


def suggestion(rank: PhraseRank) -> str:
    """The phrase that the model is more likely to say, ready to paste, and its probability; empty if there is none."""
    if rank.suggestion is None:
        return ""
    return f"{quoted(rank.suggestion.phrase)} ({brief_percent(probability(rank.suggestion.log_probability))})"


def document(
    model: str,
    settings: Mapper,
    trees: Sequence[CompletionTree],
    ranks: Sequence[Sequence[PhraseRank]],
    detokenizer: Detokenizer,
) -> dict[str, Any]:
    """All results, for JSON. Nodes are a flat list per context; `parent` is an index in it, or null."""
    contexts = []
    for tree, tree_ranks in zip(trees, ranks, strict=True):
        context: dict[str, Any] = {"context": tree.root.context}
        if tree.root.chat is not None:
            context["chat"] = asdict(tree.root.chat)
        context["tokens"] = list(tree.root.tokens)
        context |= _tree_document(tree, detokenizer)
        if tree.cut:
            context["cut"] = tree.cut
        context["phrases"] = [_rank_document(rank) for rank in tree_ranks]
        contexts.append(context)
    mapper_settings = {key: value for key, value in asdict(settings).items() if value is not None}
    return {"model": model, "mapper": mapper_settings, "contexts": contexts}


def _tree_document(tree: CompletionTree, detokenizer: Detokenizer) -> dict[str, Any]:
    numbers: dict[tuple[int, ...], int] = {}  # of a node, by the tokens up to it
    nodes = []
    branches = []
    for branch in tree.branches:
        tokens = branch.tokens
        for position, node in enumerate(branch.nodes):
            path = tokens[: position + 1]
            if path in numbers:
                continue
            numbers[path] = len(nodes)
            nodes.append(
                {
                    "parent": numbers.get(path[:-1]),
                    "token": node.token,
                    "text": detokenizer.added(tree.root, path, position),
                    "probability": probability(node.log_probability),
                    "joint_probability": probability(node.joint),
                    "greedy": position >= branch.length,
                }
            )
        branches.append(
            {
                "leaf": numbers.get(tokens[: branch.length]),
                "end": numbers.get(tokens),
                "text": detokenizer.added(tree.root, tokens[: branch.length], 0),
                "continuation": detokenizer.added(tree.root, tokens, branch.length),
                "joint_probability": probability(branch.joint),
            }
        )
    return {"nodes": nodes, "branches": branches}


def _rank_document(rank: PhraseRank) -> dict[str, Any]:
    document: dict[str, Any] = {"type": rank.pair.kind, "phrase": rank.pair.phrase}
    if rank.pair.variants:
        document["variants"] = list(rank.pair.variants)
    better = rank.suggestion
    return {
        **document,
        "weight": rank.pair.weight,
        "probability": probability(rank.log_probability),
        "place": rank.rank,
        "places": rank.ranked,
        "below_prob_min": rank.too_rare,
        "suggestion": better and {"phrase": better.phrase, "probability": probability(better.log_probability)},
    }


def phrase_list(ranks: Sequence[PhraseRank], model: str) -> str:
    """The suggestions as a YAML phrase list, each instead of its phrase, with its type, weight and context. First come
    those with the largest part in the total: their probabilities in all their contexts, summed, times the weight."""
    entries: dict[tuple[str, str, float], dict[str, Any]] = {}  # by kind, phrase and weight
    shares: dict[tuple[str, str, float], float] = {}  # of the total
    for rank in ranks:
        if rank.suggestion is None:
            continue
        pair = rank.pair
        better = rank.suggestion
        key = (pair.kind, better.phrase, pair.weight)
        entry = entries.setdefault(key, {"phrase": better.phrase, "weight": pair.weight, "contexts": []})
        context = pair.as_context()
        if context not in entry["contexts"]:
            entry["contexts"].append(context)
            shares[key] = shares.get(key, 0.0) + pair.weight * probability(better.log_probability)
    ordered = sorted(entries, key=lambda key: -shares[key])
    lists = {
        "bad_phrases": [entries[key] for key in ordered if key[0] == "BAD"],
        "good_phrases": [entries[key] for key in ordered if key[0] == "GOOD"],
    }
    head = (
        f"# What {folded(model)} says instead of the listed phrases, found by the mapper, the most important first.\n"
        "# Review it before you use it: what is listed under good_phrases is said instead of something wanted.\n"
    )
    return head + yaml.safe_dump(lists, allow_unicode=True, sort_keys=False, width=math.inf)


def short_percent(value: float) -> str:
    """A fraction as a percentage with two decimals; a tiny one with three significant digits."""
    return f"{value * 100:.2f}%" if value >= 0.0001 or value == 0 else f"{value * 100:.2e}%"


def folded(text: str) -> str:
    """Text on one line: white space as one space each, other control characters escaped."""
    return visible(" ".join(text.split()))


def quoted(phrase: str) -> str:
    """A phrase as YAML, in double quotes on one line."""
    return visible(yaml.safe_dump(phrase, default_style='"', allow_unicode=True, width=math.inf).strip())
