"""The mapper as a program, from the YAML file to the files it writes."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from project import ROOT
from runs import digest, tables

import merge_monster
import monster_mapper
from modules.checkpoints.checkpoint import load_tokenizer
from modules.config.load import load_config
from modules.config.phrase_lists import Pair
from modules.mapper.detokenize import Detokenizer
from modules.mapper.grammar import english
from modules.run.map import Exports, check_exports
from modules.runtime.errors import ConfigError
from modules.scoring.tokenization import encode_contexts

SETTINGS = {"prob_min": 5, "top_k": 3, "max_depth": 3, "additional_length": 4}


@pytest.fixture(scope="module", params=["bpe", "spm"])
def base(request, tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base", request.param)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base", "bpe")


def make_base(folder, family, seed=0):
    """A model that has its preferences: some next tokens are probable."""
    tokenizer = tiny.TOKENIZERS[family]()
    return tiny.make_model(folder, tiny.llama_config(len(tokenizer)), tokenizer, seed=seed, scale=20.0)


def write(place, base, name="my.yaml", pairs=tiny.PAIRS, **more):
    """A mapper's config; without candidates and output."""
    path = tiny.write_config(place / name, base, [], place / "out", pairs, **{"mapper": SETTINGS, **more})
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    del document["models_to_merge"], document["directories"]["output_directory"]
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return path


def mapped(place, base, *arguments, **settings):
    """Run the program in this process; its exit code."""
    path = write(place, base, **settings)
    return monster_mapper.main(["--config", str(path), *map(str, arguments)])


