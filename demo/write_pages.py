"""Put what the demo's runs print into the pages that show it, all of one run.

    python demo/make_models.py
    python demo/write_pages.py            # the pages; about a minute

Knows: which page shows which part of which command's output. Refuses to know: what the lines mean. The runs are made in
a folder of their own, so that nothing of yours is touched.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENING, CLOSING = "```text\n", "```"
DEMO = "merge_monster.py --config default.yaml"
THREE_WAYS = (
    "merge_monster.py --output runs/default",
    'merge_monster.py --set "merge_method=[slerp, gradient]" --output runs/blended',
    "merge_monster.py --set strategy=all_phrases --output runs/careful",
)


@dataclass(frozen=True)
class Excerpt:
    """A block of a page: the first one behind a text, what it shows of a command, and what has to be run before."""

    page: str
    behind: str
    command: str
    part: Callable[[str], str]
    before: tuple[str, ...] = ()


def last_change(printed: str) -> str:
    """The last layer that was changed: what it is made of, the total, a rule."""
    lines = printed.splitlines()
    last = max(number for number, line in enumerate(lines) if " - Layer " in line and "CHANGED" in line)
    return "\n".join(lines[last - 1 : last + 2]) + "\n"


def last_table(printed: str) -> str:
    """The last table: rows in a row, and the rules around them."""
    return re.findall(r"^-{9,}\n(?:(?:\| .*|-{9,})\n)+", printed, re.MULTILINE)[-1]


def first_context(printed: str) -> str:
    """Of the mapper: the first context."""
    return re.split(r"^(?=-{80,}\n)", printed, flags=re.MULTILINE)[1].rstrip() + "\n"


EXCERPTS = (
    Excerpt("docs/try-it.md", "## The demo", DEMO, last_table),
    Excerpt("docs/output.md", "# What does a run print", DEMO, last_change),
    Excerpt(
        "docs/output.md",
        "## Compare merges",
        "merge_monster.py --compare runs/blended runs/careful runs/default",
        last_table,
        THREE_WAYS,
    ),
    Excerpt(
        "docs/mapper.md", "# What would the model say?", "monster_mapper.py --config default-mapper.yaml", first_context
    ),
)


def page_of(excerpt: Excerpt) -> tuple[str, str, str]:
    """The text of a page before, in and behind the block of an excerpt."""
    page = (ROOT / excerpt.page).read_text(encoding="utf-8")
    block = page.index(OPENING, page.index(excerpt.behind)) + len(OPENING)
    end = page.index(CLOSING, block)
    return page[:block], page[block:end], page[end:]


def prepare(folder: Path) -> None:
    """Put there what the commands name: the settings and the models."""
    for name in ("default.yaml", "default-mapper.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "demo/models", folder / "demo/models")


def printed(command: str, folder: Path) -> str:
    """What a command prints in a prepared folder. Raises CalledProcessError."""
    script, *options = shlex.split(command)
    device = () if "--compare" in options else ("--device", "cpu")  # a GPU rounds differently
    run = [sys.executable, str(ROOT / script), *options, *device]
    return subprocess.run(run, cwd=folder, stdout=subprocess.PIPE, check=True).stdout.decode("utf-8")


def main() -> None:
    """Run every command once, and write the pages."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        outputs = {}
        for excerpt in EXCERPTS:
            for command in (*excerpt.before, excerpt.command):
                if command not in outputs:
                    print(f"python {command}", flush=True)
                    outputs[command] = printed(command, folder)
            start, _, end = page_of(excerpt)
            text = start + excerpt.part(outputs[excerpt.command]) + end
            (ROOT / excerpt.page).write_text(text, encoding="utf-8")
    print(f"Written: {', '.join(sorted({excerpt.page for excerpt in EXCERPTS}))}")


if __name__ == "__main__":
    main()
