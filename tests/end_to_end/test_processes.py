"""Several processes under torchrun on the CPU: the decisions and the model of one, and what happens when one fails."""

import json
import math
import os
import socket
import subprocess
import sys
from itertools import chain

import pytest
import tiny
import torch
from broken_runs import end
from chats import chat_tokenizer
from project import ROOT
from safetensors.torch import load_file

import merge_monster
from modules.checkpoints.checkpoint import open_checkpoint
from modules.config.phrase_lists import Chat, Pair
from modules.model.devices import own_device
from modules.model.loading import load_model
from modules.runtime.distributed import Rank, find_rank
from modules.runtime.errors import ConfigError
from modules.scoring.layout import build_scorer
from modules.scoring.tokenization import encode_pairs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny.bpe_tokenizer()
    base = tiny.make_model(folder / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    return base, tiny.make_candidate(folder / "one", base), tiny.make_candidate(folder / "two", base, seed=2)


def pairs():
    """Enough of them that there are packs for everyone."""
    words = [sentence.split() for sentence in tiny.TEXT[:5]]
    return [
        Pair("GOOD" if number % 4 == 0 else "BAD", " ".join(text[cut : cut + 2]), " ".join(text[start:cut]) + " ", 1.0)
        for number, text in enumerate(words)
        for start in range(6)
        for cut in range(start + 2, len(text) - 1)
    ]


def configure(place, models, **settings):
    base, *candidates = models
    settings = {"merge_ratios": [0.3, 0.7], "merge_method": ["lerp", "slerp"], **settings}
    return tiny.write_config(place / "my.yaml", base, candidates, place / "out", pairs(), **settings)


def merge(place, models, *command, **settings):
    """Run the whole program in other processes; the result of that."""
    command = [*command, "--config", str(configure(place, models, **settings))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, timeout=200, check=False)


def several(count, how=None, number=1):
    """The command for so many processes, one of which may misbehave."""
    if how is None:
        return [*TORCHRUN, str(count), str(ROOT / "merge_monster.py")]
    return [*TORCHRUN, str(count), str(ROOT / "tests/helpers/misbehaving.py"), how, str(number), "--"]


def decisions(folder):
    records = map(json.loads, (folder / "merge_monster_journal.jsonl").read_text().splitlines())
    return [(r["model"], r["layer"], r["method"], r["ratio"]) for r in records if r["kind"] == "decision"]


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    return alone(tmp_path_factory.mktemp("one"), models)


def alone(place, models, **settings):
    """The output of a run in this process."""
    config = configure(place, models, **{**watched(place), **settings})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert merge_monster.main(["--config", str(config)]) == 0
    return place / "out"


def watched(place):
    """What is measured beside a search, and under every trial."""
    (place / "plain.txt").write_text("The bread is on the table. It was baked this morning. " * 8, encoding="utf-8")
    (place / "prompts.txt").write_text("It was\nThe bread\nThis morning\nWhere is", encoding="utf-8")
    return {
        "own_texts": [str(place / "prompts.txt")],
        "baselines": True,
        "neutral_texts": [str(place / "plain.txt")],
        "held_out": 0.2,
        "samples": ["It was"],
        "max_drift": 0.01,
        "neutral_tokens": 80,
    }


def beside(folder):
    """The figures of that: candidates taken whole, held-out phrases, drift."""
    recipe = json.loads((folder / "merge_monster_recipe.json").read_text())
    measured = [*recipe["baselines"].values(), *recipe["metrics"].values()]
    return list(chain.from_iterable(metrics.values() for metrics in measured))


def assert_same(output, one_process):
    assert decisions(output) == decisions(one_process)
    assert any(ratio is not None for *_, ratio in decisions(one_process))
    expected = tensors(one_process)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(output).items())


