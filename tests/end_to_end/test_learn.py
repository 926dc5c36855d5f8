"""Adapters that are learned from phrase lists: against PEFT, against themselves, and what can't be learned with."""

import json
import os
import shutil
import signal

import peft
import pytest
import reference
import tiny
import torch
from adapters import make_adapter
from runs import digest, log_of, make_models, tables
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
from modules.config.phrase_lists import Pair
from modules.learn import adapter
from modules.learn.steps import Learner
from modules.run import learn

TEXT = "The bread is on the table. It was baked this morning, and half of it is left for the evening. " * 20
HELD_OUT = (Pair("BAD", "unwavering", "She was filled with an"), Pair("BAD", "whisper", "barely above a "))
STEPS = 5
WRITTEN = {"README.md", "adapter_config.json", "adapter_model.safetensors", "merge_monster.yaml"}
JOURNAL = "merge_monster_journal.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))[0]


def configure(place, base, **more):
    """A file with phrases, and neither candidates nor an output."""
    (place / "plain.txt").write_text(TEXT, encoding="utf-8")
    settings = {
        "learn": {"rank": 2, "steps": STEPS, "learning_rate": 0.02, "pairs": 3},
        "neutral_texts": [str(place / "plain.txt")],
        "directories": {"model_path1": str(base)},
        **more,
    }
    return tiny.write_config(place / "my.yaml", base, [], "", **settings)


def learned(*options):
    """The program's exit code."""
    return merge_monster.main(["--config", "my.yaml", "--learn", "out", *options])


def weights_of(folder):
    """The adapter's two files, to the byte."""
    found = digest(folder)
    return found["adapter_model.safetensors"], found["adapter_config.json"]


