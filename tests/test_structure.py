"""The house rules that a machine can check: imports run one way, and the file trees of the pages are real."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from floors below its own.
FLOORS = {
    "causes": 0,
    "sources": 0,
    "strategies": 0,
    "text": 0,
    "composition": 0,
    "merging": 0,
    "stopping": 0,
    "config": 1,
    "console": 2,
    "filesystem": 0,
    "processes": 2,
    "journal": 2,
    "places": 2,
    "apart": 3,
    "phrases": 2,
    "weights": 2,
    "companions": 3,
    "failures": 3,
    "group": 3,
    "hub": 3,
    "inputs": 3,
    "layouts": 3,
    "meaning": 3,
    "outputs": 3,
    "spelling": 3,
    "checkpoints": 4,
    "mapping": 4,
    "adapters": 5,
    "models": 5,
    "exactness": 6,
    "memory": 6,
    "candidates": 6,
    "probability": 7,
    "continuation": 8,
    "headers": 7,
    "opening": 7,
    "streaming": 7,
    "preflight": 8,
    "search": 8,
    "forecast": 9,
    "record": 9,
    "report": 9,
    "card": 10,
    "comparison": 10,
    "mapping_report": 10,
    "pictures": 10,
    "run": 11,
    "following": 12,
    "replay": 12,
    "run_mapper": 12,
}
LIGHT = (
    "sources",
    "processes",
    "stopping",
    "filesystem",
    "places",
    "apart",
    "outputs",
    "config",
    "console",
    "failures",
    "journal",
    "strategies",
    "text",
    "composition",
    "phrases",
    "spelling",
    "mapping",
    "report",
    "card",
    "comparison",
    "mapping_report",
)
MODULES = sorted(path.stem for path in (ROOT / "modules").glob("*.py"))


def imports(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "modules":
            yield from (f"modules.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_module_has_its_floor():
    assert sorted(FLOORS) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    for imported in imports(ROOT / "modules" / f"{name}.py"):
        if imported.startswith("modules"):
            assert FLOORS[imported.removeprefix("modules.")] < FLOORS[name], f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_who_touches_what(name):
    """The light floors stay light, and only model code touches torch modules."""
    packages = {imported.split(".")[0] for imported in imports(ROOT / "modules" / f"{name}.py")}
    if name in LIGHT:
        assert not packages & {"torch", "transformers", "safetensors"}
    source = (ROOT / "modules" / f"{name}.py").read_text(encoding="utf-8")
    if name not in ("models", "layouts", "candidates", "probability"):
        assert not re.search(r"\bnn\b|\.forward\b|state_dict", source)


@pytest.mark.parametrize("name", MODULES)
def test_a_message_is_given_line_by_line(name):
    """A line end within a text is shown escaped: it may be a stranger's."""
    for node in ast.walk(ast.parse((ROOT / "modules" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call) and ast.unparse(node.func).startswith("console.")
        ):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            assert not any("\n" in str(text) for text in texts) or "BANNER" in ast.unparse(node), ast.unparse(node)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_opens_with_what_it_knows_and_refuses_to_know(name):
    opening = ast.get_docstring(ast.parse((ROOT / "modules" / f"{name}.py").read_text(encoding="utf-8")))
    assert "Knows:" in opening and "Refuses to know:" in opening


@pytest.mark.parametrize("page", ["README.md", "docs/development.md"])
def test_a_page_shows_the_real_file_tree(page):
    """A line for each file at the top and for each folder; what else has one is there too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    tree = text.split("## Files")[1].split("```")[1]
    listed, folder = set(re.findall(r"^\| `(modules/\w+/)` \|", text, re.MULTILINE)), ""
    for line in tree.strip().splitlines()[1:]:
        name, *words = line.split()
        assert words, f"{name}: what is it?"
        inside = line.startswith("    ")
        listed.add(folder + name if inside else name)
        folder = folder if inside else name
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    files = {path for path in result.stdout.split() if path != ".gitignore" and (ROOT / path).exists()}
    folders = {f"{folder}/" for path in files for folder in list(map(str, Path(path).parents))[:-1]}
    real = {path for path in files if "/" not in path} | folders
    if any(Path(path).parent == Path("modules") and not path.endswith("__init__.py") for path in files):
        listed -= {name for name in listed - real if name.startswith("modules/")}  # modules on their way to a package
    assert real <= listed <= files | folders


def test_requirements_hold_nothing_but_what_the_run_needs():
    names = [re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    needed = "accelerate huggingface_hub matplotlib protobuf psutil pyyaml safetensors sentencepiece torch tqdm"
    assert sorted(names) == [*needed.split(), "transformers"]
