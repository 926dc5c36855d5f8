"""The judge of merges: its figures are those that an obvious computation has, the same in every run, of files it read.

The program is asked here what the judge must find by itself.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import runs
import tiny
import torch
import yaml
from project import ROOT
from transformers import AutoTokenizer

from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.load import load_config
from modules.config.phrase_lists import Pair
from modules.model.loading import load_model
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs

sys.path.append(str(ROOT / "benchmarks"))

import bench_quality
import judge

QUALITY = ROOT / "benchmarks/quality"
NAMES = ("base", *bench_quality.SINGLE)
SIZES = replace(bench_quality.QUICK, windows=3)
MORE = (
    *tiny.PAIRS,
    Pair("BAD", "apple", "Question: where\n", 1.5),
    Pair("BAD", "It sent", "", 2.0),
    Pair("GOOD", "spine", "It sent shivers down her ", 0.5),
)


@pytest.fixture(scope="module", params=["bpe", "spm"])
def family(tmp_path_factory, request):
    """A base and its tokenizer as they lie on the disk, with a template of a chat."""
    return runs.make_models(tmp_path_factory.mktemp("models"), family=request.param)


@pytest.fixture(scope="module")
def loaded(family):
    """Base, fine-tune, tokenizer."""
    return judge.load(family[0]), judge.load(family[1]), AutoTokenizer.from_pretrained(family[0])


# ---------------------------------------------------------------------------------------------------------------------
# Phrases
# ---------------------------------------------------------------------------------------------------------------------


def program_scores(folder, pairs):
    """What the program says: its own loading, tokens, packs."""
    model = load_model(open_checkpoint(folder, "base"), "cpu", "float32")
    encoded = encode_pairs(AutoTokenizer.from_pretrained(folder), pairs, model.vocabulary, model.max_tokens)
    return [math.exp(score) for score in build_scorer(model, encoded).score()]


def test_probabilities_and_totals_are_the_programs(tmp_path, family, loaded):
    base, _, tokenizer = loaded
    lists = {"bad_phrases": tiny.phrase_entries(MORE, "BAD"), "good_phrases": tiny.phrase_entries(MORE, "GOOD")}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(lists))
    pairs = judge.read_pairs(tmp_path / "list.yaml")
    ordered = [pair for kind in ("BAD", "GOOD") for pair in MORE if pair.kind == kind]
    theirs = program_scores(family[0], ordered)
    ours = [judge.probability(base, tokenizer, pair) for pair in pairs]
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7) and max(ours) > 1e-4
    signed = [(-1 if pair.kind == "GOOD" else 1) * pair.weight for pair in ordered]
    expected = sum(weight * score for weight, score in zip(signed, theirs, strict=True))
    assert judge.total(base, tokenizer, pairs) == pytest.approx(expected, abs=1e-5)


def test_the_total_of_a_merge_is_the_one_in_its_recipe(place, family, loaded):
    """The program's table after a merge in float32, and the judge on the model that was saved."""
    assert runs.merge(place, family, merge_ratios=[0.5]) == 0
    recipe = json.loads((place / "out/merge_monster_recipe.json").read_text(encoding="utf-8"))
    pairs = [judge.Pair(pair.phrase, pair.context, pair.weight) for pair in tiny.PAIRS if pair.kind == "BAD"]
    pairs += [judge.Pair(pair.phrase, pair.context, -pair.weight) for pair in tiny.PAIRS if pair.kind == "GOOD"]
    ours = judge.total(judge.load(place / "out"), loaded[2], pairs)
    assert ours == pytest.approx(recipe["metrics"]["merge"]["total"], abs=1e-5)
    assert ours < recipe["metrics"]["base"]["total"] - 0.001


