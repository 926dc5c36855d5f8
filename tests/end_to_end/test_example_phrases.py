"""The phrase lists that come with the program: each loads, each runs."""

import pytest
import tiny
import yaml
from project import ROOT

import merge_monster
from modules.config import load_config

LISTS = sorted((ROOT / "example_phrases").glob("*.yaml"))


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
    assert f"Phrases loaded   : {len(pairs)} (" in output and "Merge composition" in output


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
