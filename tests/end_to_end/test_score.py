"""Models that are scored and not merged: against plain transformers, against what a merge says of the same models."""

import json
import math

import peft
import pytest
import reference
import tiny
import torch
from adapters import make_adapter
from runs import log_of, make_models, merge
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
from modules.config.load import load_config
from modules.config.phrase_lists import Pair
from modules.metrics import evaluator
from modules.output.recipe import RECIPE_FILE
from modules.runtime.text import brief_percent
from modules.scoring.scorer import Scorer
from modules.scoring.tokenization import neutral_windows

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. " * 6
CONTEXTS = ("Her body quivers with ", "The air was thick with ", "Filled with ", "It was all about ")
PAIRS = [*(Pair("BAD", "anticipation", context, 2.0) for context in CONTEXTS), tiny.PAIRS[-1]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def configure(place, base, **more):
    """A file with phrases, some of them held out, and neither candidates nor an output."""
    (place / "plain.txt").write_text(TEXT, encoding="utf-8")
    settings = {
        "pairs": PAIRS,
        "held_out": 0.5,
        "neutral_texts": [str(place / "plain.txt")],
        "directories": {"model_path1": str(base)},
        **more,
    }
    return tiny.write_config(place / "my.yaml", base, [], "", **settings)


def score(*models, options=()):
    """The program's exit code."""
    return merge_monster.main(["--config", "my.yaml", "--score", *map(str, models), *options])


def found_in(place, *models, options=()):
    """The JSON of a scoring: what is said of each model, and the phrases."""
    assert score(*models, options=["--json", "scores.json", "--overwrite", *options]) == 0
    found = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    return found["models"], found["phrases"]


def plain(folder, base):
    """By plain transformers: the pairs' probabilities by their contexts, and how far the model is from the base."""
    naive = reference.NaiveMerge(str(base), [], PAIRS, [0.5], ["lerp"])
    naive.tokenizer = AutoTokenizer.from_pretrained(base)
    model, other = (AutoModelForCausalLM.from_pretrained(one).float().eval() for one in (base, folder))
    windows, _ = neutral_windows(naive.tokenizer, [TEXT], len(naive.tokenizer), 256)
    probabilities = [math.exp(value) for value in naive.log_probabilities(other)]
    return (
        dict(zip([pair.context for pair in PAIRS], probabilities, strict=True)),
        reference.plain_drift(model, other, windows),
    )


def table(log):
    """The rows of the table of models: lists of cells."""
    lines = log.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| Model"))
    end = next(number for number in range(first + 2, len(lines)) if lines[number].startswith("---"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[first], *lines[first + 2 : end])]


@pytest.mark.parametrize("auto_weights", [False, True])
def test_scores_are_those_of_plain_transformers(place, models, auto_weights):
    configure(place, models[0], auto_weights=auto_weights)
    found, phrases = found_in(place, *models[1:])
    assert [one["name"] for one in found] == ["base", "one", "two"]
    assert [one["where"] for one in found] == [folder.name for folder in models]
    assert sum(phrase["held_out"] for phrase in phrases) == 2 and len(phrases) == 5
    first = plain(models[0], models[0])[0]
    for one, folder in zip(found, models, strict=True):
        probabilities, (divergence, agreement, perplexity) = plain(folder, models[0])
        totals = {False: 0.0, True: 0.0}
        for phrase in phrases:
            expected = probabilities[phrase["context"]]
            assert phrase["probabilities"][one["name"]] == pytest.approx(expected, rel=1e-3)
            weight = 1 / first[phrase["context"]] if auto_weights else {"BAD": 2.0, "GOOD": 3.0}[phrase["kind"]]
            assert phrase["weight"] == pytest.approx(weight, rel=1e-3)
            totals[phrase["held_out"]] += expected * weight * (1 if phrase["kind"] == "BAD" else -1)
        metrics = one["metrics"]
        assert [metrics["total"], metrics["held_out"]] == pytest.approx([totals[False], totals[True]], rel=1e-3)
        assert metrics["kl"] == pytest.approx(divergence, rel=1e-4, abs=1e-8)
        assert [metrics["top1"], metrics["perplexity"]] == pytest.approx([agreement, perplexity], rel=1e-4)
    assert found[0]["metrics"]["kl"] < 1e-6 < 1e-3 < found[1]["metrics"]["kl"]


@pytest.mark.parametrize("search", ["greedy", "joint"])
def test_a_merge_says_the_same_of_them(place, models, search):
    """In its table of models, to the last digit; a joint one has KL in trials beside it."""
    more = {"search": search, "joint": {"steps": 1}, "merge_ratios": [0.5], "baselines": True}
    configure(place, models[0], **more)
    found, phrases = found_in(place, *models[1:])
    scored = table(log_of(place))
    settings = {"pairs": PAIRS, "held_out": 0.5, "neutral_texts": [str(place / "plain.txt")], **more}
    assert merge(place, models, **settings) == 0
    merged = table(log_of(place))
    assert scored == [row[:6] for row in merged[:-1]] and len(scored) == 4 and len(scored[0]) == 6
    recipe = json.loads((place / "out" / RECIPE_FILE).read_text(encoding="utf-8"))
    for one, other in zip(found[1:], recipe["baselines"].values(), strict=True):
        assert one["metrics"] == {name: value for name, value in other.items() if name != "trial_kl"}
    before = {phrase["context"]: phrase["before"] for phrase in recipe["phrases"]}
    assert before == {p["context"]: p["probabilities"]["base"] for p in phrases if not p["held_out"]}


def test_the_phrases_stand_beneath_with_every_models_probability(place, models):
    configure(place, models[0])
    _, phrases = found_in(place, *models[1:])
    lines = log_of(place).splitlines()
    [header] = [line for line in lines if line.startswith("| Type")]
    assert header.replace(" ", "") == "|Type|Phrase|Context|base|one|two|"
    shown = [line.strip("|").split("|") for line in lines if line.startswith(("| BAD", "| GOOD"))]
    for cells, phrase in zip(shown, phrases, strict=True):
        assert [cell.strip() for cell in cells[3:]] == list(map(brief_percent, phrase["probabilities"].values()))
    end = next(number for number, line in enumerate(lines) if line.endswith("held out: the last 2 rows"))
    assert [line.startswith("| ") for line in lines[end - 5 : end]] == [True, False, True, True, False]


def test_nothing_is_written_but_the_log_and_what_is_asked_for(place, models, capsys):
    """The file's own candidates and output have no part in it, whether they are there or not."""
    directories = {"model_path1": str(models[0]), "output_directory": "out", "model_directory": "nowhere"}
    configure(place, models[0], directories=directories, models_to_merge=["not-here"], held_out=0, neutral_texts=[])
    assert score(models[1], options=["--set", "bad_phrases=[]", "--quiet"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert {path.name for path in place.iterdir()} == {"my.yaml", "plain.txt", "logs"}
    assert [cells[:1] + cells[2:] for cells in table(log_of(place))] == [["Model"], ["base (base)"], ["one"]]


def test_an_adapter_scores_as_the_model_that_it_makes(place, models):
    adapter, whole = make_adapter(place, models[0])
    configure(place, models[0])
    found, _ = found_in(place, adapter, whole, f"{models[0]}+{adapter}", f"{models[1]}+{adapter}")
    keys = ("total", "held_out")
    found = [one["metrics"] for one in found]
    drifts = [metrics["kl"] for metrics in found]
    for one, drift in zip((found[1], found[3]), (drifts[1], drifts[3]), strict=True):
        assert [one[key] for key in keys] == pytest.approx([found[2][key] for key in keys], rel=1e-4)
        assert drift == pytest.approx(drifts[2], rel=1e-3)
    assert abs(found[4]["total"] - found[1]["total"]) > 1e-4


def test_it_computes_in_half_precision_too(place, models):
    configure(place, models[0], compute_dtype="bfloat16")
    found, _ = found_in(place, models[1])
    assert "Dtype            : bfloat16" in log_of(place) and found[1]["metrics"]["kl"] > 1e-3


def test_other_tokens_are_matched_or_told(place, models):
    other = tiny.make_candidate(place / "other", models[0], 3)
    tiny.change_vocabulary(other, tiny.bpe_tokenizer(extra=["<more>"]))
    strange = tiny.make_candidate(place / "strange", models[0], 4)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    names = {token: f"{token}~" for token in tokenizer.get_vocab()}
    tiny.rewritten_tokenizer(tokenizer, names=names).save_pretrained(strange)
    configure(place, models[0])
    assert score(other, strange) == 0
    log = log_of(place)
    assert "Embedding and LM head: " in log and "scoring it with the base's embedding and LM head" in log


def broken(place, models):
    folder = tiny.make_candidate(place / "broken", models[0], seed=4)
    name = "model.layers.1.mlp.up_proj.weight"
    tiny.edit_checkpoint(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")))
    return folder


def test_a_damaged_model_ends_it_or_has_no_row(place, models, capsys):
    folder = broken(place, models)
    configure(place, models[0])
    assert score(folder, models[1]) == 1
    assert "broken can't be scored: broken: model.layers.1.mlp.up_proj.weight holds NaN" in capsys.readouterr().err
    assert score(folder, models[1], options=["--set", "on_error=skip"]) == 0
    assert [cells[0] for cells in table(log_of(place))] == ["Model", "base (base)", "one"]
    assert "it is left out" in log_of(place)


def test_where_memory_is_short_less_is_held_at_a_time(place, models, monkeypatch, capsys):
    configure(place, models[0])
    expected, _ = found_in(place, models[1])
    own, tries = evaluator.score_whole, []

    def short(*arguments):
        tries.append(1)
        if len(tries) < lacking:
            raise torch.OutOfMemoryError("no more")
        return own(*arguments)

    monkeypatch.setattr(evaluator, "score_whole", short)
    lacking = 3
    found, _ = found_in(place, models[1])
    assert found[1]["metrics"]["total"] == pytest.approx(expected[1]["metrics"]["total"], rel=1e-4) and len(tries) == 3
    assert log_of(place).count("Out of memory: ") == 2
    lacking = 1000
    assert score(models[1]) == 1 and "one can't be scored: not enough memory" in capsys.readouterr().err


def test_a_base_that_takes_more_than_hidden_states_is_refused(place, models, monkeypatch, capsys):
    configure(place, models[0])
    monkeypatch.setattr(Scorer, "has_tails", property(lambda self: False, lambda *_: None), raising=False)
    assert score(models[1]) == 2 and "can't be computed layer by layer" in capsys.readouterr().err


def test_what_can_not_be_scored_is_refused(place, models, capsys):
    configure(place, models[0])
    small = tiny.make_model(place / "small", tiny.llama_config(300, layers=2), tiny.bpe_tokenizer())
    (place / "there.json").write_text("mine")
    wrong = {
        "--score[1]: 'nowhere': no such folder": (models[1], "nowhere"),
        "is the base model": (models[0],),
        "small": (small,),
    }
    for words, named in wrong.items():
        assert score(*named) == 2
        told = capsys.readouterr().err
        assert words in told and "Traceback" not in told
    for words, options in {
        "this file exists": ["--json", "there.json"],
        "its folder does not exist": ["--json", "no/x.json"],
        ", which lies in the input ": ["--json", str(models[1] / "x.json")],
    }.items():
        assert score(models[1], options=options) == 2 and words in capsys.readouterr().err
    assert (place / "there.json").read_text() == "mine" and not (models[1] / "x.json").exists()


def test_it_runs_in_one_process(place, models, capsys, monkeypatch):
    configure(place, models[0])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert score(models[1]) == 2 and "--score runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "x"],
        ["--resume"],
        ["--restart"],
        ["--replay", "x"],
        ["--dry-run"],
        ["--overwrite"],
        ["--table", "summary"],
        ["--compare", "x"],
    ],
)
def test_options_that_do_not_go_with_it(options, capsys):
    with pytest.raises(SystemExit) as caught:
        merge_monster.main(["--score", "x", *options])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and ("--score" in told or "--compare" in told)


def test_json_goes_with_it_alone(capsys):
    with pytest.raises(SystemExit):
        merge_monster.main(["--json", "x"])
    assert "--json needs --score" in capsys.readouterr().err


def test_phrases_are_held_out_as_in_a_merge(place, models):
    path = configure(place, models[0])
    scored = load_config(path, scored=[str(models[1])])
    assert scored.models_to_merge == (str(models[1]),) and len(scored.held_out_pairs) == 2
    assert len(load_config(path, mapping=True).pairs) == len(PAIRS)


def test_an_adapter_that_changes_one_half_of_a_tied_pair_is_scored_as_peft_runs_it(place, tmp_path, capsys):
    base, _, _ = make_models(tmp_path, tied=True)
    adapter, _ = make_adapter(place, base, target_modules=["embed_tokens"])
    configure(place, base, pairs=list(tiny.PAIRS[:2]), held_out=0.0, neutral_texts=[])
    _, phrases = found_in(place, adapter)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = [math.exp(reference.pair_log_probability(model, tokenizer, pair)) for pair in tiny.PAIRS[:2]]
    assert [entry["probabilities"]["adapter"] for entry in phrases] == pytest.approx(expected, rel=1e-3)
    assert merge(place, (base, adapter), pairs=tiny.PAIRS[:2]) == 0
    assert "so adapter's own LM head is ignored" in log_of(place)


def test_each_model_is_scored_by_its_own_settings(place, tmp_path, monkeypatch):
    """A rotary scaling of its own, say; where that can't be done, the row says by whose. A merge takes its weights over
    and keeps the base's settings, and its rows say so."""
    base, one, _ = make_models(tmp_path)
    tiny.edit_checkpoint(one, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    configure(place, base, pairs=PAIRS, held_out=0.0)
    rows, phrases = found_in(place, one)
    expected, (divergence, *_) = plain(one, base)
    found = {phrase["context"]: phrase["probabilities"]["one"] for phrase in phrases}
    assert found == pytest.approx(expected, rel=1e-3)
    assert rows[1]["metrics"]["kl"] == pytest.approx(divergence, rel=1e-3)
    label = "one (scored with the base's settings)"
    assert label not in log_of(place)
    monkeypatch.setattr("modules.run.score.settings_of", lambda *_: None)
    others, _ = found_in(place, one)
    assert [row["settings"] for row in (rows[1], others[1])] == ["own", "base"]
    assert log_of(place).count(label) == 1
    assert merge(place, (base, one), baselines=True, pairs=PAIRS) == 0
    assert label in log_of(place)