def kept_of(place):
    """What an unfinished run has left."""
    return {path.name for path in (place / "out.partial").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """What a run has written that nobody disturbed."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        configure(place, base)
        assert learned() == 0
    return place / "out"


def gpt2(folder):
    tokenizer = tiny.bpe_tokenizer()
    return tiny.make_model(folder / "base", tiny.gpt2_config(len(tokenizer)), tokenizer)


def half(folder):
    return make_models(folder, torch.bfloat16)[0]


@pytest.mark.parametrize(
    "make", [lambda folder: make_models(folder)[0], gpt2, half], ids=["Llama", "GPT-2", "bfloat16"]
)
def test_peft_score_and_table_agree(place, make):
    """An adapter scores as the table of its run says: opened with PEFT, and as a candidate of this program."""
    base = make(place)
    configure(place, base, max_drift=0.0005, samples=["The apple"], dtype="float32")
    assert learned() == 0
    log = log_of(place)
    assert "Scaled the adapter by" in log and "  adapter: " in log and "Held out" not in log
    assert {path.name for path in (place / "out").iterdir()} == {*WRITTEN, JOURNAL}
    first, *_, last = tables(log)
    assert first[-1][4] != last[-1][4]
    shown = [float(row[3].removesuffix("%")) / 100 for row in last[:-1]]
    assert "on held-out text, above max_drift 0.0005" in log
    assert merge_monster.main(["--config", "my.yaml", "--score", "out", "--json", "scores.json"]) == 0
    phrases = json.loads((place / "scores.json").read_text())["phrases"]
    rounding = 0.01 if make is half else 1e-4  # a candidate is read in the type that its model is stored in
    assert [phrase["probabilities"]["out"] for phrase in phrases] == pytest.approx(shown, rel=rounding, abs=1e-7)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, place / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for pair, phrase in zip(tiny.PAIRS, phrases, strict=True):
        expected = torch.tensor(reference.pair_log_probability(model, tokenizer, pair)).exp()
        assert phrase["probabilities"]["out"] == pytest.approx(float(expected), rel=rounding)
    settings = json.loads((place / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base" and str(place) not in json.dumps(settings)


@pytest.mark.parametrize("search", ["greedy", "joint"])
def test_it_is_a_candidate(place, base, whole, search):
    """Of which a merge takes something: it has learned what the merge looks for."""
    configure(place, base, models_to_merge=[str(whole)], search=search, joint={"steps": 2}, merge_ratios=[1.0])
    assert merge_monster.main(["--config", "my.yaml", "--output", "merged"]) == 0
    recipe = json.loads((place / "merged" / "merge_monster_recipe.json").read_text())
    assert recipe["metrics"]["merge"]["total"] < 0.9 * recipe["metrics"]["base"]["total"]


def test_two_runs_are_equal(place, base, whole):
    configure(place, base)
    assert learned() == 0
    assert {name: digest(whole)[name] for name in WRITTEN} == {name: digest(place / "out")[name] for name in WRITTEN}


@pytest.mark.parametrize("count", range(1, STEPS + 2))
def test_a_run_goes_on_from_every_step(place, monkeypatch, base, whole, count):
    """Killed once a state was written; what is resumed ends in the same bytes."""
    configure(place, base)
    save, calls = learn.save_state, []

    def killed(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(learn, "save_state", killed)
    assert learned() == 130
    monkeypatch.undo()
    monkeypatch.chdir(place)
    if count > 1:  # before, no step was noted
        assert JOURNAL in kept_of(place) and "merge_monster_state.safetensors" in kept_of(place)
        assert learned() == 2  # neither --resume nor --restart
    assert learned("--resume") == 0
    assert weights_of(place / "out") == weights_of(whole)
    assert {path.name for path in (place / "out").iterdir()} == {*WRITTEN, JOURNAL}
    steps = [line for line in map(json.loads, (place / "out" / JOURNAL).read_text().splitlines()) if "step" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))


def test_ctrl_c_waits_for_the_end_of_a_step(place, monkeypatch, base, whole):
    configure(place, base)
    gradient = Learner.gradient

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return gradient(self)

    monkeypatch.setattr(Learner, "gradient", interrupted)
    assert learned() == 130
    assert "Step 3/5" in log_of(place) and "Step 4/5" not in log_of(place)
    monkeypatch.setattr(Learner, "gradient", gradient)
    assert learned("--resume") == 0
    assert weights_of(place / "out") == weights_of(whole)


def test_restart_forgets_and_overwrite_replaces(place, monkeypatch, base, whole):
    configure(place, base)
    monkeypatch.setattr(learn.Lesson, "_hold_limit", lambda self: 1 / 0)
    assert learned() == 1
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert learned("--resume", "--set", "learn.rank=1") == 2
    assert learned("--restart") == 0
    assert weights_of(place / "out") == weights_of(whole)
    assert learned() == 2  # it is there already
    assert learned("--overwrite", "--set", "learn.rank=1") == 0
    assert weights_of(place / "out") != weights_of(whole)


def test_held_out_pairs_have_no_part(place, base, whole):
    """Whatever is held out, the same is learned."""
    (place / "aside.yaml").write_text(
        json.dumps({"bad_phrases": tiny.phrase_entries(HELD_OUT, "BAD")}), encoding="utf-8"
    )
    configure(place, base, held_out_files=[str(place / "aside.yaml")])
    assert learned() == 0
    assert weights_of(place / "out") == weights_of(whole)
    assert "Held out" in (place / "out" / "README.md").read_text()


def test_a_loss_that_is_no_number_undoes_a_step(place, monkeypatch, base):
    """Once; what it has led to is found out before the next step, by a run that goes on as well."""
    configure(place, base)
    move = Learner.move

    def broken(self, gradient):
        move(self, gradient)
        if self.step == 2 and self.halvings == 0:
            next(iter(self.objective.adapter.weights.values())).data.fill_(float("inf"))

    monkeypatch.setattr(Learner, "move", broken)
    assert learned() == 0
    assert "WARNING: the loss was NaN after step 2; undid it" in log_of(place)
    first = weights_of(place / "out")
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(place / "out/adapter_model.safetensors").values())
    shutil.rmtree(place / "out")
    save, calls = learn.save_state, []

    def killed(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(learn, "save_state", killed)
    assert learned() == 130
    monkeypatch.setattr(learn, "save_state", save)
    assert learned("--resume") == 0
    assert weights_of(place / "out") == first


def test_a_loss_that_is_never_a_number_ends_the_run(place, monkeypatch, base, capsys):
    configure(place, base)
    monkeypatch.setattr(learn, "_are_numbers", lambda gradient, loss: False)
    assert learned() == 2
    assert "NaN or infinite" in capsys.readouterr().err


def test_a_lack_of_memory_takes_fewer_pairs_at_a_time(place, monkeypatch, base, whole):
    """The same sum: what is learned differs by rounding alone."""
    configure(place, base)
    add = learn.LearningObjective._add_pairs

    def short(self, *arguments):
        if self.budget.tokens > 32:
            raise torch.OutOfMemoryError("no memory here")
        return add(self, *arguments)

    monkeypatch.setattr(learn.LearningObjective, "_add_pairs", short)
    assert learned() == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (place / "out", whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_dry_run_says_what_it_takes(place, base):
    configure(place, base)
    assert learned("--dry-run") == 0
    log = log_of(place)
    assert "Memory needed" in log and "per step" in log and not (place / "out").exists()
    assert not (place / "out.partial").exists()


def refused(capsys, words, *options):
    """One line says what is wrong, and nothing is left."""
    assert learned(*options) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert not os.path.exists("out") and not os.path.exists("out.partial")


def test_what_can_not_be_learned_with(place, monkeypatch, base, capsys):
    configure(place, base, pairs=())
    refused(capsys, "both are empty")
    configure(place, base, held_out=0.99)
    refused(capsys, "above the smallest dimension of the base's layers: ", "--set", "learn.rank=33")
    refused(capsys, "--learn measures drift unless", "--set", "neutral_texts=[]")
    (place / "plain.txt").write_text("a", encoding="utf-8")
    refused(capsys, "too little text")
    monkeypatch.setattr(adapter, "_is_taken", lambda *_: False)
    refused(capsys, "PEFT can adapt none of its layers")


def test_all_held_out(place, base, capsys):
    contexts = [{"context": pair.context, "held_out": True} for pair in tiny.PAIRS[:2]]
    configure(place, base, pairs=(), bad_phrases=[{"phrase": "anticipation", "contexts": contexts}])
    refused(capsys, "held out")


def test_bases_that_can_not_be_learned_with(place, base, capsys):
    quantised = place / "quantised"
    shutil.copytree(base, quantised)
    tiny.edit_checkpoint(quantised, quantization_config={"quant_method": "gptq", "bits": 4})
    configure(place, quantised)
    refused(capsys, "quant")
    other, _ = make_adapter(place, base)
    configure(place, other)
    refused(capsys, "this is an adapter")


def test_without_drift(place, base):
    """Nothing is measured, and no text is needed."""
    configure(place, base, drift_weight=0, neutral_texts=[])
    assert learned() == 0
    assert "KL" not in log_of(place).split("Step 1/5")[1].splitlines()[0]


@pytest.mark.parametrize(
    "options", [["--json", "file"], ["--output", "other"], ["--score", "model"], ["--replay", "x"]]
)
def test_options_that_do_not_go_with_it(place, base, options, capsys):
    configure(place, base)
    with pytest.raises(SystemExit) as end:
        learned(*options)
    assert end.value.code == 2
