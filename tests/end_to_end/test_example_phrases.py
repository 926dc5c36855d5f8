"""The phrase lists that come with the program: each loads, each runs, and what a real model says in it comes first."""

import math
import re
import shlex

import pytest
import tiny
import yaml
from project import ROOT
from transformers import AutoTokenizer

import merge_monster
import monster_mapper
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.load import load_config
from modules.model.loading import load_model
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs

FOLDER = ROOT / "example_phrases"
LISTS = sorted(FOLDER.glob("*.yaml"))
GUIDE = (FOLDER / "README.md").read_text(encoding="utf-8")
REAL = ROOT / "demo/real/base"
TRIED = "# Tried: SmolLM2-135M-Instruct."
SAID = "  # Said with 1 % or more, the likeliest first\n"
BELOW = f"  {TRIED} What follows reached 1 % in no model tried; larger models say other things.\n"
NOTHING = f"{TRIED} Nothing here reached 1 % in any model tried; larger models say other things.\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny.spm_tokenizer()
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer), layers=2, positions=1024), tokenizer)
    return base, tiny.make_candidate(folder / "other", base)


def write_config(place, models, lists):
    """A configuration whose phrases all come from the lists."""
    base, other = models
    settings = {
        "device": "cpu",
        "directories": {"model_path1": str(base), "output_directory": str(place / "out")},
        "models_to_merge": [str(other)],
        "merge_ratios": [0.5],
        "auto_weights": True,
        "phrase_files": [str(file) for file in lists],
    }
    (place / "my.yaml").write_text(yaml.safe_dump(settings))
    return place / "my.yaml"


def test_there_are_enough():
    assert len(LISTS) >= 6


@pytest.mark.sampled(3)
@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_a_list_runs(place, models, capsys, file):
    config = write_config(place, models, [file])
    pairs = load_config(config).pairs
    assert 20 <= len(pairs) <= 60
    assert merge_monster.main(["--config", str(config)]) == 0
    output = capsys.readouterr().out
    assert f": {len(pairs)} searched (" in output and "Merge composition" in output


def test_no_pair_is_in_two_lists(place, models):
    pairs = load_config(write_config(place, models, LISTS)).pairs
    assert len({(pair.phrase, pair.context) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_contexts_say_enough_and_meet_their_phrases(place, models, file):
    """Words enough to make the phrase likely, and exactly one space, or a newline, between the two."""
    pairs = load_config(write_config(place, models, [file])).pairs
    assert sum(len(pair.context.split()) >= 8 for pair in pairs) > 0.8 * len(pairs)
    for pair in pairs:
        assert not pair.phrase.startswith(" ") and not pair.context.endswith("  ")
        assert pair.context[-1] in " \n" or not pair.phrase[0].isalnum()


# ---------------------------------------------------------------------------------------------------------------------
# Their order
# ---------------------------------------------------------------------------------------------------------------------


def parts(file):
    """The phrases of a list that a real model is said to say, and those that follow, with their contexts."""
    text = file.read_text(encoding="utf-8")
    [entries] = yaml.safe_load(text).values()
    first = text.partition(BELOW)[0].count("- phrase:") if BELOW in text else 0
    phrases = [(entry["phrase"], entry["contexts"]) for entry in entries]
    return phrases[:first], phrases[first:]


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_a_list_says_what_a_real_model_says_of_it(file):
    """Once: between the two parts, or in its head that there is but one."""
    text = file.read_text(encoding="utf-8")
    head = text.split("_phrases:\n")[0]
    said, rest = parts(file)
    assert text.count(TRIED) == 1 and rest
    assert bool(said) == (BELOW in text) == (SAID in text) != (NOTHING in head)


@pytest.fixture(scope="module")
def probabilities(tmp_path_factory):
    """Of each phrase in each context of the lists, in the real model."""
    if not REAL.is_dir():
        pytest.skip("make real makes the model")
    config = write_config(tmp_path_factory.mktemp("real"), (REAL, REAL), LISTS)
    pairs = load_config(config).pairs
    model = load_model(open_checkpoint(REAL, "base"), "cpu", "float32")
    encoded = encode_pairs(AutoTokenizer.from_pretrained(REAL), pairs, model.vocabulary, model.max_tokens)
    scores = build_scorer(model, encoded).score()
    return {(pair.phrase, pair.context): math.exp(score) for pair, score in zip(pairs, scores, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_what_a_real_model_says_comes_first(probabilities, file):
    said, rest = (
        [[probabilities[phrase, context] for context in contexts] for phrase, contexts in part] for part in parts(file)
    )
    assert all(found[0] == max(found) >= 0.01 for found in said)
    assert said == sorted(said, key=max, reverse=True)
    assert all(max(found) < 0.01 for found in rest)


# ---------------------------------------------------------------------------------------------------------------------
# The page beside them
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_tells_of_every_file_and_of_no_other():
    names = set(re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", GUIDE))
    assert all((FOLDER / name).exists() for name in names)
    assert {path.name for path in FOLDER.iterdir()} - {"README.md"} == {
        name.split("/")[0] for name in names if not name.startswith("..")
    }


def test_the_page_has_the_number_of_pairs():
    rows = re.findall(r"^\| \[[^]]+\]\((\S+\.yaml)\) \| (\d+) \| (\d+) \|", GUIDE, re.MULTILINE)
    assert [FOLDER / name for name, _, _ in rows] == LISTS
    for name, _, number in rows:
        said, rest = parts(FOLDER / name)
        assert int(number) == sum(len(contexts) for _, contexts in [*said, *rest])


@pytest.mark.slow
def test_the_page_has_the_number_of_pairs_that_a_real_model_says(probabilities):
    for name, number in re.findall(r"^\| \[[^]]+\]\((\S+\.yaml)\) \| (\d+) \|", GUIDE, re.MULTILINE):
        said = [(phrase, context) for phrase, contexts in parts(FOLDER / name)[0] for context in contexts]
        assert int(number) == sum(probabilities[pair] >= 0.01 for pair in said)


def test_the_commands_of_the_page_can_be_given():
    commands = [shlex.split(line) for line in GUIDE.splitlines() if line.startswith("    ") and "python " in line]
    assert commands and all(words[:2] == ["python", "monster_mapper.py"] for words in commands)
    assert any(monster_mapper.parse_arguments(words[2:]).discover for words in commands)


def test_the_list_of_a_model_is_as_discover_writes_it():
    lists = yaml.safe_load((FOLDER / "models/smollm2-135m-instruct.yaml").read_text(encoding="utf-8"))
    assert list(lists) == ["bad_phrases"] and len(lists["bad_phrases"]) == 30
    contexts = [context for entry in lists["bad_phrases"] for context in entry["contexts"]]
    assert len(contexts) == 174 and all(len(context["messages"]) == 1 for context in contexts)
    assert sum(context.get("held_out", False) for context in contexts) == 86
    asked = set((FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines())
    for entry in lists["bad_phrases"]:
        prompts = {context["messages"][0]["content"] for context in entry["contexts"]}
        assert len(prompts) >= 3 and prompts <= asked