def test_every_pair_of_the_frozen_lists_is_read(place, family):
    """As the program reads them."""
    base, other, _ = family
    for file in (bench_quality.SEARCHED, bench_quality.HELD_OUT):
        config = tiny.write_config(place / "my.yaml", base, [other], "out", pairs=(), phrase_files=[str(file)])
        theirs = [(pair.phrase, pair.context, pair.weight) for pair in load_config(config).pairs]
        assert [(pair.phrase, pair.context, pair.weight) for pair in judge.read_pairs(file)] == theirs
        assert len(theirs) == 45


def test_searched_and_held_out_share_no_context_and_leave_out_none():
    searched, held_out = (judge.read_pairs(file) for file in (bench_quality.SEARCHED, bench_quality.HELD_OUT))
    assert not {pair.context for pair in searched} & {pair.context for pair in held_out}
    lists = [ROOT / f"example_phrases/{name}.yaml" for name in ("fiction-cliches", "purple-prose")]
    assert set(searched) | set(held_out) == {pair for file in lists for pair in judge.read_pairs(file)}


# ---------------------------------------------------------------------------------------------------------------------
# Neutral texts
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = [" ".join(tiny.TEXT) * 2, "The apple is in the kitchen."]


def naive_figures(base, model, tokenizer, texts):
    """One position after another."""
    divergences, same, surprises = [], [], []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = tokenizer(text)["input_ids"][: len(tokenizer(text)["input_ids"]) - len(tokens)]
        step = 256 - len(bos)
        for first in range(0, len(tokens), step):
            given = [*bos, *tokens[first : first + step]]
            after = [*given, *tokens[first + step : first + step + 1]]
            p, q = (one(input_ids=torch.tensor([given])).logits[0].double().softmax(-1) for one in (base, model))
            for place in range(len(given)):
                both = zip(p[place].tolist(), q[place].tolist(), strict=True)
                divergences.append(sum(a * math.log(a / b) for a, b in both))
                same.append(bool(p[place].argmax() == q[place].argmax()))
                if place + 1 < len(after):
                    surprises.append(-math.log(q[place, after[place + 1]]))
    mean = sum(divergences) / len(divergences)
    return mean, sum(same) / len(same), math.exp(sum(surprises) / len(surprises)), len(divergences)


def test_a_model_is_no_distance_from_itself(loaded):
    base, _, tokenizer = loaded
    figures = judge.neutral_figures(base, base, tokenizer, TEXTS, SIZES)
    assert figures["kl"] == 0 and figures["same_next"] == 1 and figures["perplexity"] > 1


@torch.inference_mode()
def test_the_distance_is_that_of_a_naive_loop(loaded):
    base, other, tokenizer = loaded
    figures = judge.neutral_figures(base, other, tokenizer, TEXTS, SIZES)
    kl, same, perplexity, positions = naive_figures(base, other, tokenizer, TEXTS)
    assert positions > 256 and kl > 0.001
    assert figures == pytest.approx({"kl": kl, "same_next": same, "perplexity": perplexity}, rel=1e-5)


@torch.inference_mode()
def test_the_distance_on_own_texts_is_that_of_a_naive_loop(loaded):
    base, other, tokenizer = loaded
    prompt, text = "Where is the apple?", " The apple is in the kitchen. It sent shivers down her spine."
    asked = judge.in_template(tokenizer, prompt)
    encoded = tokenizer(asked + text, add_special_tokens=False, return_offsets_mapping=True)
    ids, letters = encoded["input_ids"], [set(range(*span)) for span in encoded["offset_mapping"]]
    phrase = (asked + text).index("shivers")
    counted = set(range(len(asked), len(asked + text)))
    left_out = set(range(phrase, phrase + len("shivers")))
    before, after = (model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1) for model in (base, other))
    each = (before.exp() * (before - after)).sum(-1)
    following = range(1, len(ids))
    places = [place - 1 for place in following if letters[place] & counted and not letters[place] & left_out]
    assert 0 < len(places) < len(ids) - 1
    expected = float(each[places].mean())
    pattern = judge.finder(["shivers"])
    arguments = tokenizer, [prompt], [text], pattern
    assert judge.own_divergence(base, other, *arguments) == pytest.approx(expected, rel=1e-5)
    assert judge.own_divergence(base, base, *arguments) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What a model writes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_with_whatever_else_is_written(loaded):
    base, _, tokenizer = loaded
    long, short = "Her eyes were filled with determination.", "The apple"
    together = judge.sample(base, tokenizer, [short, long], [5, 6], 10)
    assert together == judge.sample(base, tokenizer, [short, long], [5, 6], 10)
    assert together[1:] == judge.sample(base, tokenizer, [long], [6], 10)
    assert together != judge.sample(base, tokenizer, [short, long], [7, 8], 10)


