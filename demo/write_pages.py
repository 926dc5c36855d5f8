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
EXAMPLE = "merge_monster.py --config my.yaml"
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


def whole(printed: str) -> str:
    """All of it."""
    return printed


def end_of_search(printed: str) -> str:
    """From the last decision on a layer to the composition."""
    lines = printed.splitlines()
    last = max(number for number, line in enumerate(lines) if " - Layer " in line)
    saving = next(number for number, line in enumerate(lines) if "Saving to" in line)
    return "\n".join(lines[last - 1 : saving]).rstrip() + "\n"


def last_change(printed: str) -> str:
    """The last layer that was changed: what it is made of, the total, a rule."""
    lines = printed.splitlines()
    last = max(number for number, line in enumerate(lines) if " - Layer " in line and "CHANGED" in line)
    return "\n".join(lines[last - 1 : last + 2]) + "\n"


def tables(printed: str) -> str:
    """From the first rule of a table on, but for the line that names the log."""
    lines = [line for line in printed.splitlines() if " - Done. " not in line]
    first = next(number for number, line in enumerate(lines) if line.startswith("-----"))
    return "\n".join(lines[first:]).rstrip() + "\n"


def two_contexts(printed: str) -> str:
    """Of the mapper: the first and the third context, and the table of all."""
    text = printed[: printed.rindex("\n", 0, -1)]  # the last line names the log
    parts = re.split(r"^(?=-{80,}\n(?:CONTEXT|\| Type))", text, flags=re.MULTILINE)
    return "".join((parts[1], parts[3], parts[-1])).rstrip() + "\n"


EXCERPTS = (
    Excerpt("docs/try-it.md", "## What merging prints", DEMO, whole),
    Excerpt("docs/output.md", "## The lines of a run", DEMO, last_change),
    Excerpt("README.md", "## An example", EXAMPLE, end_of_search),
    Excerpt(
        "docs/comparison.md",
        "## How do models do without a merge?",
        f"{EXAMPLE} --score demo/models/plain-prose demo/models/apple-logic",
        tables,
    ),
    Excerpt(
        "docs/mapper.md", "# What would the model say?", "monster_mapper.py --config default-mapper.yaml", two_contexts
    ),
    Excerpt(
        "docs/comparison.md",
        "# Which of several merges is best?",
        "merge_monster.py --compare runs/blended runs/careful runs/default",
        tables,
        THREE_WAYS,
    ),
)


def page_of(excerpt: Excerpt) -> tuple[str, str, str]:
    """The text of a page before, in and behind the block of an excerpt."""
    page = (ROOT / excerpt.page).read_text(encoding="utf-8")
    block = page.index(OPENING, page.index(excerpt.behind)) + len(OPENING)
    end = page.index(CLOSING, block)
    return page[:block], page[block:end], page[end:]


def prepare(folder: Path) -> None:
    """Put there what the commands name: the settings, the models, and the first page's my.yaml."""
    for name in ("default.yaml", "default-mapper.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "demo/models", folder / "demo/models")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("```yaml\n")[1].split("```")[0]
    (folder / "my.yaml").write_text(example, encoding="utf-8")


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