def forked(place, models, count, **settings):
    """The exit codes of so many processes that have everything loaded already, and what they have shown."""
    config = configure(place, models, **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            code = 99
            try:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                os.environ.update(RANK=str(number), WORLD_SIZE=str(count))
                os.environ.update(LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(count))
                os.chdir(place)
                sys.stdout = sys.stderr = open(place / f"shown-{number}.txt", "w")  # noqa: SIM115
                code = merge_monster.main(["--config", str(config)])
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [end(child) for child in children]
    return codes, [(place / f"shown-{number}.txt").read_text() for number in range(count)]


def assert_shared(place, count, shown, one_process):
    """Several processes have taken the decisions of one, and only one has said so."""
    assert_same(place / "out", one_process)
    assert beside(place / "out") == pytest.approx(beside(one_process), rel=1e-4)
    assert (place / "out/README.md").read_text().count("  merge:") == 1
    assert f"packs on {count} processes" in shown
    assert shown.count("THE MERGE MONSTER HUNGERS") == 1  # the others are quiet
    assert len(list((place / "logs").iterdir())) == 1
    assert not list(place.glob("*.partial"))


def test_several_processes_take_the_decisions_of_one(tmp_path, models, one_process):
    codes, shown = forked(tmp_path, models, 2, **watched(tmp_path))
    assert codes == [0, 0], shown
    assert_shared(tmp_path, 2, "".join(shown), one_process)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_torchrun_starts_them(tmp_path, models, one_process, count):
    result = merge(tmp_path, models, *several(count), **watched(tmp_path))
    assert result.returncode == 0, result.stderr
    assert_shared(tmp_path, count, result.stdout, one_process)


@pytest.mark.slow
def test_chats_are_what_the_process_that_leads_has_rendered(tmp_path):
    """Their template prints microseconds: no two processes would render the same."""
    tokenizer = chat_tokenizer("<s>{{ strftime_now('%f') }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer)), tokenizer)
    turns = [{"role": "user", "content": "Go on."}]
    chats = [
        {"phrase": pair.phrase, "contexts": [{"messages": turns, "continue": pair.context}]} for pair in pairs()[:40]
    ]
    chats[0]["contexts"].append({**chats[1]["contexts"][0], "held_out": True})
    models = base, tiny.make_candidate(tmp_path / "one", base)
    result = merge(tmp_path, models, *several(2), bad_phrases=chats, good_phrases=[])
    assert result.returncode == 0, result.stderr
    assert "packs on 2 processes" in result.stdout
    found = json.loads((tmp_path / "out/merge_monster_recipe.json").read_text())["phrases"]
    model = load_model(open_checkpoint(base, "base"), "cpu", "auto")
    own = [Pair(one["kind"], one["phrase"], one["context"], chat=Chat(())) for one in found]
    scorer = build_scorer(model, encode_pairs(tokenizer, own, model.vocabulary, model.max_tokens))
    assert [math.exp(value) for value in scorer.score()] == pytest.approx([one["before"] for one in found], rel=1e-4)


@pytest.mark.slow
def test_several_processes_make_the_steps_of_one(tmp_path, models):
    joint = {"search": "joint", "joint": {"steps": 3}, "merge_method": "lerp", "max_drift": None}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone(tmp_path / "one", models, **joint)
    result = merge(tmp_path / "two", models, *several(2), **{**watched(tmp_path / "two"), **joint})
    assert result.returncode == 0, result.stderr
    recipes = [tmp_path / name / "out/merge_monster_recipe.json" for name in ("one", "two")]
    one, two = (json.loads(recipe.read_text())["joint"] for recipe in recipes)
    assert one["weights"] == two["weights"] and any(map(any, one["weights"]))
    for before, after in zip(one["steps"], two["steps"], strict=True):
        assert after["total"] == pytest.approx(before["total"], rel=1e-5)
        assert after["trial_kl"] == pytest.approx(before["trial_kl"], rel=1e-3)
        assert after["held_out"] == pytest.approx(before["held_out"], rel=1e-4)
    expected = tensors(tmp_path / "one/out")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(tmp_path / "two/out").items())


@pytest.mark.slow  # in one process: test_lack_of_memory
def test_one_that_runs_out_of_memory_makes_all_take_less(tmp_path, models, one_process):
    result = merge(tmp_path, models, *several(2, "runs out of memory"), **watched(tmp_path))
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "out", one_process)
    assert "Out of memory: packs of" in result.stdout


@pytest.mark.slow
def test_one_that_dies_ends_the_run_and_loses_nothing(tmp_path, models, one_process):
    result = merge(tmp_path, models, *several(2, "dies"))
    assert result.returncode != 0
    assert "ERROR: another process of this run has ended" in result.stderr
    assert "with --resume to continue" in result.stderr and "internal error" not in result.stderr
    assert "[process" not in result.stderr  # the others have nothing to say about it
    assert len(decisions(tmp_path / "out.partial")) >= 3 and not (tmp_path / "out").exists()
    result = merge(tmp_path, models, *several(2), "--resume")
    assert result.returncode == 0, result.stderr
    assert "recorded decisions" in result.stdout
    assert_same(tmp_path / "out", one_process)


@pytest.mark.slow
def test_one_that_cannot_read_a_candidate_makes_all_give_it_up(tmp_path, models):
    result = merge(tmp_path, models, *several(2, "cannot read"), on_error="skip")
    assert result.returncode == 0, result.stderr
    assert "WARNING: Skipping the rest of one; its merges so far are kept: a mount has gone" in result.stdout
    found = decisions(tmp_path / "out")
    assert [layer for model, layer, *_ in found if model == "one"] == [0, 0]
    assert len([layer for model, layer, *_ in found if model == "two"]) == 7


@pytest.mark.parametrize("script", ["merge_monster.py", "monster_mapper.py"])
def test_a_follower_leaves_the_leader_time_to_tell(tmp_path, models, script):
    """torchrun ends all with the first that ends: the follower waits for that, and has nothing to say then."""
    config = tiny.write_config(tmp_path / "my.yaml", models[0], models[1:], tmp_path / "out", strategy="best")
    command = [sys.executable, str(ROOT / script), "--config", str(config)]
    follower = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with subprocess.Popen(command, env=follower, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.terminate()
        assert process.communicate(timeout=10)[0] == b"" and process.returncode == 2


@pytest.mark.slow
def test_nothing_to_do_is_no_failure_of_the_others(tmp_path, models):
    result = merge(tmp_path, models, *several(2), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Dry run: wrote only the log logs") == 1 and not (tmp_path / "out").exists()


def test_a_process_knows_its_seat():
    assert find_rank({}) == Rank(0, 1, 0, 1) and find_rank({}).is_main_process
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert find_rank(torchrun) == Rank(5, 8, 1, 4) and not find_rank(torchrun).is_main_process


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("modules.model.devices.present_devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    assert [own_device("cuda", Rank(n, 2, n, 2)) for n in range(2)] == ["cuda:0", "cuda:1"]
    assert own_device("auto", Rank(3, 4, 1, 2)) == "cuda:1"
    assert own_device("auto", Rank()) == "auto"  # alone, it may have them all
    assert own_device("cpu", Rank(1, 2, 1, 2)) == "cpu" and own_device("cuda:0", Rank(1, 2, 1, 2)) == "cuda:0"
    with pytest.raises(ConfigError, match="3 processes for 2 GPUs"):
        own_device("cuda", Rank(2, 3, 2, 3))
    monkeypatch.setattr("modules.model.devices.present_devices", lambda: ["cpu"])
    assert own_device("auto", Rank(1, 2, 1, 2)) == "auto"
