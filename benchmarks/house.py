"""How large the program is, and how many files know of one thing: what a change costs whoever makes it.

    python benchmarks/house.py                # this version
    python benchmarks/house.py --program DIR  # another one

Prints lines by package, then for each of five kinds of change the files of modules/ that name an example of it: what a
second one of its kind would touch. Names are looked for as whole words, comments and docstrings not counted.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A kind of change, and the words by which a file knows an example of it.
CHANGES = {
    "a metric that a search weighs (drift)": r"\w*drift\w*|kl",
    "a metric that is only shown (perplexity)": r"\w*perplexity\w*",
    "a way of searching (joint)": r"\w*joint\w*",
    "a config key (neutral_tokens)": r"neutral_tokens",
    "a checkpoint format (GGUF)": r"\w*gguf\w*",
    "a merge method with a parameter (ties, density)": r"ties|density",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count; print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, default=ROOT, help="the folder of the version that is measured")
    modules = parser.parse_args(arguments).program / "modules"
    sources = {path.relative_to(modules): path.read_text(encoding="utf-8") for path in sorted(modules.rglob("*.py"))}
    print_sizes(sources)
    print_changes(sources)
    print_density(sources)
    return 0


def print_sizes(sources: dict[Path, str]) -> None:
    """Files and lines of each package."""
    files, lines = Counter[str](), Counter[str]()
    for path, text in sources.items():
        files[path.parts[0]] += 1
        lines[path.parts[0]] += len(text.splitlines())
    print(f"{'package':<14}{'files':>7}{'lines':>8}")
    for package, count in lines.most_common():
        print(f"{package:<14}{files[package]:>7}{count:>8,}")
    print(f"{'all':<14}{files.total():>7}{lines.total():>8,}")


def print_changes(sources: dict[Path, str]) -> None:
    """How many files know of each example."""
    codes = {path: code_of(text) for path, text in sources.items()}
    print(f"\n{'what a change of this kind touches':<52}{'files':>7}")
    for change, words in CHANGES.items():
        pattern = re.compile(rf"(?i)\b({words})\b")
        knowing = [path for path, code in codes.items() if pattern.search(code)]
        print(f"{change:<52}{len(knowing):>7}  {', '.join(path.as_posix() for path in knowing[:4])}")


def code_of(text: str) -> str:
    """A file without its comments and docstrings."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.add(node.value.lineno)
    kept = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        if token.type != tokenize.COMMENT and not is_docstring:
            kept.append(token.string)
    return " ".join(kept)


def print_density(sources: dict[Path, str]) -> None:
    """How much stands on a line: comprehensions, and assignments of several values at once."""
    comprehensions = assignments = functions = 0
    for text in sources.values():
        for node in ast.walk(ast.parse(text)):
            comprehensions += isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
            assignments += isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            functions += isinstance(node, ast.FunctionDef)
    lines = sum(len(text.splitlines()) for text in sources.values())
    print(f"\n{functions:,} functions, {1000 * comprehensions / lines:.0f} comprehensions in 1,000 lines, ", end="")
    print(f"{assignments} assignments of several values at once")


if __name__ == "__main__":
    sys.exit(main())
