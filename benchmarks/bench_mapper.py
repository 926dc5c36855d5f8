"""How fast the mapper is, against a naive one that asks the model anew for every token; where its time goes.

    python benchmarks/bench_mapper.py
    python benchmarks/bench_mapper.py --config demo/real.yaml   # a config's own model and phrases, on the CPU

Builds a seeded random Llama on disk, then measures in alternation, in one process:
  ours    the program's own exploring of all contexts, the verification of its kept keys and values included
  naive   one whole forward per node and per token of a continuation, no cache (tests/helpers/reference.py), one
          context at a time, in turn with ours
With --config it takes the steps of a mapping one by one, for all branches and with the limits of default-mapper.yaml,
and lets transformers' generate say as many tokens after the same contexts, a row for each branch: CPU seconds of each.
Prints a table and, as its last line, JSON.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "", "tests/helpers")]

import reference
from workload import Shape, machine, make_models, parameter_count, print_table, shape_of, shape_options

from modules.checkpoints.checkpoint import load_tokenizer, open_checkpoint
from modules.config.load import load_config
from modules.config.phrase_lists import Pair
from modules.config.schema import Config, Mapper
from modules.mapper.completion_tree import BeamSearch, CompletionTree
from modules.mapper.detokenize import Detokenizer
from modules.mapper.next_tokens import Predictor, build_predictor
from modules.model.base_model import ResidentModel
from modules.model.loading import load_model
from modules.run.steps import prepare_libraries
from modules.scoring.layout import build_scorer, score_once
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import Root, encode_contexts, encode_pairs


def main() -> None:
    """Build, measure, print."""
    options = parse_arguments()
    prepare_libraries(seed=0)
    if options.config:
        result = of_a_config(load_config(options.config, model=options.model, mapping=True))
        print("| what | branches | tokens said | CPU seconds |\n|---|---|---|---|")
        print(*(f"| {' | '.join(map(str, row))} |" for row in result["rows"]), sep="\n")
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make_models({shape_of(options): [base]})
        result = measure(options, base)
    print_table(result)
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """Sizes of the model and of the trees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape_options(parser, Shape())
    parser.add_argument("--config", metavar="FILE", help="where the CPU seconds of this config's mapping go")
    parser.add_argument("--model", metavar="DIR", help="in place of the config's base model")
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--max-depth", type=int, default=4)
    parser.add_argument("--additional-length", type=int, default=20)
    return parser.parse_args()


def measure(options: argparse.Namespace, base: Path) -> dict[str, object]:
    """Ours and naive in turn, one context of the naive mapper after each of ours; ours is the median."""
    rng = random.Random(0)
    lengths = [8 + 4 * (number % 3) for number in range(options.contexts)]
    contexts = [" ".join(f"w{rng.randrange(4000)}" for _ in range(length)) for length in lengths]
    settings = Mapper(0.0, options.top_k, options.max_depth, options.additional_length)
    model, tokenizer = load_model(open_checkpoint(base, "base"), "cpu", options.dtype), load_tokenizer(base)
    naive = reference.NaiveMapper(
        reference.load(str(base), torch.float32),
        tokenizer,
        settings.prob_min,
        settings.top_k,
        settings.max_depth,
        settings.additional_length,
        answers=None,
    )
    ours, theirs, same = [], [], 0
    for context in contexts:
        start = time.perf_counter()
        trees, way = explore(model, tokenizer, contexts, settings)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        branches = naive.branches(context)
        theirs.append(time.perf_counter() - start)
        found = {tuple(branch.tokens) for branch in branches}
        tree = next(tree for tree in trees if tree.root.context == context)
        same += sum(branch.tokens[: branch.length] in found for branch in tree.branches)
    leaves = sum(len(tree.branches) for tree in trees)
    seconds, naive_seconds = statistics.median(ours), sum(theirs)
    return {
        "machine": machine(torch.device("cpu")),
        "dtype": options.dtype,
        "parameters": parameter_count(base),
        "contexts": len(contexts),
        "context_tokens": sum(len(tree.root.tokens) for tree in trees),
        "leaves": leaves,
        "same_branches_as_naive": same,
        "tokens_said": sum(len(branch.nodes) for tree in trees for branch in tree.branches),
        "way": way,
        "mapper_seconds": round(seconds, 2),
        "naive_seconds": round(naive_seconds, 1),
        "times_naive": round(naive_seconds / seconds, 1),
    }


