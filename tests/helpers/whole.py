"""The whole program in this process, and its outputs reopened in another one that knows nothing of the run."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from project import environment
from runs import stored

import merge_monster

RATIOS = [0.3, 0.7]

# Of every folder: the pairs' log-probabilities, then how many tokens it generates.
REOPEN = """
import json, sys
import torch
from transformers import AutoTokenizer, logging
import reference, tiny
logging.set_verbosity_error()
torch.set_num_threads(1)
found = {}
for folder in sys.argv[1:]:
    model, tokenizer = reference.load(folder, "auto"), AutoTokenizer.from_pretrained(folder)
    model = model if model.dtype == torch.bfloat16 else model.float()
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
        return re.search(r", layout (\w+)", self.output)[1]

    @property
    def decisions(self):
        """(what was decided on, whether it changed, total afterwards) of every decision."""
        pattern = r" - (Layer \d/\d|Header) - (CHANGED|RETAINED) - (?:\S+ > )?(-?[\d.]+)"
        return [(what, kind == "CHANGED", float(total)) for what, kind, total in re.findall(pattern, self.output)]

    @property
    def weights(self):
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


def run(folder, base, candidates):
    """Merge into folder/out, from a YAML file as a user would write it."""
    config = tiny.write_config(
        folder / "my.yaml", base, candidates, folder / "out", merge_ratios=RATIOS, auto_weights=True
    )
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.chdir(folder)
        code = merge_monster.main(["--config", str(config)])
    return Merged(folder, code, output.getvalue(), [])


def reopen(merged):
    """Reopen the outputs of several runs, all in one process, and let each run know what was found."""
    outputs = [str(one.folder / "out") for one in merged if one.code == 0]
    command = [sys.executable, "-c", REOPEN, *outputs]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for one in merged:
        one.reopened = found[str(one.folder / "out")] if one.code == 0 else []


def check_reopened(one):
    """What was scored is what was saved, and it still generates."""
    scores, new_tokens = one.reopened
    assert one.last_table == pytest.approx([100 * math.exp(score) for score in scores], rel=1e-3, abs=1e-5)
    assert new_tokens == 3


def check_stored(one):
    """The output has the base's tensors: their names, dtypes and shapes."""
    base = stored(one.folder / "base")
    assert base
    assert stored(one.folder / "out") == base