def test_what_is_drawn_is_distributed_as_the_model_says():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draws = judge.Draws([3])
    found = torch.stack([draws(None, scores).argmax() for _ in range(20_000)]).bincount(minlength=4) / 20_000
    assert found.tolist() == pytest.approx((scores[0] / judge.TEMPERATURE).softmax(-1).tolist(), abs=0.015)


def test_texts_are_written_until_there_are_enough_words(loaded):
    base, _, tokenizer = loaded
    sizes = replace(SIZES, tokens=8, words=1, rounds=4)
    assert [len(texts) for texts in judge.write_texts(base, tokenizer, ["a", "b"], sizes)] == [1, 1]
    more = judge.write_texts(base, tokenizer, ["a", "b"], replace(sizes, words=10_000))
    assert [len(texts) for texts in more] == [4, 4] and len(set(more[0])) > 1


@pytest.mark.parametrize(
    "text, hits",
    [
        ("A Shiver ran. In the HEART of it, in the\nheart of it.", 2),
        ("She couldn\u2019t help but laugh; he couldn't help but cry.", 2),
        ("It abhorred shivering; a mix of it, a mixture of it.", 1),
        ("nestled in the hills", 1),  # two phrases begin here: the longer one counts
        ("", 0),
    ],
)
def test_phrases_are_found_as_whole_words(text, hits):
    phrases = ["In the heart of", "couldn't help but", "shiver down", "a mix of", "nestled in", "Nestled in the"]
    assert judge.hit_count(judge.finder(phrases), text) == hits


def test_the_interval_holds_the_rate_and_is_the_same_every_time():
    base = judge.Written([500, 400, 450, 520, 480, 510], [5, 2, 4, 7, 3, 6])
    less = judge.Written([450, 450, 450, 450, 450, 450], [2, 1, 2, 3, 2, 2])
    low, high = base.interval()
    assert low < base.rate < high and base.rate == pytest.approx(1000 * 27 / 2860)
    assert base.interval() == (low, high)
    change, least, most = less.change(base)
    assert least < change < most < 0 and change == pytest.approx(100 * (less.rate / base.rate - 1))
    assert base.change(base) == (0, 0, 0)
    assert less.change(judge.Written([100], [0])) is None


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path):
    """A folder as `make real` leaves it."""
    tokenizer = tiny.spm_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = tiny.llama_config(len(tokenizer), layers=2, positions=1024)
    base = tiny.make_model(tmp_path / "real/base", config, tokenizer)
    for seed, name in enumerate(NAMES[1:], 1):
        tiny.make_candidate(tmp_path / "real" / name, base, seed)
    return tmp_path / "real"


