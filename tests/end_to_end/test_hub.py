"""Models of the hub, from its ids in the YAML file to the saved merge; the hub is one on loopback."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from adapters import make_adapter
from hub import Hub
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from project import ROOT
from runs import digest, log_of, make_models
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merge_monster
import modules.checkpoints.hub
import monster_mapper
from modules.checkpoints.downloads import Job, bytes_needed
from modules.checkpoints.hub import Repository, reporting
from modules.config.locations import Location

JUNK = ("model.gguf", "optimizer.pt", "training_args.bin", "original/params.json", "onnx/model.onnx", "README.md")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A sharded base, a candidate in one file with much junk beside it, and one in .bin files; and their merge."""
    folder = tmp_path_factory.mktemp("models")
    base, one, two = make_models(folder, shard="60KB")
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(one)
    for name in JUNK:
        (one / name).parent.mkdir(exist_ok=True)
        (one / name).write_bytes(b"junk" * 1000)
    tiny.save_as_bin(two)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = tiny.write_config(folder / "local.yaml", base, [one, two], folder / "out")
        assert merge_monster.main(["--config", str(config)]) == 0
    return folder


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    """A hub that has the models, in place of the real one, and an empty cache."""
    with Hub() as hub:
        hub.add("org/base", models / "base")
        hub.add("org/one", models / "one", "v1")
        hub.add("org/two", models / "two")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        monkeypatch.setattr(modules.checkpoints.hub, "PAUSES", (0.01, 0.01))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def merge(place, base="org/base", candidates=("org/one@v1", "org/two"), *arguments, **settings):
    path = tiny.write_config(place / "my.yaml", base, candidates, place / "out", **settings)
    return merge_monster.main(["--config", str(path), *arguments])


def test_what_is_no_folder_here_is_told_before_the_hub_is_asked(hub, tmp_path, capsys):
    assert merge(tmp_path, "org/base", ["org/one@v1", "org/nothing"]) == 2
    said = capsys.readouterr()
    told = [line for line in said.out.splitlines() if line.endswith("looking on the hub")]
    assert told == [f"{name} is not a local folder; looking on the hub" for name in ("org/base", "org/nothing")]
    asked = len(hub.requests)
    (tmp_path / "org" / "bose").mkdir(parents=True)
    assert merge(tmp_path, "org/base") == 2
    assert "no such folder; write a hub model as org/name@main" in capsys.readouterr().err
    assert len(hub.requests) == asked


def same_weights(folder, other):
    for file in sorted(path.name for path in other.glob("*.safetensors")):
        found = load_file(folder / file)
        assert all(tensor.equal(found[name]) for name, tensor in load_file(other / file).items())
    assert digest(folder).keys() == digest(other).keys()


def cached(place):
    """Every file in the cache's snapshots, and every blob."""
    cache = place / "cache"
    return {
        path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file() and "trees" not in path.parts
    }


def test_a_merge_of_ids_is_that_of_the_folders(hub, models, tmp_path):
    assert merge(tmp_path) == 0
    same_weights(tmp_path / "out", models / "out")
    log = log_of(tmp_path)
    commit = hub.shelves["org/one"].commit("v1")
    assert f"org/one@v1 is at commit {commit}\n" in log
    assert "Downloading base (" in log and "Downloading one@v1 (1 file, " in log
    assert "Models to merge  : one@v1, two\n" in log
    # The weights of every model once and in one format, nothing of the rest but what describes and opens a model.
    fetched = hub.fetched()
    assert len(fetched) == len(set(fetched))
    assert not [name for name in fetched if Path(name).name in {Path(junk).name for junk in JUNK}]
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {name for name in fetched if name.startswith("org/one/")} == {
        f"org/one/{name}"
        for name in (expected - {"chat_template.jinja"}) | {"model.safetensors"} | candidate_extras(models)
    }


def candidate_extras(models):
    return {"chat_template.jinja"} if (models / "one/chat_template.jinja").exists() else set()


def test_the_second_run_fetches_nothing(hub, models, tmp_path):
    assert merge(tmp_path) == 0
    hub.requests.clear()
    assert merge(tmp_path, "org/base", ("org/one@v1", "org/two"), "--overwrite") == 0
    assert hub.fetched() == []
    assert "Downloading" not in log_of(tmp_path)


