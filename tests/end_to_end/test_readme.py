"""The README and the pages of docs/ against the program: commands, options, keys, figures, links."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from project import ROOT

from modules.config.load import load_config

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
PROSE = {page: FENCE.sub("", text) for page, text in PAGES.items()}
# Files that the reader has, or will have.
THEIRS = {
    "before.json",
    "found.json",
    "found.yaml",
    "merge.yaml",
    "merge_monster_recipe.json",
    "my.yaml",
    "suggestions.yaml",
}


def section(page, heading):
    """The text below a heading, up to the next one of any rank."""
    return re.split(r"^#+ ", PROSE[page].split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text, first):
    """The cells of the table whose head begins with a word."""
    table = text.split(f"| {first} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


# ---------------------------------------------------------------------------------------------------------------------
# The first page
# ---------------------------------------------------------------------------------------------------------------------


def test_the_first_page_leads_to_every_other():
    listed = [re.search(r"\]\((.+)\)", cells[0])[1] for cells in rows(section("README.md", "Read on"), "page")]
    assert sorted(listed) == sorted(set(PAGES) - {"README.md"})


def test_the_first_pages_figures_are_those_of_the_benchmarks():
    """Beside the same command, on the page that says how each was measured."""
    lines = [line for line in PAGES["docs/results.md"].splitlines() if line.startswith("| ")]
    costs = rows(section("README.md", "What it costs"), "what")
    assert len(costs) == 3
    for _, *figures, command in costs:
        assert command.startswith("`python benchmarks/")
        [line] = [line for line in lines if f"| {command} |" in line]
        shown = [cell.strip() for cell in line.split("|")]
        assert all(figure in shown for figure in figures if re.match(r"\d", figure))
        assert sum(bool(re.match(r"\d", figure)) for figure in figures) >= 3


def test_the_first_pages_figures_of_a_merge_are_those_that_the_command_printed():
    """They stand in the output of the command, on the page that explains it; of merges, on that of all rows."""
    printed = PAGES["docs/phrases.md"].splitlines()
    results = [next(line for line in printed if line.startswith(f"| {name} ")) for name in ("base", "merge-1")]
    whole = section("README.md", "What it does to a real model")
    shown = rows(whole, "measured")
    assert len(shown) == 7
    for _, *figures in shown:
        assert all(figure in result for figure, result in zip(figures, results, strict=True))
    lines = PAGES["docs/results.md"].splitlines()
    for name in ("greedy, float32", "joint, drift_weight 2"):
        line = next(line for line in lines if line.startswith(f"| {name} "))
        change, low, high = re.search(r"-(\d+)% \(-(\d+) to -(\d+)\)", line).groups()
        drift = line.split("|")[4].strip()
        assert drift in whole and f"{change} %" in whole
        assert f"{high} to {low})" in re.sub(r"\s+", " ", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Options and commands
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def options_of(script):
    """What a program says it can be given."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown.getvalue(), re.MULTILINE)) | {"--help"}


def test_options_that_the_prose_names_are_there():
    named = {option for text in PROSE.values() for option in re.findall(r"`(--[a-z][a-z-]+)[ `=]", text)}
    others = {"--nnodes", "--node-rank", "--rdzv-endpoint"}  # torchrun's
    known = options_of("merge_monster.py") | options_of("monster_mapper.py")
    assert len(named) > 10 and named - others <= known


def commands():
    """Every command line of any page: fenced, indented, or between backticks, be it on one line or on two."""
    blocks = "\n".join(block.strip("`") for text in PAGES.values() for block in FENCE.findall(text))
    prose = "\n".join(PROSE.values())
    lines = [*blocks.splitlines(), *(line for line in prose.splitlines() if line.startswith("    "))]
    lines += [re.sub(r"\s+", " ", text) for text in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose)]
    words = ("python", "python3", "make", "pip", "torchrun")
    return [line.strip() for line in lines if line.split() and line.split()[0] in words]


def wrong_with(command):
    """What a command line names that there is not."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = {
            *re.findall(r"^([\w-]+):", makefile, re.MULTILINE),
            *re.findall(r"^(\w+) \?=", makefile, re.MULTILINE),
        }
        return [word for word in words[1:] if word.split("=")[0] not in targets]
    names = [
        word for word in words[1:] if Path(word).suffix in (".py", ".yaml", ".json", ".txt") and word not in THEIRS
    ]
    absent = [name for name in names if not (ROOT / name).is_file()]
    script = next((name for name in names if name.endswith(".py")), None)
    if absent or script is None or words[1] == "-m":
        return absent
    options = [word.split("=")[0] for word in words[words.index(script) :] if word.startswith("--")]
    return [option for option in options if option not in options_of(script)]


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_a_command_names_what_there_is(command):
    assert wrong_with(command) == []


def test_the_commands_are_found():
    found = commands()
    assert sum(command.startswith("python ") for command in found) >= 10
    for command in ("python merge_monster.py --config my.yaml", "make real-discover"):
        assert command in found


@pytest.mark.parametrize(
    "command",
    [
        "make cake",
        "make demo TORCHES=1",
        "python merge_monsters.py",
        "python merge_monster.py --config nowhere.yaml",
        "python merge_monster.py --colour",
        "torchrun --nproc-per-node 4 merge_monster.py --colour",
        "python -m pytest tests/test_nothing.py",
        "pip install -r requirement.txt",
    ],
)
def test_what_there_is_not_would_be_found(command):
    assert wrong_with(command)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

YAML = [(page, block) for page, text in PAGES.items() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("page, block", YAML)
def test_settings_that_a_page_shows_are_loaded(page, block, place):
    """With models of the hub, and with a candidate and a phrase where it shows none."""
    settings = yaml.safe_load(block)
    for key in ("phrase_files", "held_out_files"):
        settings[key] = [str(ROOT / name) for name in settings.get(key, []) if name.startswith("example_phrases")]
    settings["directories"] = {**settings.get("directories", {}), "model_path1": "org/base", "output_directory": "out"}
    settings.setdefault("models_to_merge", ["org/candidate"])
    settings.setdefault("good_phrases", [{"phrase": "bread", "contexts": ["We baked "]}])
    (place / "my.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    load_config(place / "my.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------

LINKS = [(page, link) for page, text in PROSE.items() for link in re.findall(r"\[[^\]]+\]\(([^)]+)\)", text)]


def headings(text):
    """All headings of a page."""
    return re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def target(page, link):
    """The file and the heading that a link of a page leads to."""
    path, _, heading = link.partition("#")
    return ((ROOT / page).parent / path).resolve() if path else ROOT / page, heading


@pytest.mark.parametrize("page, link", dict.fromkeys(LINKS))
def test_a_link_leads_somewhere(page, link):
    if "://" in link:
        return
    file, heading = target(page, link)
    assert file.exists() and file.is_relative_to(ROOT)
    if heading:
        assert heading in map(anchor, headings(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_headings_are_told_apart(page):
    anchors = list(map(anchor, headings(PAGES[page])))
    assert PAGES[page].startswith("# ") and len(set(anchors)) == len(anchors)


def test_there_are_links():
    assert all(any(page == start for start, _ in LINKS) for page in ("README.md", "docs/use.md"))
    pictures = {file.name for file in (ROOT / "images").glob("*.png")}
    assert pictures == {Path(link).name for _, link in LINKS if link.endswith(".png")}
