"""The README and the pages of docs/ against what they tell of: keys and defaults, options, commands, figures, links."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from project import ROOT

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
PROSE = {page: FENCE.sub("", text) for page, text in PAGES.items()}
HEADINGS = {page: re.findall(r"^#+ (.+)$", text, re.MULTILINE) for page, text in PROSE.items()}
THEIRS = {
    "before.json",
    "after.json",
    "my.yaml",
    "found.yaml",
    "merge.yaml",
    "merge_monster_recipe.json",
}  # files that the reader has, or will have


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
    lines = [line for line in PAGES["docs/performance.md"].splitlines() if line.startswith("| ")]
    costs = rows(section("README.md", "What it costs"), "what")
    assert len(costs) == 3
    for _, *figures, command in costs:
        assert command.startswith("`python benchmarks/")
        [line] = [line for line in lines if f"| {command} |" in line]
        shown = [cell.strip() for cell in line.split("|")]
        assert all(figure in shown for figure in figures if re.match(r"\d", figure))
        assert sum(bool(re.match(r"\d", figure)) for figure in figures) >= 3


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
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown.getvalue(), re.MULTILINE)) - {"--help"}


@pytest.mark.parametrize(
    "script, page, heading",
    [
        ("merge_monster.py", "docs/configuration.md", "Options of the merge"),
        ("monster_mapper.py", "docs/mapper.md", "Options"),
    ],
)
def test_the_tables_have_every_option_and_no_other(script, page, heading):
    shown = [cells[0].strip("`").split()[0] for cells in rows(section(page, heading), "option")]
    assert len(shown) == len(set(shown)) and set(shown) == options_of(script)


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
    for command in ("make test     # all tests", "python merge_monster.py --config my.yaml", "make bench"):
        assert command in found


def test_the_table_has_every_marker_of_the_tests():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    markers = re.findall(r'^    "([^:"]+): ', settings.split("markers = [")[1].split("]")[0], re.MULTILINE)
    assert [cells[0].strip("`") for cells in rows(section("docs/development.md", "Tests"), "marker")] == markers


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
# Links
# ---------------------------------------------------------------------------------------------------------------------

LINKS = [(page, link) for page, text in PROSE.items() for link in re.findall(r"\[[^\]]+\]\(([^)]+)\)", text)]


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
        assert heading in map(anchor, HEADINGS[file.relative_to(ROOT).as_posix()])


@pytest.mark.parametrize("page", PAGES)
def test_headings_are_told_apart(page):
    assert PAGES[page].startswith("# ") and len(set(map(anchor, HEADINGS[page]))) == len(HEADINGS[page])


def test_there_are_links():
    assert all(any(page == start for start, _ in LINKS) for page in ("README.md", "docs/own-models.md"))
    pictures = {file.name for file in (ROOT / "images").glob("*.png")}
    assert pictures == {Path(link).name for _, link in LINKS if link.endswith(".png")}


def test_what_is_referred_to_by_its_name_is_there():
    """On the page itself, or on the one that is named with it."""
    found = 0
    for page, text in PROSE.items():
        for name, link in re.findall(r"\bsee \"([^\"]+)\"(?: in \[[^\]]+\]\(([^)]+)\))?", text):
            there = target(page, link)[0].relative_to(ROOT).as_posix() if link else page
            bold = [name.rstrip(".") for name in re.findall(r"\*\*([^*]+)\*\*", PROSE[there])]
            assert name in bold or name in HEADINGS[there]
            found += 1
    assert found >= 3
