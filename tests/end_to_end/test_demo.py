"""Out of the box: the plain commands of the pages, on the demo models and default.yaml as they are shipped."""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml
from project import ROOT
from runs import tables

from modules.config import Mapper
from modules.config.schema import CONFIG_KEYS


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What the merge of the demo models prints; they are trained if they are missing."""
    made = python("demo/make_models.py")
    assert made.returncode == 0, made.stderr
    output = tmp_path_factory.mktemp("demo") / "merged"
    result = python("merge_monster.py", "--config", "default.yaml", "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert (output / "model.safetensors").is_file()
    return result.stdout


def test_a_cliche_falls_by_half_and_the_apple_is_found(log):
    first, last = tables(log)[0][:-1], tables(log)[-1][:-1]
    raw = [
        (row[0], float(row[3].rstrip("%")), float(after[3].rstrip("%"))) for row, after in zip(first, last, strict=True)
    ]
    assert any(after < before / 2 for kind, before, after in raw if kind == "BAD")
    assert all(after > before for kind, before, after in raw if kind == "GOOD")
    assert all(before > 20 for kind, before, _ in raw if kind == "BAD")  # the base does love its cliches


def test_both_candidates_have_a_share(log):
    shares = {name: float(share) for share, name in re.findall(r"^ *([\d.]+)%  ([\w-]+)$", log, re.MULTILINE)}
    assert {"cliche-base", "plain-prose", "apple-logic"} == set(shares)
    assert all(share > 0 for share in shares.values())


def test_the_joint_search_comes_below_every_candidate(log, tmp_path):
    result = python("merge_monster.py", "--config", "demo/joint.yaml", "--output", str(tmp_path / "merged"))
    assert result.returncode == 0, result.stderr
    whole = re.findall(r"^\| ([\w-]+(?: \(base\))?|the merge) +\| +(-?[\d.]+) +\|$", result.stdout, re.MULTILINE)
    totals = {name: float(total) for name, total in whole}
    assert len(totals) == 4 and totals.pop("the merge") < min(totals.values())
    assert len(re.findall(r" - Step \d+/25 - ", result.stdout)) == 25


def without_digits(text):
    """Lines as another processor, which rounds differently, prints them too."""
    # Which ratio wins, and whether a layer changes, may differ too: only what surrounds them is compared.
    lines = [line for line in text.splitlines() if " - Layer " not in line and " - Header " not in line]
    lines = [line for line in lines if not line.startswith(("[[", "Output directory")) and "Saving to" not in line]
    lines = [line for line in lines if not line.startswith("To publish it")]  # where the output is
    # Whether a candidate alone is better than the merge, and how wide a table of totals is.
    lines = [line for line in lines if "taken whole is better" not in line and not line.startswith(("Take it", "---"))]
    lines = [line for line in lines if not re.match(r"  base:|  merge:| {9}", line)]  # what a model answers
    lines = [re.sub(r"[-+]?\d[\d.e-]*", "0", line) for line in lines]
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]


def test_the_page_shows_this_very_run(log):
    page = (ROOT / "docs/try-it.md").read_text(encoding="utf-8")
    shown = page.split("## What merging prints")[1].split("```text\n")[1].split("```")[0]
    assert sorted(without_digits(shown)) == sorted(without_digits(log))


def test_the_readmes_example_prints_what_it_shows(log, tmp_path):
    """Ten lines, as they stand there; what is shown is the end of the search, without a gap."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("```yaml\n")[1].split("```")[0]
    assert len(example.splitlines()) == 10
    (tmp_path / "my.yaml").write_text(example, encoding="utf-8")
    result = python("merge_monster.py", "--config", str(tmp_path / "my.yaml"), "--output", str(tmp_path / "merged"))
    assert result.returncode == 0, result.stderr

    shown = readme.split("```yaml\n")[1].split("```text\n")[1].split("```")[0]
    assert shown.startswith("[[1.0, 'cliche-base'], ") and " - Layer " in shown
    end = without_digits(result.stdout.split("Saving to")[0])[:-1]  # its last line is the time of that one
    expected = without_digits(shown)
    assert len(expected) > 10
    # The order of the composition, and only it, may differ.
    assert sorted(end[-len(expected) :]) == sorted(expected) and end[-5:-3] == expected[-5:-3]
    first, last = tables(result.stdout)[0][:-1], tables(result.stdout)[-1][:-1]
    better = [float(after[3].rstrip("%")) - float(row[3].rstrip("%")) for row, after in zip(first, last, strict=True)]
    assert better[0] + better[1] < 0 < better[2]  # by how much each, depends on how the models were trained


def test_the_page_shows_how_models_do_without_a_merge(log, tmp_path):
    example = (ROOT / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "my.yaml").write_text(example, encoding="utf-8")
    models = ["demo/models/plain-prose", "demo/models/apple-logic"]
    result = python("merge_monster.py", "--config", str(tmp_path / "my.yaml"), "--score", *models)
    assert result.returncode == 0, result.stderr
    page = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    assert f"--config my.yaml --score {' '.join(models)}\n" in page
    expected = without_digits(page.split("without a merge?")[1].split("```text\n")[1].split("```")[0])
    assert without_digits(result.stdout)[-len(expected) - 1 : -1] == expected  # its last line names the log


def test_the_page_shows_what_the_mapper_prints(log, tmp_path):
    """Line for line, in the order of the run, but for digits and what this machine's training makes the model say."""
    result = python("monster_mapper.py", "--yaml", str(tmp_path / "better.yaml"))
    assert result.returncode == 0, result.stderr

    def lines_of(text):
        said = r"(Sequence:|Trace:|TOTAL BRANCHES:|(?:BAD|GOOD)  \".*?\"|\| (?:BAD|GOOD)(?:.*?\|){3}).*"
        own = re.sub(said, r"\1", text)
        own = re.sub(r"\d+(\.\d+)?%?", "0", own)
        return [re.sub(r"\s+", " ", line).strip() for line in own.splitlines() if line.strip()]

    page = (ROOT / "docs/mapper.md").read_text(encoding="utf-8")
    shown = page.split("# What would the model say?")[1].split("```text")[1].split("```")[0]
    printed = iter(lines_of(result.stdout))
    assert all(line in printed for line in lines_of(shown))
    better = yaml.safe_load((tmp_path / "better.yaml").read_text(encoding="utf-8"))
    assert {"phrase": "unwavering", "weight": 1.0, "contexts": ["Filled with an "]} in better["bad_phrases"]


def test_default_mapper_yaml_has_every_key_of_the_mapper_at_its_default_and_limits():
    document = yaml.safe_load((ROOT / "default-mapper.yaml").read_text(encoding="utf-8"))
    settings = Mapper(**document["mapper"])
    assert dataclasses.replace(settings, max_branches=None, min_joint=None) == Mapper()
    assert settings.max_branches and settings.min_joint
    assert set(document["mapper"]) == {field.name for field in dataclasses.fields(Mapper)}


def test_default_yaml_has_every_key():
    document = yaml.safe_load((ROOT / "default.yaml").read_text(encoding="utf-8"))
    assert set(document) == set(CONFIG_KEYS) - {"mapper", "discover"}
    assert set(document["directories"]) == {"model_path1", "model_directory", "output_directory"}


def test_without_the_demo_models_the_message_says_how_to_make_them(tmp_path):
    (tmp_path / "default.yaml").write_text((ROOT / "default.yaml").read_text(encoding="utf-8"))
    result = subprocess.run(
        [sys.executable, str(ROOT / "merge_monster.py")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "demo/models/cliche-base': no such folder; python demo/make_models.py makes it" in result.stderr