def log_of(place):
    logs = sorted((place / "logs").glob("monster-mapper-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return logs[-1].read_text(encoding="utf-8")


def rows(log):
    """The rows of the table at the end: type, phrase, context, probability, mark, rank, suggestion."""
    lines = [line for line in log.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


# ---------------------------------------------------------------------------------------------------------------------
# What is shown is what the merge scores
# ---------------------------------------------------------------------------------------------------------------------


def test_completions_have_the_raw_probability_that_the_merge_gives_them(place, base):
    """Every branch that can be written as a phrase, written as one: to the digits that the merge prints."""
    assert mapped(place, base, "--json", "tree.json", mapper={**SETTINGS, "prob_min": 0.1}) == 0
    tokenizer = load_tokenizer(base)
    detokenizer = Detokenizer(tokenizer, len(tokenizer))
    expected = {}
    document = json.loads((place / "tree.json").read_text(encoding="utf-8"))
    assert document["model"] == base.name  # and not where it lies
    for context in document["contexts"]:
        root = encode_contexts(tokenizer, [context["context"]], len(tokenizer))[0]
        for branch in context["branches"]:
            tokens, number = [], branch["leaf"]
            while number is not None:
                tokens.insert(0, context["nodes"][number]["token"])
                number = context["nodes"][number]["parent"]
            phrase = detokenizer.phrase(root, tokens) if tokens else None
            if phrase is not None and branch["joint_probability"] > 0.0001:
                expected[Pair("BAD", phrase, context["context"])] = branch["joint_probability"] * 100
    assert len(expected) >= 8
    assert any(pair.context.endswith(" ") for pair in expected)
    candidate = tiny.make_candidate(place / "one", base)
    path = tiny.write_config(place / "merge.yaml", base, [candidate], place / "out", pairs=list(expected))
    assert merge_monster.main(["--config", str(path)]) == 0
    (merge_log,) = (place / "logs").glob("merge-monster-*.txt")
    merged = tables(merge_log.read_text(encoding="utf-8"))[0][:-1]
    shown = [float(row[-3].rstrip("%")) for row in merged]
    assert shown == pytest.approx(list(expected.values()), rel=2e-5, abs=1e-5)  # the last digit that is printed
    assert monster_mapper.main(["--config", str(path), "--json", "again.json"]) == 0
    again = json.loads((place / "again.json").read_text(encoding="utf-8"))["contexts"]
    found = [phrase["probability"] * 100 for context in again for phrase in context["phrases"]]
    assert sorted(found) == pytest.approx(sorted(shown), rel=2e-5, abs=1e-5)  # as phrases they have the same


def test_a_pasted_suggestion_takes_the_place_of_its_phrase(place, base):
    """From one run's --yaml to the next run's phrase_files: its phrases now have the probabilities claimed."""
    settings = {**SETTINGS, "prob_min": 0.5}
    assert mapped(place, base, "--yaml", "better.yaml", "--json", "tree.json", mapper=settings) == 0
    contexts = json.loads((place / "tree.json").read_text(encoding="utf-8"))["contexts"]
    claimed = {
        (context["context"], phrase["suggestion"]["phrase"]): phrase["suggestion"]["probability"]
        for context in contexts
        for phrase in context["phrases"]
        if phrase["suggestion"]
    }
    assert len(claimed) >= 3
    arguments = {"pairs": (), "phrase_files": [str(place / "better.yaml")]}
    assert mapped(place, base, "--json", "again.json", **arguments) == 0
    found = {
        (context["context"], phrase["phrase"]): phrase
        for context in json.loads((place / "again.json").read_text(encoding="utf-8"))["contexts"]
        for phrase in context["phrases"]
    }
    assert set(found) == set(claimed)
    for key, phrase in found.items():
        assert phrase["probability"] == pytest.approx(claimed[key], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Terminal and log
# ---------------------------------------------------------------------------------------------------------------------


def test_console_and_log(place, bpe, capsys):
    before = digest(bpe)
    pairs = (*tiny.PAIRS, Pair("BAD", "a\x1bz", "Two\nlines\x07"), Pair("GOOD", "x", ""))
    assert mapped(place, bpe, pairs=pairs) == 0
    output, log = capsys.readouterr().out, log_of(place)
    assert output == log and "\x1b" not in log and "\x07" not in log
    contexts = re.findall(r"^CONTEXT (\d+)/(\d+): (.*)$", log, re.MULTILINE)
    assert [number for number, _, _ in contexts] == [str(number) for number in range(1, 8)]
    assert [shown for _, _, shown in contexts][:2] == ["Her body quivers with", "The atmosphere is thick with"]
    assert contexts[4][2] == "Two lines\\x07"  # bad phrases come first, as in the merge
    assert contexts[-1][2] == "(empty)"
    assert len(re.findall(r"^TOTAL BRANCHES: [1-9]\d*$", log, re.MULTILINE)) == 7
    steps = r"\d+\.\d\d(?:e-\d+)?% \[.*\]"
    assert re.search(rf"^     Trace:    {steps} > {steps}", log, re.MULTILINE)
    assert len(rows(log)) == len(pairs)
    assert log.count(", under 5%") >= 1
    assert digest(bpe) == before


def test_limits_cut_and_say_so(place, bpe):
    """Both off, nothing is said of them; what is not cut is what it was."""

    def found(**limits):
        settings = {**SETTINGS, "prob_min": 0.5, **limits}
        assert mapped(place, bpe, "--json", "tree.json", "--overwrite", mapper=settings) == 0
        contexts = json.loads((place / "tree.json").read_text(encoding="utf-8"))["contexts"]
        branches = [[(branch["text"], branch["joint_probability"]) for branch in one["branches"]] for one in contexts]
        return branches, log_of(place)

    whole, log = found()
    assert "cut" not in log.lower() and "joint 0.5%" not in log and "max_branches" not in log
    kept, log = found(max_branches=2)
    for some, every in zip(kept, whole, strict=True):
        assert [text for text, _ in some] == [text for text, _ in every[:2]]
        assert [joint for _, joint in some] == pytest.approx([joint for _, joint in every[:2]], rel=1e-3)
    cut = sum(len(branches) > 2 for branches in whole)
    assert cut and len(re.findall(r"^TOTAL BRANCHES: 2$", log, re.MULTILINE)) >= cut
    line = rf"^Cut by max_branches: at least \d+ branches in {cut} of {len(whole)} contexts$"
    assert re.search(line, log, re.MULTILINE)
    assert "max_branches      : 2\n" in log
    kept, log = found(min_joint=5)
    assert all(joint >= 0.05 for branches in kept for _, joint in branches)
    assert "min_joint         : 5%\n" in log


def test_each_context_stands_once_with_all_its_phrases(place, bpe):
    phrases = [("BAD", "spine"), ("BAD", "arm"), ("GOOD", "leg"), ("GOOD", "spine")]
    pairs = [Pair(kind, phrase, "down her ") for kind, phrase in phrases]
    assert mapped(place, bpe, pairs=pairs, mapper={**SETTINGS, "prob_min": 0.5}) == 0
    log = log_of(place)
    assert log.count("CONTEXT ") == 1
    assert re.findall(r'^(BAD|GOOD) +"(\w+)"', log, re.MULTILINE) == phrases
    joints = [float(joint) for joint in re.findall(r"Joint: +([\d.e-]+)%", log)]
    assert joints == sorted(joints, reverse=True) and len(joints) > 2
    assert "WARNING: the phrase 'spine' after 'down her ' is listed as bad and as good\n" in log


def test_the_same_config_gives_the_same_lines_and_files(place, bpe):
    found = []
    for number in range(2):
        files = ("--json", f"{number}.json", "--yaml", f"{number}.yaml")
        assert mapped(place, bpe, *files, mapper={**SETTINGS, "prob_min": 0.1}) == 0
        lines = [line for line in log_of(place).splitlines() if not re.match(r"\d\d:\d\d:\d\d - ", line)]
        found.append((lines, (place / f"{number}.json").read_bytes(), (place / f"{number}.yaml").read_bytes()))
    assert found[0] == found[1]
    text = found[0][2].decode("utf-8")
    assert bpe.parent.name not in text
    suggested = [phrase["phrase"].split() for phrases in yaml.safe_load(text).values() for phrase in phrases]
    assert suggested and all(english().begins(words[-1].strip(".,").lower()) for words in suggested)


def on_a_terminal(place, path, **environment):
    """What a terminal is sent, progress bar included."""
    main, side = pty.openpty()
    command = [sys.executable, str(ROOT / "monster_mapper.py"), "--config", str(path)]
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # a new one has no columns
    settings = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(command, cwd=place, stdout=side, stderr=side, env={**settings, **environment})
    os.close(side)
    received = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not part:
            break
        received += part
    os.close(main)
    assert process.wait() == 0
    return received.decode("utf-8")


@pytest.mark.slow
def test_colours_are_for_terminals_only(place, bpe):
    path = write(place, bpe)
    coloured = on_a_terminal(place, path)
    assert re.search(r"\x1b\[38;5;\d+m\d+\.\d\d% \[", coloured)
    assert "\x1b" not in log_of(place)
    shares = [int(share) for share in re.findall(r"(\d+)%\|", coloured)]
    assert shares[-1] == 100 and shares == sorted(shares)
    assert "%|" not in log_of(place)
    assert "\x1b[38" not in on_a_terminal(place, path, NO_COLOR="1")
    assert "\x1b[38" in on_a_terminal(place, path, NO_COLOR="")


# ---------------------------------------------------------------------------------------------------------------------
# Files and arguments
# ---------------------------------------------------------------------------------------------------------------------


def test_another_model_is_mapped_with_a_config_of_a_merge(place, bpe):
    """Without a section for the mapper: it has the defaults."""
    other = make_base(place / "other", "bpe", seed=3)
    path = tiny.write_config(place / "my.yaml", bpe, ["not/there/yet"], place / "out")
    found = []
    for arguments in ([], ["--model", str(other)]):
        assert monster_mapper.main(["--config", str(path), *arguments]) == 0
        found.append(log_of(place))
    assert not (place / "out").exists()
    first, second = found
    for line in (
        "prob_min          : 10%",
        "top_k             : 3",
        "max_depth         : 5",
        f"Model             : {bpe}",
    ):
        assert line in first
    assert f"Model             : {other}" in second
    assert [row[:3] for row in rows(first)] == [row[:3] for row in rows(second)]
    assert [row[3] for row in rows(first)] != [row[3] for row in rows(second)]


def test_half_precision_checkpoints(place):
    tokenizer = tiny.TOKENIZERS["bpe"]()
    folder = tiny.make_model(place / "half", tiny.llama_config(len(tokenizer)), tokenizer, dtype=torch.bfloat16)
    for name, settings in (("float32", {}), ("bfloat16", {"compute_dtype": "bfloat16"})):
        assert mapped(place, folder, **settings) == 0
        assert f"Dtype             : {name}\n" in log_of(place)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--json", "there.json"], "this file exists"),
        (["--json", "my.yaml", "--overwrite"], "which is the input"),
        (["--yaml", "phrases.yaml", "--overwrite"], "which is the input"),
        (["--json", "nowhere/tree.json"], "its folder does not exist"),
        (["--yaml", "folder"], "a folder"),
        (["--json", "a.json", "--yaml", "./a.json"], "--json and --yaml both name"),
        (["--model", "nowhere"], "--model: 'nowhere': no such folder"),
        (["--model", "folder"], "folder: not a model folder"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--device", "tpu"], "--device: 'tpu': expected auto"),
    ],
)
def test_arguments_that_cannot_be_used(place, bpe, capsys, arguments, words):
    (place / "folder").mkdir()
    (place / "there.json").write_text("precious")
    (place / "phrases.yaml").write_text("bad_phrases: []")
    assert mapped(place, bpe, *arguments, phrase_files=["phrases.yaml"]) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert (place / "there.json").read_text() == "precious"
    assert (place / "phrases.yaml").read_text() == "bad_phrases: []"
    assert not list(place.rglob("*.partial"))


def test_files_are_replaced_when_asked_and_only_as_a_whole(place, bpe, monkeypatch, capsys):
    (place / "tree.json").write_text("old")
    assert mapped(place, bpe, "--json", "tree.json", "--overwrite") == 0
    whole = (place / "tree.json").read_bytes()
    assert json.loads(whole)["contexts"]

    def full(self, mode="r", *arguments, **settings):
        if mode == "w" and "tree" in self.name:
            raise OSError(28, "No space left on device", str(self))
        return opened(self, mode, *arguments, **settings)

    opened = Path.open
    monkeypatch.setattr(Path, "open", full)
    path = place / "my.yaml"
    assert monster_mapper.main(["--config", str(path), "--json", "tree.json", "--overwrite"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (place / "tree.json").read_bytes() == whole
    assert "TOTAL BRANCHES" in log_of(place)


def test_contexts_that_the_model_cannot_take(place, bpe, capsys):
    assert mapped(place, bpe, pairs=[Pair("BAD", "spine", "down her " * 200)]) == 2
    assert "tokens long, but the base model takes 256" in capsys.readouterr().err


def test_the_yaml_of_a_run_without_better_phrases_is_an_empty_list(place, bpe):
    assert mapped(place, bpe, "--yaml", "a.yaml", pairs=[Pair("BAD", "spine", "down her ")]) == 0
    assert len(yaml.safe_load((place / "a.yaml").read_text(encoding="utf-8"))["bad_phrases"]) == 1
    assert mapped(place, bpe, "--yaml", "b.yaml", pairs=(), phrase_files=["a.yaml"]) == 0
    document = yaml.safe_load((place / "b.yaml").read_text(encoding="utf-8"))
    assert document == {"bad_phrases": [], "good_phrases": []}
    again = write(place, bpe, "again.yaml", phrase_files=["a.yaml", "b.yaml"])
    assert len(load_config(again, mapping=True).pairs) == len(tiny.PAIRS) + 1


@pytest.mark.parametrize("name", ["a" * 250, "a" * 300, "loop/x"])
def test_exports_that_cannot_be_written_are_refused_before_the_work(place, name):
    (place / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"--json .*: can.t be written"):
        check_exports(Exports(Path(name), None), False)
