"""The README against what it tells of: keys and defaults, options, commands, links."""

import contextlib
import dataclasses
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from modules import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCE.sub("", README)
HEADINGS = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
THEIRS = {"my.yaml", "merge_monster_recipe.json"}  # files that the reader has, or will have
REQUIRED = object()


def section(heading):
    """The text below a heading, up to the next one of any rank."""
    return re.split(r"^#+ ", PROSE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text, first):
    """The cells of the table whose head begins with a word."""
    table = text.split(f"| {first} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------

KEYS = {cells[0].strip("`"): cells for cells in rows(section("Configuration"), "key")}


def default_of(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def expected_keys():
    """Every key of the YAML file and its default, nested ones with a dot."""
    nested = {"directories": config.Directories, "mapper": config.Mapper}
    found = {f.name: default_of(f) for f in dataclasses.fields(config.Config) if f.name not in (*nested, "text")}
    for name, section_class in nested.items():
        found |= {f"{name}.{f.name}": default_of(f) for f in dataclasses.fields(section_class)}
    weight = next(f.default for f in dataclasses.fields(config.Pair) if f.name == "weight")
    return found | dict.fromkeys(config.PHRASE_KEYS, REQUIRED) | {"weight": weight}


def test_the_table_has_every_key_and_no_other():
    assert len(KEYS) == len(rows(section("Configuration"), "key"))
    assert set(KEYS) == set(expected_keys())


@pytest.mark.parametrize("key, default", expected_keys().items())
def test_the_table_has_the_default(key, default):
    shown = KEYS[key][2]
    if default is REQUIRED:
        assert shown == "required"
    else:
        assert shown[0] == shown[-1] == "`"
        value = yaml.safe_load(shown.strip("`"))
        value = tuple(value) if isinstance(value, list) else value
        assert value == default and isinstance(value, bool) == isinstance(default, bool)


@pytest.mark.parametrize(
    "key, allowed",
    [
        ("merge_method", config.METHODS),
        ("strategy", config.STRATEGIES),
        ("dtype", config.DTYPES),
        ("on_error", config.ON_ERROR),
        ("device", config.DEVICES.replace(" or", ",").split(", ")),
    ],
)
def test_the_table_names_what_is_allowed(key, allowed):
    shown = re.split(r", | or |; ", KEYS[key][1])
    assert shown[: len(allowed)] == list(allowed)


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
    "script, heading",
    [("merge_monster.py", "Your own models"), ("monster_mapper.py", "What would the model say? Monster Mapper")],
)
def test_the_tables_have_every_option_and_no_other(script, heading):
    shown = [cells[0].strip("`").split()[0] for cells in rows(section(heading), "option")]
    assert len(shown) == len(set(shown)) and set(shown) == options_of(script)


def commands():
    """Every command line: fenced, indented, or between backticks in a line."""
    blocks = "\n".join(block.strip("`") for block in FENCE.findall(README))
    lines = [*blocks.splitlines(), *(line for line in PROSE.splitlines() if line.startswith("    "))]
    lines += re.findall(r"`([^`\n]+)`", PROSE)
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

LINKS = re.findall(r"\[[^\]]+\]\(([^)]+)\)", PROSE)


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("link", dict.fromkeys(LINKS))
def test_a_link_leads_somewhere(link):
    if link.startswith("#"):
        assert link[1:] in map(anchor, HEADINGS)
    elif "://" not in link:
        assert (ROOT / link.split("#")[0]).exists()


def test_headings_are_told_apart():
    assert len(LINKS) >= 5 and len(set(map(anchor, HEADINGS))) == len(HEADINGS)


def test_what_is_referred_to_by_its_name_is_there():
    bold = [name.rstrip(".") for name in re.findall(r"\*\*([^*]+)\*\*", PROSE)]
    names = re.findall(r"\bsee \"([^\"]+)\"", PROSE)
    headings = re.findall(r"^#+ (.*)$", PROSE, flags=re.MULTILINE)
    assert names and all(name in bold or name in headings for name in names)


def test_what_the_first_screen_shows_is_part_of_the_whole_output():
    first, whole = README.split("## Try it")[0], README.split("<summary>The whole output</summary>")[1]
    shown = first.split("```text\n")[1].split("```")[0].splitlines()
    lines = whole.split("```")[1].splitlines()
    start = lines.index(shown[0])
    assert lines[start : start + len(shown)] == shown and len(shown) > 5
