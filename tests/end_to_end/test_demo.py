"""Out of the box: the plain commands of the pages, on the demo models and default.yaml as they are shipped."""

import contextlib
import dataclasses
import io
import re
import shlex
import shutil
import sys

import pytest
import yaml
from project import ROOT
from runs import tables

sys.path.insert(0, str(ROOT / "demo"))

import make_models
from write_pages import DEMO, EXCERPTS, page_of, prepare

import merge_monster
import monster_mapper
from modules.config.schema import CONFIG_KEYS, Mapper


def printed(command, folder):
    """What a command of the pages prints in a prepared folder, in this process."""
    script, *options = shlex.split(command)
    program = {"merge_monster.py": merge_monster, "monster_mapper.py": monster_mapper}[script]
    device = [] if "--compare" in options else ["--device", "cpu"]
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(folder)
        assert program.main([*options, *device]) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands of the pages are run in; the demo's models are trained if they are missing."""
    make_models.main()
    folder = tmp_path_factory.mktemp("demo")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def log(folder):
    """What the merge of the demo models prints."""
    log = printed(DEMO, folder)
    assert (folder / "demo/merged/model.safetensors").is_file()
    return log


def test_the_models_are_those_of_the_pages(folder):
    """To the bit, on every machine. If they are older: remove demo/models, and they are trained again."""
    found = {lesson.name: make_models.digest(folder / "demo/models" / lesson.name) for lesson in make_models.LESSONS}
    assert found == {lesson.name: lesson.digest for lesson in make_models.LESSONS}


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


def test_the_joint_search_comes_below_every_candidate(folder):
    shutil.copy(ROOT / "demo/joint.yaml", folder)
    shown = printed("merge_monster.py --config joint.yaml --output joint", folder)
    whole = re.findall(r"^\| ([\w-]+(?: \(base\))?|the merge) +\| +(-?[\d.]+) +\|.*$", shown, re.MULTILINE)
    totals = {name: float(total) for name, total in whole}
    assert len(totals) == 4 and totals.pop("the merge") < min(totals.values())
    assert len(re.findall(r" - Step \d+/25 - ", shown)) == 25


NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
WHEN = re.compile(r"\d\d:\d\d:\d\d|\d{8}_\d{6}|\d+\.\d s\b")


def words_and_numbers(text):
    """Of what a run prints, but for times of day and seconds. Columns are as wide as their numbers: no word is."""
    text = WHEN.sub("TIME", text)
    words = [re.sub(r"[\s-]+", " ", NUMBER.sub("NUMBER", line)).strip() for line in text.splitlines()]
    return words, [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def assert_same_run(shown, found):
    """Line for line the same words, and numbers that differ by what another processor rounds."""
    (shown_words, shown_numbers), (words, numbers) = words_and_numbers(shown), words_and_numbers(found)
    assert words == shown_words
    assert numbers == pytest.approx(shown_numbers, rel=1e-3, abs=2e-3)


@pytest.mark.parametrize(
    "excerpt",
    [pytest.param(excerpt, marks=[pytest.mark.slow] if excerpt.before else []) for excerpt in EXCERPTS],
    ids=lambda excerpt: excerpt.page,
)
def test_a_page_shows_what_its_command_prints(excerpt, folder, log):
    """If not, python demo/write_pages.py writes the pages anew."""
    for command in excerpt.before:
        printed(command, folder)
    found = log if excerpt.command == DEMO else printed(excerpt.command, folder)
    assert_same_run(page_of(excerpt)[1], excerpt.part(found))


@pytest.mark.parametrize(
    "shown, found, same",
    [
        ("09:06:37 - Total 5.85325 | -0.1%", "10:00:00 - Total 5.85326 | -0.1%", True),
        ("| a | 5.85325 |\n-----------", "| a | 15.85325 |\n------------", False),
        ("Layer 1/4 - CHANGED - 0.2 > 0.1", "Layer 1/4 - RETAINED - 0.2", False),
        ("80.00%  apple-logic", "80.00%  plain-prose", False),
        ("0.41493", "-0.41493", False),
        ("3,935 tokens", "3,900 tokens", False),
    ],
)
def test_another_run_would_be_noticed(shown, found, same):
    if same:
        assert_same_run(shown, found)
    else:
        with pytest.raises(AssertionError):
            assert_same_run(shown, found)


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


def test_without_the_demo_models_the_message_says_how_to_make_them(place, capsys):
    (place / "default.yaml").write_text((ROOT / "default.yaml").read_text(encoding="utf-8"))
    assert merge_monster.main([]) == 2
    assert "demo/models/cliche-base': no such folder; run python demo/make_models.py" in capsys.readouterr().err