def explore(
    model: ResidentModel, tokenizer: object, contexts: list[str], settings: Mapper
) -> tuple[list[CompletionTree], str]:
    """All trees, as the program finds them, and the way in which it did."""
    detokenizer = Detokenizer(tokenizer, model.vocabulary)
    pairs = [Pair("BAD", "w1", context + " ") for context in contexts]
    scorer = build_scorer(model, encode_pairs(tokenizer, pairs, model.vocabulary, model.max_tokens), tails=False)
    roots = encode_contexts(tokenizer, contexts, model.vocabulary)
    predictor = verified_predictor(model, detokenizer, scorer, roots, settings)
    search = BeamSearch(predictor, settings, detokenizer, frozenset(), advanced=lambda amount: None)
    return list(search.trees(roots)), predictor.way


def verified_predictor(
    model: ResidentModel, detokenizer: Detokenizer, scorer: Scorer, roots: Sequence[Root], settings: Mapper
) -> Predictor:
    """The verified way to continue these contexts."""
    longest = max(len(root.tokens) for root in roots) + settings.max_depth + settings.additional_length
    return build_predictor(model, detokenizer, scorer, [root.tokens for root in roots], longest)


def of_a_config(config: Config) -> dict[str, object]:
    """What each step of a config's mapping takes, in CPU seconds, and what generate takes for as many tokens."""
    rows: list[tuple[str, object, object, float]] = []
    done = 0.0

    def note(what: str, branches: object = "", tokens: object = "") -> None:
        nonlocal done
        spent, done = time.process_time() - done, time.process_time()
        rows.append((what, branches, tokens, round(spent, 1)))

    note("starting Python, PyTorch and transformers")
    base = Path(config.directories.model_path1)
    model, tokenizer = load_model(open_checkpoint(base, "base"), "cpu", "float32"), load_tokenizer(base)
    note("loading the model")
    scorer, _ = score_once(model, encode_pairs(tokenizer, config.pairs, model.vocabulary, model.max_tokens))
    note("scoring the phrases, verified")
    detokenizer = Detokenizer(tokenizer, model.vocabulary)
    contexts = list(dict.fromkeys(pair.context for pair in config.pairs))
    roots = encode_contexts(tokenizer, contexts, model.vocabulary)
    for kind, limits in (("all branches", {}), ("the limits of default-mapper.yaml", shipped_limits())):
        settings = replace(config.mapper, **limits)
        predictor = verified_predictor(model, detokenizer, scorer, roots, settings)
        note(f"{kind}: verifying")
        search = BeamSearch(predictor, settings, detokenizer, model.end_tokens(), advanced=lambda amount: None)
        trees = list(search.trees(roots))
        branches = [len(tree.branches) for tree in trees]
        said = sum(len(distinct_beginnings(tree)) for tree in trees)
        note(f"{kind}: mapping", sum(branches), said)
        texts = [root.tokens for root, count in zip(roots, branches, strict=True) for _ in range(count)]
        note(f"{kind}: generate", len(texts), generated(model, texts, -(-said // len(texts))))
    return {"machine": machine(torch.device("cpu")), "contexts": len(contexts), "rows": rows}


def distinct_beginnings(tree: CompletionTree) -> set[tuple[int, ...]]:
    """Every beginning of a branch, each once: so many tokens the model was asked for."""
    return {branch.tokens[:end] for branch in tree.branches for end in range(1, len(branch.tokens) + 1)}


def shipped_limits() -> dict[str, float]:
    """The limits that default-mapper.yaml sets."""
    path = Path(__file__).parents[1] / "default-mapper.yaml"
    shipped = yaml.safe_load(path.read_text(encoding="utf-8"))["mapper"]
    return {name: shipped[name] for name in ("max_branches", "min_joint")}


@torch.no_grad()
def generated(model: ResidentModel, texts: Sequence[Sequence[int]], each: int) -> int:
    """Let transformers continue all texts greedily, at once, by so many tokens each; how many it has said."""
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    found = model.module.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=each, max_new_tokens=each, pad_token_id=0
    )
    return (found.shape[1] - longest) * len(texts)


if __name__ == "__main__":
    main()
