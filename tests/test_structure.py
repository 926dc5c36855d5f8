"""The house rules that a machine can check: imports run one way, and the README's file tree is the real one."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from floors below its own.
FLOORS = {
    "causes": 0,
    "config.errors": 0,
    "config.locations": 0,
    "config.yaml_file": 0.1,
    "config.fields": 0.2,
    "config.phrase_lists": 0.3,
    "config.schema": 0.4,
    "config.__main__": 0.5,
    "config.findings": 0.5,
    "config.load": 0.6,
    "strategies": 0,
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
    *(name for name in FLOORS if name.startswith("config.")),
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
    "composition",
    "phrases",
    "spelling",
    "mapping",
    "report",
    "card",
    "comparison",
    "mapping_report",
)
FILES = {
    ".".join(path.relative_to(ROOT / "modules").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "modules").rglob("*.py")
}
MODULES = sorted(FILES)


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
    for imported in imports(FILES[name]):
        if imported.startswith("modules"):
            assert FLOORS[imported.removeprefix("modules.")] < FLOORS[name], f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_who_touches_what(name):
    """The light floors stay light, and only model code touches torch modules."""
    packages = {imported.split(".")[0] for imported in imports(FILES[name])}
    if name in LIGHT:
        assert not packages & {"torch", "transformers", "safetensors"}
    source = FILES[name].read_text(encoding="utf-8")
    if name not in ("models", "layouts", "candidates", "probability"):
        assert not re.search(r"\bnn\b|\.forward\b|state_dict", source)


@pytest.mark.parametrize("name", MODULES)
def test_a_message_is_given_line_by_line(name):
    """A line end within a text is shown escaped: it may be a stranger's."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call) and ast.unparse(node.func).startswith("console.")
        ):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            assert not any("\n" in str(text) for text in texts) or "BANNER" in ast.unparse(node), ast.unparse(node)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_opens_with_what_it_knows_and_refuses_to_know(name):
    opening = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    assert "Knows:" in opening and "Refuses to know:" in opening


def test_the_readme_shows_the_real_file_tree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## Files")[1].split("```")[1]
    listed, folders = set(), [""]
    for line in tree.strip().splitlines()[1:]:
        name = line.split()[0]
        del folders[(len(line) - len(line.lstrip())) // 4 + 1 :]
        if name.endswith("/"):
            folders.append(folders[-1] + name)
        else:
            listed.add(folders[-1] + name)
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    real = {path for path in result.stdout.split() if path != ".gitignore" and (ROOT / path).exists()}
    assert listed == real


def test_requirements_hold_nothing_but_what_the_run_needs():
    names = [re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    needed = (
        "accelerate huggingface_hub matplotlib protobuf psutil pydantic pyyaml safetensors sentencepiece torch tqdm"
    )
    assert sorted(names) == [*needed.split(), "transformers"]
