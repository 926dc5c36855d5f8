"""Every architecture of the README's table: the whole program against the naive merge, and what it saved."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import architectures
import pytest
import reference
import tiny
import torch
from safetensors import safe_open

import merge_monster

ROOT = Path(__file__).parents[1]
RATIOS = [0.3, 0.7]
CANDIDATES = {"one": 5, "two": 6}  # and their seeds

# In a process of its own, which knows nothing of the run: the pairs' log-probabilities, then whether it generates.
REOPEN = """
import json, sys
from transformers import AutoTokenizer, logging
import reference, tiny
logging.set_verbosity_error()
found = {}
for folder in sys.argv[1:]:
    model, tokenizer = reference.load(folder, "auto"), AutoTokenizer.from_pretrained(folder)
    scores = [reference.log_probability(model, tokenizer, p.context, p.phrase) for p in tiny.PAIRS]
    ids = tokenizer("The apple", return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=1).shape[1]
    found[folder] = [scores, new - ids.shape[1]]
print(json.dumps(found))
"""


@dataclass
class Merged:
    """What one run left behind."""

    folder: Path
    code: int
    output: str
    reopened: list

    @property
    def layout(self):
        return re.search(r"Phrase layout +: (\w+)", self.output)[1]

    @property
    def decisions(self):
        """(what was decided on, whether it changed, total afterwards) of every decision."""
        pattern = r" - (Layer \d/\d|Header) - (CHANGED|RETAINED) - (?:\S+ > )?(-?[\d.]+)"
        return [(what, kind == "CHANGED", float(total)) for what, kind, total in re.findall(pattern, self.output)]

    @property
    def shares(self):
        """The composition behind every decision, as printed."""
        return [
            [float(share) for share in re.findall(r"\[([\d.]+), '", line)]
            for line in self.output.splitlines()
            if line.startswith("[[")
        ]

    @property
    def last_table(self):
        """Raw probabilities in percent."""
        rows = [
            line for line in self.output.rsplit("| Type |", 1)[1].splitlines() if line.startswith(("| BAD", "| GOOD"))
        ]
        return [float(row.split("|")[4].strip(" %")) for row in rows]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """All architectures, merged by the program; the outputs reopened together in one other process."""
    place = tmp_path_factory.mktemp("architectures")
    runs = {name: run(place / str(number), name) for number, name in enumerate(architectures.ARCHITECTURES)}
    outputs = [str(run.folder / "out") for run in runs.values() if run.code == 0]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", REOPEN, *outputs]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for one in runs.values():
        one.reopened = found[str(one.folder / "out")] if one.code == 0 else []
    return runs


def run(folder, name):
    tokenizer = tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", architectures.configuration(name, len(tokenizer)), tokenizer)
    candidates = [tiny.make_candidate(folder / name, base, seed) for name, seed in CANDIDATES.items()]
    settings = {"merge_ratios": RATIOS, "auto_weights": True}
    config = tiny.write_config(folder / "my.yaml", base, candidates, folder / "out", **settings)
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.chdir(folder)
        code = merge_monster.main(["--config", str(config)])
    return Merged(folder, code, output.getvalue(), [])


def stored(folder):
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                view = shard.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    return found


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_run_decides_as_the_naive_merge(merged, name):
    one = merged[name]
    assert one.code == 0, one.output
    folders = [one.folder / name for name in CANDIDATES]
    naive = reference.NaiveMerge(one.folder / "base", folders, tiny.PAIRS, RATIOS, ["lerp"], auto_weights=True).run()
    assert len(one.decisions) == len(naive.decisions) == 6
    for (_, changed, total), expected in zip(one.decisions, naive.decisions, strict=True):
        assert changed == (expected.ratio is not None)
        assert total == pytest.approx(expected.after, rel=1e-4, abs=1e-4)
    ratios = [
        shares[-1] if changed else None for shares, (_, changed, _) in zip(one.shares, one.decisions, strict=True)
    ]
    assert ratios == [decision.ratio for decision in naive.decisions]
    assert any(changed for _, changed, _ in one.decisions), "nothing was merged: the test shows nothing"
    weights = naive.model.state_dict()
    for key, tensor in reference.load(one.folder / "out", torch.float32).state_dict().items():
        assert torch.allclose(tensor, weights[key], atol=1e-6), key


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_what_was_scored_is_what_was_saved(merged, name):
    scores, new_tokens = merged[name].reopened
    percent = [100 * torch.tensor(score).exp().item() for score in scores]
    assert merged[name].last_table == pytest.approx(percent, rel=1e-3, abs=1e-5)
    assert new_tokens == 3


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_output_has_the_bases_tensors(merged, name):
    base = stored(merged[name].folder / "base")
    assert base
    assert stored(merged[name].folder / "out") == base


def test_the_readme_tells_each_architectures_layout(merged):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {}
    for line in readme.splitlines():
        row = re.fullmatch(r"\| (forest|rows|single) \| (.*) \|", line)
        if row:
            told.update(dict.fromkeys(row[2].split(" · "), row[1]))
    assert told == {name: one.layout for name, one in merged.items()}
