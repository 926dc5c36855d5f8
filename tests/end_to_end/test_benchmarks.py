"""The benchmarks run, at a small size, and print what they promise."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import mergekits
import pytest
import tiny
import torch
from matplotlib.image import imread
from project import ROOT
from runs import make_models

BENCHMARKS = ROOT / "benchmarks"
SMALL = ["--layers", "2", "--hidden", "128", "--intermediate", "256", "--vocabulary", "4000"]


def run(place, name, *options):
    """A benchmark's output, and the JSON of its last line."""
    command = [sys.executable, str(BENCHMARKS / name), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_whole_program_against_its_limit(tmp_path):
    """The benchmark for GPUs, with its check of the decisions against the naive merge."""
    output, result = run(tmp_path, "bench_gpu.py", "--small", "--device", "cpu")
    row = next(line for line in output.splitlines() if line.startswith("| ") and "bench_gpu.py --small" in line)
    assert row.count("|") == 11 and f"{result['search_seconds']} s" in row
    assert len(result["seconds_of_each_candidate"]) == 2 and result["packed_tokens"] > 100
    assert result["times_naive"] > 1 and result["fraction_of_limit"] > 0
    assert result["reading_seconds"] > 0 and result["products_seconds"] > 0


def test_the_page_on_gpus_has_the_table_that_is_printed(capsys):
    runpy.run_path(str(BENCHMARKS / "gpu_memory.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 6 and printed in (ROOT / "docs/hardware.md").read_text()


@pytest.mark.slow
def test_the_search_against_its_limit(tmp_path):
    _, result = run(tmp_path, "bench_merge.py", *SMALL, "--repeats", "1", "--pairs", "5")
    assert result["times_naive"] > 1 and result["layout"] == "forest" and result["pairs"] == 5


@pytest.mark.slow
def test_half_types(tmp_path):
    _, result = run(tmp_path, "bench_half_types.py", *SMALL)
    assert {"bfloat16", "bfloat16+float32"} <= result["seconds"].keys() and min(result["seconds"].values()) > 0


@pytest.mark.slow
def test_the_mapper(tmp_path):
    _, result = run(tmp_path, "bench_mapper.py", *SMALL, "--contexts", "1", "--max-depth", "2")
    assert result["same_branches_as_naive"] == result["leaves"] > 1


@pytest.mark.slow
def test_where_the_seconds_of_a_mapping_go(tmp_path):
    tokenizer = tiny.TOKENIZERS["bpe"]()
    base = tiny.make_model(tmp_path / "base", tiny.llama_config(len(tokenizer)), tokenizer, scale=20.0)
    config = tiny.write_config(tmp_path / "my.yaml", base, [], tmp_path / "out")
    output, result = run(tmp_path, "bench_mapper.py", "--config", str(config))
    rows = {what: (branches, tokens) for what, branches, tokens, _ in result["rows"]}
    (mapped, said), (texts, generated) = rows["all branches: mapping"], rows["all branches: generate"]
    assert mapped == texts >= result["contexts"] == 5 and said <= generated < said + texts
    assert rows["the limits of default-mapper.yaml: mapping"][0] <= mapped
    assert "| all branches: mapping | " in output


@pytest.mark.slow
def test_a_replay_beside_mergekit(tmp_path):
    base, candidate, _ = make_models(tmp_path / "models", torch.bfloat16)
    folder = os.environ.get("MERGEKIT") or str(tmp_path / "mergekit")
    try:
        mergekits.install(Path(folder))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mergekit can't be installed here: {error.stderr.strip().splitlines()[-1]}")
    models = ["--base", str(base), "--candidate", str(candidate)]
    output, result = run(tmp_path, "bench_replay.py", *models, "--mergekit", folder, "--runs", "1")
    assert [row["merge"] for row in result["rows"]] == ["linear"] * 3 + ["slerp"] * 3
    assert all(row["seconds"] > 0 and row["megabytes"] > 50 for row in result["rows"])
    assert "slerp | with card and pictures | " in output


@pytest.mark.slow
def test_a_joint_search_against_its_limit(tmp_path):
    output, result = run(tmp_path, "bench_joint.py", "--quick", "--repeats", "1")
    seconds = result["seconds"]
    assert {"steps 2", "steps 4", "candidates 1", "candidates 2"} < set(seconds)
    assert seconds["steps 2"] < seconds["steps 4"] and seconds["a step"] > seconds["limit of a step"] > 0
    assert f"a step takes {seconds['a step'] / seconds['limit of a step']:.2f} times its limit" in output


@pytest.mark.slow
def test_growth_is_drawn(tmp_path):
    output, result = run(tmp_path, "bench_scaling.py", "--quick", "--picture", "scaling.png")
    assert {"layers", "ratios", "pairs", "vocabulary", "hidden"} < set(result)
    for name in ("layers", "ratios", "pairs", "vocabulary", "hidden"):
        assert [row["value"] for row in result[name]] == sorted(row["value"] for row in result[name])
        assert all(row["search_seconds"] > 0 for row in result[name]) and f"{name} |" in output
    picture = imread(tmp_path / "scaling.png")
    assert picture.shape[1] > 3 * picture.shape[0] and picture[..., :3].std() > 0.05


@pytest.mark.slow
def test_a_trace_shows_the_reading_thread(tmp_path):
    _, result = run(tmp_path, "trace_search.py", *SMALL, "--device", "cpu", "--trace", "search.json")
    assert result["waiting_seconds"] < result["search_seconds"] and result["reading_beside_computing"].endswith("%")
    events = json.loads((tmp_path / "search.json").read_text())["traceEvents"]
    threads = {
        name: {e["tid"] for e in events if e.get("name") == name} for name in ("read a layer", "wait for a layer")
    }
    assert len(threads["read a layer"]) == 1 and threads["read a layer"] != threads["wait for a layer"]


@pytest.mark.slow
def test_processes(tmp_path):
    _, result = run(tmp_path, "bench_processes.py", *SMALL, "--pairs", "60", "--repeats", "1", "--processes", "1", "2")
    assert set(result["search_seconds"]) == {"1", "2"}


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_reaches_the_figures(tmp_path):
    _, result = run(tmp_path, "bench_gpu.py")
    assert result["times_limit"] <= 1.25 and result["times_naive"] >= 40
    assert result["peak_gib_over_base"] <= 0.2 * result["base_gib"]
