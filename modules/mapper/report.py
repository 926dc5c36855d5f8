"""Completion trees as text, as JSON and as phrase lists.

Knows: widths, digits, wording, file formats. Refuses to know: how anything was measured, where the text goes.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from modules.config import Config, Mapper
from modules.mapper.completion_tree import Branch, CompletionTree, Cut, Node, path_of, tokens_of
from modules.mapper.detokenize import Spelling
from modules.mapper.ranking import PhraseRank
from modules.runtime import CONTEXT_WIDTH, PHRASE_WIDTH, coloured, ended, percent, row, visible
from modules.search import probability

INDENT = "     "


def summary(config: Config, contexts: int, model: Mapping[str, object], way: str) -> list[str]:
    """The settings of a run, one line each; `model` adds what it says of itself, `way` how it is continued."""
    settings = config.mapper
    rows = {
        **model,
        "Model": config.directories.model_path1,
        "Phrases loaded": f"{len(config.pairs)} ({len(config.bad_phrases)} bad, {len(config.good_phrases)} good)",
        "Contexts": contexts,
        "Completions": way,
        "prob_min": f"{settings.prob_min:g}%",
        "top_k": settings.top_k,
        "max_depth": settings.max_depth,
        "additional_length": settings.additional_length,
        **({} if settings.max_branches is None else {"max_branches": settings.max_branches}),
        **({} if settings.min_joint is None else {"min_joint": f"{settings.min_joint:g}%"}),
    }
    return [f"{name:<17} : {value}" for name, value in rows.items()]


def tree_lines(
    number: str, tree: CompletionTree, standings: Sequence[PhraseRank], settings: Mapper, spelling: Spelling
) -> list[str]:
    """One context, number "1/8" or so: its branches, then its phrases."""
    lines = ["-" * 80, f"CONTEXT {number}: {folded(tree.root.shown) or '(empty)'}", ""]
    for place, branch in enumerate(tree.branches, start=1):
        lines += _branch_lines(place, tree, branch, settings, spelling)
    lines += [f"TOTAL BRANCHES: {len(tree.branches)}{_cut_note(tree.cut, settings)}", ""]
    return [*lines, *(_rank_line(standing, settings) for standing in standings), ""]


def _cut_note(cut: Cut, settings: Mapper) -> str:
    share = short_percent(cut.share)
    notes = [f"cut: at least {cut.branches} less likely, together {share}"] if cut.branches else []
    notes += [f"below a joint {settings.min_joint:g}%: {cut.tokens} next tokens"] if cut.tokens else []
    return f" ({'; '.join(notes)})" if notes else ""


def cut_lines(trees: Sequence[CompletionTree]) -> list[str]:
    """What the limits have left out of all trees, a line for each limit that has left out something."""
    branches = [tree.cut.branches for tree in trees if tree.cut.branches]
    tokens = [tree.cut.tokens for tree in trees if tree.cut.tokens]
    lines = [
        f"Cut by max_branches: at least {sum(branches)} branches in {len(branches)} of {len(trees)} contexts",
        f"Not followed for min_joint: {sum(tokens)} next tokens in {len(tokens)} of {len(trees)} contexts",
    ]
    return [line for line, cut in zip(lines, (branches, tokens), strict=True) if cut]


def _branch_lines(place: int, tree: CompletionTree, branch: Branch, settings: Mapper, spelling: Spelling) -> list[str]:
    tokens = tokens_of(branch.nodes)
    own = spelling.pieces(tree.root, tokens[: branch.length])
    said = "".join(text for _, text in own)
    after = spelling.added(tree.root, tokens, branch.length)
    if len(tokens) - branch.length == settings.additional_length:  # broken off: it would go on
        after = ended(after)
    trace, start = [], 0
    for count, text in own:
        share = probability(sum(node.log_probability for node in branch.nodes[start : start + count]))
        trace.append(coloured(f"{short_percent(share)} [{visible(text.strip(' ') or text)}]", share))
        start += count
    nothing = f"no next token reaches {settings.prob_min:g}%"
    joint = probability(branch.joint)
    return [
        f"{place:>3}. Sequence: {' | '.join(folded(text) for text in (said, after) if text)}",
        f"{INDENT}Trace:    {' > '.join(trace) or nothing}",
        f"{INDENT}Joint:    {coloured(short_percent(joint), joint)}",
        "",
    ]


def _rank_line(standing: PhraseRank, settings: Mapper) -> str:
    raw = probability(standing.log_probability)
    place = f"place {standing.place} of {standing.places}"
    rare = f", below {settings.prob_min:g}%" if standing.too_rare else ""
    better = f"  suggestion: {suggestion(standing)}" if standing.suggestion else ""
    phrase = quoted(standing.pair.phrase)
    return f"{standing.pair.kind:<4} {phrase}  {coloured(percent(raw), raw)}  {place}{rare}{better}"


def table(standings: Sequence[PhraseRank], settings: Mapper) -> list[str]:
    """All phrases: probability, place, suggestion; those below prob_min are marked."""
    limit = f"{settings.prob_min:g}%"
    widths = (4, PHRASE_WIDTH, CONTEXT_WIDTH, 10, len(limit) + 6, 9)
    lines = [row(("Type", "Phrase", "Context", "Raw Prob", "Too rare", "Place"), widths) + " Suggestion"]
    for standing in standings:
        pair, place = standing.pair, f"{standing.place} of {standing.places}"
        mark = f"below {limit}" if standing.too_rare else ""
        cells = (pair.kind, pair.phrase, pair.shown, percent(probability(standing.log_probability)), mark, place)
        lines.append(f"{row(cells, widths)} {suggestion(standing)}".rstrip())
    rule = "-" * (len(row([""] * len(widths), widths)) + 11)
    rare = sum(standing.too_rare for standing in standings)
    better = sum(standing.suggestion is not None for standing in standings)
    notes = [
        f"{rare} of {len(standings)} phrases are less probable than {limit}; {better} have a likelier suggestion",
        "Place: among the completions of the phrase's length in words, the phrase included",
    ]
    return [rule, lines[0], rule, *lines[1:], rule, *notes]


def suggestion(standing: PhraseRank) -> str:
    """What the model rather says, ready to paste, and how probable it is; empty if there is nothing."""
    if standing.suggestion is None:
        return ""
    share = short_percent(probability(standing.suggestion.log_probability))
    return f"{quoted(standing.suggestion.phrase)} ({share})"


def document(
    model: str,
    settings: Mapper,
    trees: Sequence[CompletionTree],
    standings: Sequence[Sequence[PhraseRank]],
    spelling: Spelling,
) -> dict[str, Any]:
    """Everything that was found, for JSON. Nodes are a flat list per context; `parent` is a number in it, or null."""
    return {
        "model": model,
        "mapper": {key: value for key, value in asdict(settings).items() if value is not None},
        "contexts": [
            {
                "context": tree.root.context,
                **({} if tree.root.chat is None else {"chat": asdict(tree.root.chat)}),
                "tokens": list(tree.root.tokens),
                **_tree_document(tree, spelling),
                **({"cut": asdict(tree.cut)} if tree.cut != Cut() else {}),
                "phrases": [_rank_document(standing) for standing in phrases],
            }
            for tree, phrases in zip(trees, standings, strict=True)
        ],
    }


def _tree_document(tree: CompletionTree, spelling: Spelling) -> dict[str, Any]:
    numbers: dict[Node, int] = {}
    nodes, branches = [], []
    for branch in tree.branches:
        for place, node in enumerate(branch.nodes):
            if node in numbers:
                continue
            numbers[node] = len(nodes)
            nodes.append(
                {
                    "parent": None if node.parent is None else numbers[node.parent],
                    "token": node.token,
                    "text": spelling.added(tree.root, tokens_of(branch.nodes[: place + 1]), place),
                    "probability": probability(node.log_probability),
                    "joint_probability": probability(node.joint),
                    "greedy": place >= branch.length,
                }
            )
        branches.append(
            {
                "leaf": numbers[branch.leaf] if branch.leaf else None,
                "end": numbers[branch.end] if branch.end else None,
                "text": spelling.added(tree.root, tokens_of(path_of(branch.leaf)), 0),
                "continuation": spelling.added(tree.root, tokens_of(branch.nodes), branch.length),
                "joint_probability": probability(branch.joint),
            }
        )
    return {"nodes": nodes, "branches": branches}


def _rank_document(standing: PhraseRank) -> dict[str, Any]:
    better = standing.suggestion
    return {
        "type": standing.pair.kind,
        "phrase": standing.pair.phrase,
        **({"variants": list(standing.pair.variants)} if standing.pair.variants else {}),
        "weight": standing.pair.weight,
        "probability": probability(standing.log_probability),
        "place": standing.place,
        "places": standing.places,
        "below_prob_min": standing.too_rare,
        "suggestion": better and {"phrase": better.phrase, "probability": probability(better.log_probability)},
    }


def phrase_list(standings: Sequence[PhraseRank], model: str) -> str:
    """The suggestions as a YAML phrase list, each in the place of its phrase, with its type, weight and context. First
    those that count most in the total: by their probabilities in all their contexts together, times the weight."""
    found: dict[tuple[str, str, float], list[Any]] = {}  # contexts, by kind, phrase and weight
    shares: dict[tuple[str, str, float], float] = defaultdict(float)  # of the total, in the same order
    for standing in standings:
        if standing.suggestion is not None:
            pair, better = standing.pair, standing.suggestion
            contexts = found.setdefault(key := (pair.kind, better.phrase, pair.weight), [])
            context = pair.as_context()
            if context not in contexts:
                contexts.append(context)
                shares[key] += pair.weight * probability(better.log_probability)
    ranked = sorted(found.items(), key=lambda item: -shares[item[0]])
    lists = {
        key: [{"phrase": p, "weight": w, "contexts": c} for (kind, p, w), c in ranked if kind == wanted]
        for key, wanted in (("bad_phrases", "BAD"), ("good_phrases", "GOOD"))
    }
    head = (
        f"# What {folded(model)} rather says than the phrases of its list, found by the mapper.\n"
        "# Read it before you use it: what stands under good_phrases is said in place of something wanted.\n"
        "# First comes what counts most in the total.\n"
    )
    return head + yaml.safe_dump(lists, allow_unicode=True, sort_keys=False, width=math.inf)


def short_percent(value: float) -> str:
    """A share as a percentage with two digits, or, of a tiny one, three significant ones."""
    return f"{value * 100:.2f}%" if value >= 0.0001 or value == 0 else f"{value * 100:.2e}%"


def folded(text: str) -> str:
    """Text on one line: white space as one space each, other control characters escaped."""
    return visible(" ".join(text.split()))


def quoted(phrase: str) -> str:
    """A phrase as a YAML file takes it, in double quotes on one line."""
    return visible(yaml.safe_dump(phrase, default_style='"', allow_unicode=True, width=math.inf).strip())