def test_safetensors_win_on_the_hub_too(hub, models, tmp_path):
    both = shutil.copytree(models / "one", tmp_path / "both")
    (both / "pytorch_model.bin").write_bytes(b"not to be read")
    hub.add("org/both", both)
    assert merge(tmp_path, candidates=["org/both"]) == 0
    assert hub.fetched("pytorch_model.bin") == []


@pytest.mark.parametrize("file", ["model-00002-of-00004.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_a_connection_cut_in_the_middle_is_taken_up_where_it_broke(hub, models, tmp_path, file):
    found = next(models.glob(f"*/{file}"))
    hub.cuts[file] = found.stat().st_size // 2
    assert merge(tmp_path) == 0
    same_weights(tmp_path / "out", models / "out")
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(file) and wanted]
    assert any(int(wanted.removeprefix("bytes=").rstrip("-")) >= 1024 for wanted in ranges if wanted.endswith("-"))


def test_a_file_that_fails_for_a_while_is_asked_for_again(hub, models, tmp_path):
    hub.failures = {"model.safetensors": 2, "model-00001-of-00004.safetensors": 1}
    assert merge(tmp_path) == 0
    same_weights(tmp_path / "out", models / "out")


def test_a_file_that_never_comes_ends_the_run_and_writes_nothing(hub, models, tmp_path, capsys):
    hub.failures["model.safetensors"] = 100
    assert merge(tmp_path) == 1
    error = capsys.readouterr().err
    assert "org/one@v1: can't download model.safetensors: " in error and "HTTP 500" in error
    assert f"Nothing was written to {tmp_path / 'out'}" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_candidate_comes_while_the_one_before_it_is_searched(hub, models, tmp_path):
    """The second one's file is held back until the first one's search is over: waiting for it first would never end."""
    three = tiny.make_candidate(tmp_path / "three", models / "base", 3)
    (three / "model.safetensors").rename(three / "late.safetensors")
    tensors = load_file(three / "late.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "late.safetensors")}
    (three / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("org/three", three)
    hub.holds["late.safetensors"] = asked = threading.Event()
    seen = []

    def release():
        while not asked.is_set():
            logs = list((tmp_path / "logs").glob("*.txt"))
            text = logs[0].read_text(encoding="utf-8") if logs else ""
            if "Header" in text.partition("Candidate 1/2")[2]:
                seen.append("Downloading three" in text.partition("Layer 1/3")[0])
                asked.set()
            time.sleep(0.02)

    threading.Thread(target=release, daemon=True).start()
    assert merge(tmp_path, candidates=["org/one@v1", "org/three"]) == 0
    assert seen == [True]


def test_what_failed_before_it_was_needed_is_tried_again(hub, models, tmp_path):
    hub.add("org/three", tiny.make_candidate(tmp_path / "three", models / "base", 3))
    hub.delays["model.safetensors"] = 0.1
    hub.failures["model.safetensors"] = 3  # as often as it is tried: "three" fails while "two" is searched
    assert merge(tmp_path, candidates=["org/two", "org/three"]) == 0
    assert hub.failures["model.safetensors"] == 0


def test_a_file_that_several_candidates_need_counts_once(tmp_path):
    location = Location("org/base", None, "org/base")
    base = Repository(location, tmp_path / "base", {"a": 100, "b": 50}, "abc")
    other = Repository(location, tmp_path / "other", {"a": 30}, "def")
    local = Repository(Location("local", tmp_path), tmp_path, {"a": 7})
    jobs = [Job("base", base, ("a", "b")), Job("one", base, ("b",)), Job("two", other, ("a",)), Job("x", local, ("a",))]
    assert bytes_needed(jobs) == 180


def test_progress_is_told_by_the_hubs_own_protocol_too():
    """Large files of the real hub come by Xet, which reports otherwise than a plain download."""
    got = []
    with XetDownloadProgressReporter(
        reconstruction_desc="x",
        log_level=30,
        total=100,
        name="huggingface_hub.snapshot_download",
        tqdm_class=reporting(got.append),
    ) as reporter:
        for done in (10, 60, 100):
            reporter.update_progress(
                SimpleNamespace(
                    total_bytes=100,
                    total_bytes_completed=done,
                    total_transfer_bytes_completed=done,
                    total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completion_rate=1.0,
                )
            )
    assert got == [10, 50, 40]


def test_never_more_than_one_ahead(hub, models, tmp_path):
    for name in ("three", "four"):
        hub.add(f"org/{name}", tiny.make_candidate(tmp_path / name, models / "base", 3))
    assert merge(tmp_path, candidates=["org/one@v1", "org/three", "org/four"]) == 0
    log = log_of(tmp_path)
    assert log.index("Candidate 1/3") < log.index("Downloading three") < log.index("Candidate 2/3")
    assert log.index("Candidate 2/3") < log.index("Downloading four") < log.index("Candidate 3/3")


def test_adapters_of_the_hub(hub, models, tmp_path):
    adapter, whole = make_adapter(tmp_path, models / "base")
    hub.add("org/lora", adapter)
    assert merge(tmp_path, candidates=["org/lora", "org/base@main+org/lora", "org/one@v1+org/lora"]) == 0
    assert "Models to merge  : lora, base@main+lora, one@v1+lora\n" in log_of(tmp_path)
    assert hub.fetched("adapter_model.safetensors") == ["org/lora/adapter_model.safetensors"]
    assert "org/base/model.safetensors" not in hub.fetched()
    first = re.search(r" - Layer 1/3 .*", log_of(tmp_path))[0]
    config = tiny.write_config(tmp_path / "whole.yaml", "org/base", [whole], tmp_path / "again")
    assert merge_monster.main(["--config", str(config)]) == 0
    assert re.search(r" - Layer 1/3 .*", log_of(tmp_path))[0] == first


# ---------------------------------------------------------------------------------------------------------------------
# What can't be had
# ---------------------------------------------------------------------------------------------------------------------


def refused(place, capsys, *words, base="org/base", candidates=("org/one@v1",), code=2):
    assert merge(place, base, candidates) == code
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert "Traceback" not in error and not (place / "out").exists()


def test_models_that_are_not_there(hub, tmp_path, capsys):
    words = ["org/nothing: no such folder, not in the hub's cache", "/org/nothing does not exist", "set HF_TOKEN"]
    refused(tmp_path, capsys, *words, "org/nought", candidates=["org/nothing", "org/nought"])
    refused(tmp_path, capsys, "has no revision 'v9'", candidates=["org/one@v9"])
    assert hub.fetched("safetensors") == []


def test_a_private_model_needs_a_token(hub, models, tmp_path, capsys, monkeypatch):
    hub.add("org/secret", models / "one", token="hf_tests")
    refused(tmp_path, capsys, "org/secret", "set HF_TOKEN", candidates=["org/secret"])
    monkeypatch.setenv("HF_TOKEN", "hf_tests")
    assert merge(tmp_path, candidates=["org/secret"]) == 0


def test_a_gated_model(hub, models, tmp_path, capsys):
    hub.add("org/gated", models / "one", gated=True)
    words = f"is gated; request access at {hub.url}/org/gated"
    refused(tmp_path, capsys, "org/gated", words, candidates=["org/gated"])


def test_no_network(hub, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(tmp_path, capsys, "org/base: no such folder, not in the hub's cache", "can't be reached")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert merge(tmp_path) == 0
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert merge(tmp_path, "org/base", ("org/one@v1", "org/two"), "--overwrite") == 0
    assert "; using the cached copy, because http://127.0.0.1:9/org/base can't be reached" in log_of(tmp_path)
    same_weights(tmp_path / "out", models / "out")


def test_offline_mode_takes_the_cache_and_asks_nobody(hub, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path, capsys, "org/base: no such folder, not in the hub's cache", "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert merge(tmp_path) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert merge(tmp_path, "org/base", ("org/one@v1", "org/two"), "--overwrite") == 0
    assert hub.requests == []


def test_a_cache_that_is_not_complete(hub, models, tmp_path, capsys, monkeypatch):
    assert merge(tmp_path) == 0
    next((tmp_path / "cache").glob("models--org--one/snapshots/*/model.safetensors")).unlink()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path, capsys, "no model weights", "only the cache was searched, because HF_HUB_OFFLINE is set")


def test_what_does_not_fit_is_found_before_any_weights_are_fetched(hub, models, tmp_path, capsys):
    tokenizer = tiny.bpe_tokenizer()
    hub.add("org/bent", tiny.make_model(tmp_path / "bent", tiny.llama_config(len(tokenizer)), tokenizer))
    tensors = load_file(tmp_path / "bent/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:3].clone()
    save_file(tensors, tmp_path / "bent/model.safetensors")
    words = "model.layers.1.mlp.up_proj.weight has shape (3, 32), the base's has (64, 32)"
    refused(tmp_path, capsys, words, candidates=["org/one@v1", "org/bent"])
    assert hub.fetched("safetensors") == [] and hub.fetched("safetensors", whole=False) != []


def test_a_shard_that_is_none(hub, models, tmp_path, capsys):
    broken = shutil.copytree(models / "one", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00hello and more")
    hub.add("org/broken", broken)
    refused(tmp_path, capsys, "org/broken: ", "has an invalid weight file", candidates=["org/broken"])


def test_a_cache_in_which_small_files_are_missing(hub, models, tmp_path, capsys, monkeypatch):
    assert merge(tmp_path) == 0
    shutil.rmtree(tmp_path / "out")
    for name in ("chat_template.jinja", "tokenizer.json"):
        next((tmp_path / "cache").glob(f"models--org--base/snapshots/*/{name}")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path, capsys, "org/base: chat_template.jinja is not in the cache, and HF_HUB_OFFLINE is set")


def test_bin_files_that_can_not_fit_are_not_fetched(hub, models, tmp_path, capsys):
    tokenizer = tiny.bpe_tokenizer()
    tiny.make_model(tmp_path / "gpt", tiny.gpt2_config(len(tokenizer)), tokenizer)
    tiny.save_as_bin(tmp_path / "gpt")
    hub.add("org/gpt", tmp_path / "gpt")
    refused(tmp_path, capsys, "architecture is gpt2, the base's is llama", candidates=["org/gpt"])
    assert hub.fetched("pytorch_model.bin") == []


def test_an_adapter_that_can_not_be_applied_is_not_fetched(hub, models, tmp_path, capsys):
    adapter, _ = make_adapter(tmp_path, models / "base")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    hub.add("org/dora", adapter)
    refused(tmp_path, capsys, "use_dora: True", candidates=["org/dora"])
    assert hub.fetched("safetensors") == []


def test_the_model_that_an_adapter_was_trained_on(hub, models, tmp_path):
    adapter, _ = make_adapter(tmp_path, models / "base")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for name, trained_on in (("right", "Org/Base"), ("wrong", "mistralai/Mistral-7B-v0.2")):
        folder = shutil.copytree(adapter, tmp_path / name)
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": trained_on}))
        hub.add(f"org/{name}", folder)
    assert merge(tmp_path, candidates=["org/right", "org/wrong"]) == 0
    log = log_of(tmp_path)
    assert "wrong: the adapter was trained on mistralai/Mistral-7B-v0.2, but is applied to base\n" in log
    assert "right: the adapter was trained on" not in log


def test_a_disk_that_is_too_small(hub, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    refused(tmp_path, capsys, "the downloads need", "0.00 MB free", "HF_HOME")
    assert hub.fetched("safetensors") == []


# ---------------------------------------------------------------------------------------------------------------------
# What stays in the cache
# ---------------------------------------------------------------------------------------------------------------------


def test_downloads_are_removed_if_they_are_not_to_be_kept(hub, models, tmp_path):
    (tmp_path / "cache").mkdir()
    assert merge(tmp_path, keep_downloads=False) == 0
    same_weights(tmp_path / "out", models / "out")
    assert not [path for path in cached(tmp_path) if "blobs" in path or "snapshots" in path]


def test_so_they_are_where_models_are_only_scored(hub, tmp_path):
    config = tiny.write_config(tmp_path / "my.yaml", "org/base", [], "out", keep_downloads=False)
    assert merge_monster.main(["--config", str(config), "--score", "org/one@v1", "org/two"]) == 0
    assert hub.fetched("pytorch_model.bin") == ["org/two/pytorch_model.bin"]
    assert not [path for path in cached(tmp_path) if "blobs" in path or "snapshots" in path]


def test_one_commit_under_two_names_is_removed_once(hub, models, tmp_path):
    adapter, _ = make_adapter(tmp_path, models / "base")
    hub.add("org/lora", adapter)
    commit = hub.shelves["org/one"].commit("v1")
    assert merge(tmp_path, candidates=["org/one@v1", f"org/one@{commit}+org/lora"], keep_downloads=False) == 0
    assert hub.fetched("one/resolve/" + commit + "/model.safetensors") == ["org/one/model.safetensors"]
    assert not [path for path in cached(tmp_path) if "blobs" in path or "snapshots" in path]


def test_the_base_under_another_name_is_skipped(hub, models, tmp_path):
    hub.add("old/name", models / "base")
    hub.add("org/base", models / "base", "refs/pr/7")
    assert merge(tmp_path, "org/base", ["old/name", "org/base@refs/pr/7", "org/one@v1"]) == 0
    log = log_of(tmp_path)
    assert "Models to merge  : one@v1\n" in log and "old/name is the base model; skipped" in log


def test_a_model_that_was_in_the_cache_before_stays(hub, models, tmp_path):
    hub.add(
        "org/one", shutil.copytree(models / "one", tmp_path / "v2"), "v2"
    )  # the same files in another revision: their blobs are shared
    hf_hub_download("org/one", "model.safetensors", revision="v2")
    hf_hub_download("org/two", "pytorch_model.bin")
    assert merge(tmp_path, keep_downloads=False) == 0
    two = hub.shelves["org/two"].commit("main")
    kept = {path.rsplit("/", 1)[-1] for path in cached(tmp_path) if "snapshots" in path and two in path}
    assert {"pytorch_model.bin", "config.json", "tokenizer.json"} <= kept
    others = [path for path in cached(tmp_path) if "snapshots" in path and two not in path]
    assert [(path.split("/")[0], Path(path).name) for path in others] == [("models--org--one", "model.safetensors")]
    assert load_file(next((tmp_path / "cache").glob("models--org--one/snapshots/*/model.safetensors")))


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def child(hub, place, config, **options):
    """The program as it is started from a shell, at a terminal of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-u", str(ROOT / "merge_monster.py"), "--config", str(config)]
    return subprocess.Popen(command, env=environment, cwd=place, **options)


@pytest.mark.slow
def test_a_bar_shows_the_download_and_ctrl_c_ends_it(hub, models, tmp_path):
    hub.delays = {f"model-0000{number}-of-00004.safetensors": 0.4 * number for number in (1, 2, 3)}
    hub.holds["model-00004-of-00004.safetensors"] = threading.Event()
    config = tiny.write_config(tmp_path / "my.yaml", "org/base", ["org/one@v1"], tmp_path / "out")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # a new one has no columns
    process = child(hub, tmp_path, config, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    try:
        shown, end = "", time.monotonic() + 60
        while not re.search(r"Downloading base: +[1-9]\d%", shown) and time.monotonic() < end:
            if select.select([ours], [], [], 0.5)[0]:
                shown += os.read(ours, 4096).decode(errors="replace")
        assert time.monotonic() < end, shown
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()
        process.wait()
    os.close(ours)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_the_environment_alone_leads_to_the_hub(hub, models, tmp_path):
    hub.cuts["model-00001-of-00004.safetensors"] = 1000
    config = tiny.write_config(tmp_path / "my.yaml", "org/base", ["org/one@v1", "org/two"], tmp_path / "out")
    with child(hub, tmp_path, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    assert "Downloading base" in output and (tmp_path / "home/hub/models--org--base").is_dir()
    same_weights(tmp_path / "out", models / "out")


def test_the_mapper_maps_a_model_of_the_hub(hub, tmp_path):
    config = tiny.write_config(tmp_path / "my.yaml", "nowhere/base", [], tmp_path / "out")
    assert monster_mapper.main(["--config", str(config), "--model", "org/two"]) == 0
    assert hub.fetched("pytorch_model.bin") == ["org/two/pytorch_model.bin"]
    config = tiny.write_config(tmp_path / "my.yaml", "org/one@v1", [], tmp_path / "out", keep_downloads=False)
    assert monster_mapper.main(["--config", str(config)]) == 0
    assert not (tmp_path / "cache/models--org--one").exists() and (tmp_path / "cache/models--org--two").exists()