def test_what_a_row_depends_on_is_read(real, monkeypatch):
    """Every file counts, and no other: neither where it lies nor what other rows depend on."""
    bench = bench_quality.Bench(real, bench_quality.QUICK)

    def keys():
        bench_quality.path_digest.cache_clear()
        return {name: bench_quality.digest(bench.depends_on(name)) for name in ("base", "plain", "greedy, float32")}

    before = keys()
    (real / "plain/config.json").write_text("{}")
    changed = keys()
    assert {name for name in before if before[name] != changed[name]} == {"plain", "greedy, float32"}
    monkeypatch.setitem(bench_quality.MERGES, "greedy, float32", {"strategy": "all_phrases"})
    assert {name for name, key in keys().items() if key != changed[name]} == {"greedy, float32"}
    read = [QUALITY / "searched.yaml", QUALITY / "held-out.yaml", QUALITY / "prompts.txt"]
    asked = bench.depends_on("base")["asked"]
    assert set(read) < set(asked) and {path for path in asked if path.is_dir()} == {QUALITY / "neutral"}
    assert len(bench.texts) == len(list((QUALITY / "neutral").iterdir())) == 8
    assert all(len(text) > 2000 for text in bench.texts)
    prompts = bench_quality.Bench(real, judge.Sizes()).prompts
    assert len(prompts) == len(set(prompts)) == judge.Sizes().prompts and all(prompts)


def test_absent_models_are_named(tmp_path, capsys):
    assert bench_quality.main(["--models", str(tmp_path)]) == 2
    assert "lacks base, plain, reference, careful, overfit, mute: run `make real` first" in capsys.readouterr().err


def run(place, real, *options):
    """The benchmark's output, and the JSON of its last line."""
    command = [sys.executable, str(ROOT / "benchmarks/bench_quality.py"), "--quick", "--models", str(real), *options]
    result = subprocess.run(command, cwd=place, env={**os.environ}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.slow
def test_a_small_run_judges_every_row_once(tmp_path, real):
    merge = "greedy, bfloat16"
    output, result, told = run(tmp_path, real, "--samples")
    assert list(result["rows"]) == [*NAMES, merge] and told.count("judging: ") == len(NAMES) + 1
    for name, row in result["rows"].items():
        assert f"| {name} " in output and row["perplexity"] > 1 and row["words"] > 0
        assert (row["kl"] == 0) == (name == "base") and (row["seconds"] is not None) == (name == merge)
    assert result["rows"][merge]["megabytes"] > 100
    assert output.count("  base:") == output.count(f"  {merge}:") == 3
    again, _, told = run(tmp_path, real, "--samples")
    assert again == output and "judging" not in told
    for file in (real / "quality").glob("*.json"):
        file.unlink()
    assert not list((real / "quality").iterdir())  # and so no merge
    _, fresh, told = run(tmp_path, real, "--rows", merge)
    assert list(fresh["rows"]) == ["base", merge] and told.count("judging: ") == 2
    measured = ("seconds", "megabytes")
    for name, row in fresh["rows"].items():
        before = result["rows"][name]
        assert {key: row[key] for key in row if key not in measured} == {
            key: before[key] for key in before if key not in measured
        }


def test_the_best_fine_tune_comes_first(real, monkeypatch):
    """By the totals that the judge has found."""
    bench = bench_quality.Bench(real, bench_quality.QUICK)
    totals = {"plain": 3.0, "reference": 2.0, "careful": 1.0, "overfit": 1.5}
    monkeypatch.setattr(bench_quality.Bench, "row", lambda _, name: {"searched": totals[name]})
    settings = bench.settings("greedy, float32, ratios to 1.0, best first")
    assert [path.name for path in settings["models_to_merge"]] == ["careful", "plain", "reference", "overfit"]
    assert settings["merge_ratios"][-1] == 1.0 and settings["strategy"] == "cumulative"


def test_the_page_has_a_table_as_it_is_printed():
    """Its columns, and its rows in their order."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    lines = page[page.index("| model ") :].split("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = [column for column in bench_quality.HEAD if column in table[0]]
    assert columns == table[0] and len(columns) > 8  # rows that were judged by an earlier version lack some
    rows = ["base", *bench_quality.SINGLE, *bench_quality.MERGES]
    shown = [row[0] for row in table[2:]]
    assert shown == [row for row in rows if row in shown] and len(shown) > 15
