"""Every architecture of the documentation's table: the whole program against the naive merge, and what it saved."""

import re

import architectures
import pytest
import reference
import tiny
import torch
import whole
from project import ROOT

pytestmark = pytest.mark.sampled(5)
CANDIDATES = {"one": 5, "two": 6}  # and their seeds


@pytest.fixture(scope="module")
def merged(tmp_path_factory, asked):
    """The architectures, merged by the program; the outputs reopened together in one other process."""
    place = tmp_path_factory.mktemp("architectures")
    names = [name for name in architectures.ARCHITECTURES if name in asked]
    runs = {name: run(place / str(number), name) for number, name in enumerate(names)}
    whole.reopen(runs.values())
    return runs


def run(folder, name):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", architectures.configuration(name, len(tokenizer)), tokenizer)
    return whole.run(
        folder, base, [tiny.make_candidate(folder / name, base, seed) for name, seed in CANDIDATES.items()]
    )


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_run_decides_as_the_naive_merge(merged, name):
    one = merged[name]
    assert one.code == 0, one.output
    folders = [one.folder / name for name in CANDIDATES]
    naive = reference.NaiveMerge(
        one.folder / "base", folders, tiny.PAIRS, whole.RATIOS, ["lerp"], auto_weights=True
    ).run()
    assert len(one.decisions) == len(naive.decisions) == 6
    for (_, changed, total), expected in zip(one.decisions, naive.decisions, strict=True):
        assert changed == (expected.ratio is not None)
        assert total == pytest.approx(expected.after, rel=1e-4, abs=1e-4)
    ratios = [
        shares[-1] if changed else None for shares, (_, changed, _) in zip(one.weights, one.decisions, strict=True)
    ]
    assert ratios == [decision.ratio for decision in naive.decisions]
    assert any(changed for _, changed, _ in one.decisions), "nothing was merged: the test shows nothing"
    weights = naive.model.state_dict()
    for key, tensor in reference.load(one.folder / "out", torch.float32).state_dict().items():
        assert torch.allclose(tensor, weights[key], atol=1e-6), key


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_what_was_scored_is_what_was_saved(merged, name):
    whole.check_reopened(merged[name])


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_output_has_the_bases_tensors(merged, name):
    whole.check_stored(merged[name])


def told_layouts():
    """Of the table of docs/internals.md: the layout of each architecture that it names."""
    page = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (forest|rows|single) \| (.*) \|$", page, re.MULTILINE)
    return {name: layout for layout, names in rows for name in names.split(" · ")}


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_page_tells_the_architectures_layout(merged, name):
    assert told_layouts()[name] == merged[name].layout


def test_the_page_names_no_other_architecture():
    assert set(told_layouts()) == set(architectures.ARCHITECTURES)
