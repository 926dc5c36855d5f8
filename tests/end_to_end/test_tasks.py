"""Tasks of lm_eval: what base and merge score on thirty questions, where it is shown; what there is without lm_eval."""

import json
import sys

import pytest
import torch
from runs import log_of, merge, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_monster
from modules.run import tasks

QUESTIONS = [
    {"question": f"The {word} is in the", "choices": ["bedroom", "kitchen"], "answer": number % 2}
    for number, word in enumerate(f"{adjective} {noun}" for adjective in "ab" for noun in "pqrstuvwxyzabcd")
]
TASK = """
task: thirty
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
NAMES = ["thirty acc", "thirty acc stderr"]


@pytest.fixture
def eval_path(place, monkeypatch):
    """A folder with the task, and caches of the test's own."""
    pytest.importorskip("lm_eval")
    folder = place / "tasks"
    folder.mkdir()
    (folder / "thirty.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (folder / "thirty.yaml").write_text(TASK.format(file=folder / "thirty.jsonl"), encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    return str(folder)


def accuracy(folder):
    """The share of the questions to which the right answer is the more probable one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            before = tokenizer(question["question"])["input_ids"]
            tokens = tokenizer(f"{question['question']} {choice}")["input_ids"]
            with torch.no_grad():
                said = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            scores.append(sum(float(said[place - 1, tokens[place]]) for place in range(len(before), len(tokens))))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


def test_thirty_questions(place, models, eval_path, capsys):
    base, *_ = models
    settings = {"eval": ["thirty"], "eval_path": eval_path, "merge_ratios": [1.0]}
    assert merge(place, models, **settings) == 0
    recipe = json.loads((place / "out/merge_monster_recipe.json").read_text(encoding="utf-8"))
    for name, folder in (("base", base), ("merge", place / "out")):
        right = accuracy(folder)
        assert recipe["metrics"][name]["thirty acc"] == pytest.approx(right)
        error = (right * (1 - right) / 29) ** 0.5
        assert recipe["metrics"][name]["thirty acc stderr"] == pytest.approx(error)
    card, log = (place / "out/README.md").read_text(encoding="utf-8"), log_of(place)
    settings_file = (place / "out/merge_monster.yaml").read_text(encoding="utf-8")
    assert str(place) not in card + settings_file and "eval_path: tasks" in settings_file
    assert merge_monster.main(["--compare", str(place / "out")]) == 0
    compared = capsys.readouterr().out
    assert all(name in text for name in NAMES for text in (card, compared))
    assert "Scoring the base on thirty" in log and "Scoring the merge on thirty" in log


def test_a_run_that_goes_on_does_not_score_the_base_again(place, models, eval_path, monkeypatch):
    settings = {"eval": ["thirty"], "eval_path": eval_path, "merge_ratios": [1.0]}
    with monkeypatch.context() as patch:
        patch.setattr("modules.run.merge.show_results", lambda *_: 1 / 0)
        assert merge(place, models, **settings) == 1
    assert merge(place, models, "--resume", **settings) == 0
    assert "Scoring the base on" not in log_of(place) and "Scoring the merge on" in log_of(place)
    recipe = json.loads((place / "out/merge_monster_recipe.json").read_text(encoding="utf-8"))
    assert set(NAMES) <= recipe["metrics"]["base"].keys() & recipe["metrics"]["merge"].keys()


def test_a_task_that_there_is_not(place, models, eval_path, capsys):
    refused(place, models, capsys, "lm_eval has no task nosuch, nor", eval=["thirty", "nosuch"], eval_path=eval_path)


def test_a_task_that_can_not_be_run(place, models, eval_path):
    """Is no reason to lose a merge."""
    (place / "tasks/thirty.jsonl").unlink()
    assert merge(place, models, eval=["thirty"], eval_path=eval_path, merge_ratios=[1.0]) == 0
    assert "WARNING: eval: thirty can't be run: " in log_of(place)


def test_without_the_package(place, models, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(place, models, capsys, "the package lm_eval is not installed: pip install lm-eval", eval=["thirty"])


def test_results_by_their_names():
    results = {
        "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact,strict": 1, "f1_stderr,none": "N/A"}
    }
    values = {"one acc": 0.5, "one acc stderr": 0.1, "one exact (strict)": 1.0}
    assert tasks._values(results) == values
